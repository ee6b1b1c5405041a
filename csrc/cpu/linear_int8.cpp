// Chooses the instruction set and the family of an int8 linear layer, quantizes its inputs and cuts the work; packs.
#include "cpu/linear_int8.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/cut.h"
#include "cpu/features.h"
#include "cpu/work.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
  const LinearInt8Kernel* kernel;
  const char* few_name;
  const char* many_name;
};

// Plainest first; the last one that runs here is the default.
constexpr Isa kIsas[] = {
    {"baseline", always, &linear_int8_baseline, "baseline/int8-few", "baseline/int8-many"},
#if defined(TWOFOUR_X86)
    {"avx2", has_avx2, &linear_int8_avx2, "avx2/int8-few", "avx2/int8-many"},
    {"avx512vnni", has_avx512vnni, &linear_int8_avx512vnni, "avx512vnni/int8-few", "avx512vnni/int8-many"},
#endif
#if defined(TWOFOUR_AARCH64)
    {"neon", always, &linear_int8_neon, "neon/int8-few", "neon/int8-many"},
    {"neondot", has_neondot, &linear_int8_neondot, "neondot/int8-few", "neondot/int8-many"},
#endif
};

// Quantized inputs of a panel: about an L2 cache. At 256 tokens of 4096 inputs one panel beat two by 4 %.
constexpr int64_t kPanelBytes = 1100 * 1024;
constexpr int64_t kPanelTokens = 384;
// Pairs of tiles for which it is worth going through a panel again.
constexpr int64_t kLeastPairs = 4;
// Quantized inputs that are held at once.
constexpr int64_t kSlabBytes = 8 * 1024 * 1024;
// Below this many multiply-adds a call stays on its own thread: waking others costs a few microseconds.
constexpr int64_t kAlone = 1 << 19;

const Isa& find_isa(const std::string& name) {
  std::string here;
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here()) continue;
    if (name == isa.name) return isa;
    here += std::string(here.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("int8 kernels have no instruction set '" + name + "' on this machine, which has: " + here);
}

const Isa& chosen_isa() {
  default_isa();  // refuses a TWOFOUR_ISA that names nothing of this machine
  static const Isa* chosen = [] {
    const char* asked = std::getenv("TWOFOUR_ISA");
    const Isa* best = &kIsas[0];
    for (const Isa& isa : kIsas) {
      if (isa.runs_here()) best = &isa;
      if (asked != nullptr && std::strcmp(asked, isa.name) == 0) break;
    }
    return best;
  }();
  return *chosen;
}

Scratch& quantized_scratch() {
  thread_local Scratch scratch;
  return scratch;
}
Scratch& sums_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Of one quantized token.
int64_t row_bytes_of(const LinearInt8Kernel& kernel, const LinearInt8Args& args) {
  return (args.in_features + kInt8Step - 1) / kInt8Step * kernel.input_bytes;
}

void run_few(const LinearInt8Kernel& kernel, const LinearInt8Args& args, int threads, uint8_t* quantized,
             float* x_scales) {
  kernel.quantize(args, 0, args.tokens, quantized, x_scales);
  const int64_t tiles = nm::tiles_of(args.out_features);
  const int64_t wanted = threads == 1 ? 1 : 4 * static_cast<int64_t>(threads);
  const int64_t units = wanted < tiles ? wanted : tiles;
  for_each_unit(threads, units, [&](int64_t i) {
    kernel.few(args, quantized, x_scales, part(tiles, units, i), part(tiles, units, i + 1));
  });
}

void run_many(const LinearInt8Kernel& kernel, const LinearInt8Args& args, int threads, uint8_t* quantized,
              float* x_scales, int64_t most_tokens) {
  const int64_t row_bytes = row_bytes_of(kernel, args);
  const int64_t tiles = nm::tiles_of(args.out_features);
  // Panels begin at whole steps of the kernel's blocks, and few blocks of rows, so that a panel stays with its thread.
  const int64_t units = (args.tokens + kernel.block_step - 1) / kernel.block_step;
  const int64_t panels = (args.tokens + most_tokens - 1) / most_tokens;
  const int64_t pairs = (tiles + 1) / 2;
  const Cut cut(panels, pairs, 1, kLeastPairs, threads);
  const auto panel_start = [&](int64_t panel) {
    const int64_t token = part(units, panels, panel) * kernel.block_step;
    return token < args.tokens ? token : args.tokens;
  };
  for_each_unit(threads, panels, [&](int64_t i) {
    const int64_t panel = panels - 1 - i;  // in the order of `cut`, so that a thread tends to find its own
    for (int64_t token = panel_start(panel), end = panel_start(panel + 1); token < end;) {
      const int64_t width = int8_block_width(end - token, kernel.block_tokens, kernel.block_step);
      kernel.quantize(args, token, width, quantized + token * row_bytes, x_scales);
      token += width;
    }
  });
  for_each_unit(threads, cut.pieces(), [&](int64_t i) {
    const auto [panel, pair0, pair1] = cut[i];
    const int64_t token0 = panel_start(panel), token1 = panel_start(panel + 1);
    void* scratch = sums_scratch().get(kernel.many_scratch_bytes(token1 - token0) + 64);
    kernel.many(args, scratch, quantized, x_scales, token0, token1, 2 * pair0, 2 * pair1 < tiles ? 2 * pair1 : tiles);
  });
}

}  // namespace

int int8_isa_count() {
  int count = 0;
  for (const Isa& isa : kIsas) count += isa.runs_here() ? 1 : 0;
  return count;
}

const char* int8_isa_name(int index) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && index-- == 0) return isa.name;
  }
  throw std::invalid_argument("no such instruction set");
}

const char* default_int8_isa() { return chosen_isa().name; }

const char* linear_int8(const LinearInt8Args& args, int threads, const char* isa, Family family) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const LinearInt8Kernel& kernel = *chosen.kernel;
  const bool few = family != Family::kMany && args.tokens <= kernel.few_tokens;
  const int64_t row_bytes = row_bytes_of(kernel, args);
  const int64_t fitting = (few || kPanelBytes / row_bytes > kPanelTokens ? kPanelTokens : kPanelBytes / row_bytes);
  const int64_t panel = up_to(fitting < 4 * kernel.block_tokens ? 4 * kernel.block_tokens : fitting, kernel.block_step);
  // Whole panels of tokens at a time, so that the quantized copy stays small whatever the batch.
  const int64_t panels = kSlabBytes / (panel * row_bytes);
  const int64_t slab = panel * (panels < threads ? (threads < 1 ? 1 : threads) : panels);
  for (int64_t token = 0; token < args.tokens; token += slab) {
    LinearInt8Args now = args;
    const int64_t item = args.dtype == DType::kFp32 ? 4 : 2;
    now.tokens = args.tokens - token < slab ? args.tokens - token : slab;
    now.x = static_cast<const char*>(args.x) + token * args.x_stride * item;
    now.y = static_cast<char*>(args.y) + token * args.y_stride * item;
    const int64_t room = now.tokens + kernel.block_tokens;
    auto* quantized = static_cast<uint8_t*>(
        quantized_scratch().get(static_cast<size_t>(room * (row_bytes + static_cast<int64_t>(sizeof(float))))));
    auto* x_scales = reinterpret_cast<float*>(quantized + room * row_bytes);
    const bool small = now.tokens * args.out_features * args.in_features / 2 < kAlone;
    const int used = threads < 1 || small ? 1 : threads;
    if (few) {
      run_few(kernel, now, used, quantized, x_scales);
    } else {
      run_many(kernel, now, used, quantized, x_scales, panel);
    }
  }
  return few ? chosen.few_name : chosen.many_name;
}

// ---- packing -------------------------------------------------------------------------------------------------------

namespace {

// Calls visit(row, group, values, metadata, shift) for every group: where its two values start, where the bytes of
// their places start, and how far up in these the places are.
template <class Visit>
void each_group(int64_t rows, int64_t groups, const Visit& visit) {
  const int64_t steps = (groups + 1) / 2, quads = (steps + kInt8Quad - 1) / kInt8Quad;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t tile = row / nm::kTileRows, r = row % nm::kTileRows;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t step = group / 2, first = group % 2 * nm::kKeep;
      visit(row, group, ((tile * steps + step) * nm::kTileRows + r) * 4 + first,
            ((tile * quads + step / kInt8Quad) * nm::kTileRows + r) * 4 + first, 2 * static_cast<int>(step % kInt8Quad));
    }
  }
}

}  // namespace

void pack_linear_int8(const int8_t* values, const uint8_t* metadata, int8_t* packed_values, uint8_t* packed_metadata,
                      int64_t out_features, int64_t in_features) {
  const int64_t groups = nm::groups_of(in_features), steps = (groups + 1) / 2;
  const int64_t cells = nm::tiles_of(out_features) * nm::kTileRows * 4;
  std::memset(packed_values, 0, static_cast<size_t>(cells * steps));
  std::memset(packed_metadata, 0, static_cast<size_t>(cells * ((steps + kInt8Quad - 1) / kInt8Quad)));
  const int64_t metadata_row = nm::metadata_row_bytes(in_features);
  each_group(out_features, groups, [&](int64_t row, int64_t group, int64_t value, int64_t place, int shift) {
    std::memcpy(packed_values + value, values + (row * groups + group) * 2, 2);
    const unsigned nibble = metadata[row * metadata_row + group / 2] >> (4 * (group % 2)) & 15u;
    packed_metadata[place] = static_cast<uint8_t>(packed_metadata[place] | nm::first_of(nibble) << shift);
    packed_metadata[place + 1] = static_cast<uint8_t>(packed_metadata[place + 1] | nm::second_of(nibble) << shift);
  });
}

void unpack_linear_int8(const int8_t* packed_values, const uint8_t* packed_metadata, int8_t* values,
                        uint8_t* metadata, int64_t out_features, int64_t in_features) {
  const int64_t groups = nm::groups_of(in_features), metadata_row = nm::metadata_row_bytes(in_features);
  std::memset(metadata, 0, static_cast<size_t>(out_features * metadata_row));
  each_group(out_features, groups, [&](int64_t row, int64_t group, int64_t value, int64_t place, int shift) {
    std::memcpy(values + (row * groups + group) * 2, packed_values + value, 2);
    const unsigned nibble = nm::nibble_of(packed_metadata[place] >> shift & 3u, packed_metadata[place + 1] >> shift & 3u);
    metadata[row * metadata_row + group / 2] |= static_cast<uint8_t>(nibble << (4 * (group % 2)));
  });
}

}  // namespace twofour::cpu
