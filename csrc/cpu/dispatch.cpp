// Chooses the instruction set and the kernel family, cuts the work and lends scratch memory.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/cut.h"
#include "cpu/features.h"
#include "cpu/linear.h"
#include "cpu/work.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

// ---- the table -----------------------------------------------------------------------------------------------------

struct Isa {
  const char* name;
  bool (*runs_here)();
  const LinearKernels* kernels;
  // The many-token kernel runs from this number of tokens on, by DType. Measured on Zen 5, for
  // AVX2 on Zen 4; for NEON counted in vector instructions, without a machine to measure on.
  int64_t many_from[kDTypes];
  const char* few_name;
  const char* many_name;
};

// Plainest first; the last one that runs here is the default.
constexpr Isa kIsas[] = {
    {"baseline", always, &linear_baseline, {3, 3, 3, 3, 3}, "baseline/few", "baseline/many"},
#if defined(TWOFOUR_X86)
    {"avx2", has_avx2, &linear_avx2, {12, 12, 12, 12, 12}, "avx2/few", "avx2/many"},
    {"avx512", has_avx512, &linear_avx512, {32, 32, 32, 32, 32}, "avx512/few", "avx512/many"},
    {"avx512bf16", has_avx512bf16, &linear_avx512bf16, {32, 48, 32, 32, 24}, "avx512bf16/few", "avx512bf16/many"},
#endif
#if defined(TWOFOUR_AARCH64)
    {"neon", always, &linear_neon, {5, 5, 5, 5, 5}, "neon/few", "neon/many"},
    {"neonbf16", has_neonbf16, &linear_neonbf16, {5, 8, 5, 5, 8}, "neonbf16/few", "neonbf16/many"},
#endif
};
// Those of every build: a name from here is not a misspelling, this machine lacks it.
constexpr const char* kIsasAnywhere[] = {"baseline", "avx2", "avx512", "avx512bf16", "neon", "neonbf16"};

// A block of the many-token kernel has sums for part of an L2 cache, 1024 rows of 96 tokens or 2048 of 48. Each panel reads the
// block's weights again, from the L3 cache if they stay there: if blocks of fewer rows, down to half as many, make that so,
// blocks have fewer. (Metadata left out, 5 MiB: 1024 rows of 4096 bf16. A Zen 5 with 4 MiB of L3 for each of eight cores
// kept 8 MB for one.) Still fewer rows would pack the panels too often.
constexpr int64_t kBlockSums = 384 << 10;
constexpr int64_t kBlockWeights = 5 << 20;
// Packing a panel takes the time of about six tiles.
constexpr int64_t kLeastTiles = 12;
// Below this many multiply-adds a call stays on its own thread: waking others costs a few microseconds.
constexpr int64_t kAlone = 1 << 18;

const Isa& find_isa(const std::string& name) {
  std::string known, here;
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs_here()) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa.name;
    if (isa.runs_here()) here += std::string(here.empty() ? "" : ", ") + isa.name;
  }
  for (const char* elsewhere : kIsasAnywhere) {
    if (name != elsewhere) continue;
    throw std::invalid_argument("instruction set '" + name + "' does not run on this machine; it has: " + here);
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown; this build has: " + known);
}

// Not cached on failure: the error must reach every caller, not only the first.
const Isa& chosen_isa() {
  static const Isa* chosen = [] {
    const char* asked = std::getenv("TWOFOUR_ISA");
    if (asked != nullptr && *asked != '\0') {
      try {
        return &find_isa(asked);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::string("TWOFOUR_ISA: ") + error.what());
      }
    }
    const Isa* best = &kIsas[0];
    for (const Isa& isa : kIsas) {
      if (isa.runs_here()) best = &isa;
    }
    return best;
  }();
  return *chosen;
}

// ---- scratch memory ------------------------------------------------------------------------------------------------

// What the calling thread prepares for all, and what each thread works in. Separate, because the caller does both.
Scratch& bias_scratch() {
  thread_local Scratch scratch;
  return scratch;
}
Scratch& scales_scratch() {
  thread_local Scratch scratch;
  return scratch;
}
Scratch& shared_scratch() {
  thread_local Scratch scratch;
  return scratch;
}
Scratch& own_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// The bias as fp32, in this order of rows (null: its own); null stays null. Likewise scales.
const float* arranged_in(Scratch& scratch, const void* bias, DType dtype, int64_t out_features, const uint8_t* order) {
  if (bias == nullptr) return nullptr;
  if (dtype != DType::kBf16 && order == nullptr) return static_cast<const float*>(bias);
  auto* arranged = static_cast<float*>(scratch.get(static_cast<size_t>(out_features) * sizeof(float)));
  for (int64_t i = 0; i < out_features; ++i) {
    const int64_t row = nm::row_of(order, i);
    uint32_t bits;
    if (dtype == DType::kBf16) {
      uint16_t item;
      std::memcpy(&item, static_cast<const char*>(bias) + row * static_cast<int64_t>(sizeof item), sizeof item);
      bits = static_cast<uint32_t>(item) << 16;
    } else {
      std::memcpy(&bits, static_cast<const char*>(bias) + row * static_cast<int64_t>(sizeof bits), sizeof bits);
    }
    std::memcpy(arranged + i, &bits, sizeof bits);
  }
  return arranged;
}

// ---- cutting the work ----------------------------------------------------------------------------------------------

void run_few(const LinearKernel& kernel, const LinearArgs& args, int threads) {
  void* prepared = shared_scratch().get(kernel.few_scratch_bytes(args));
  kernel.few_prepare(args, prepared);
  const int64_t tiles = nm::tiles_of(args.out_features);
  // A few long runs per thread: each is one stream of memory, and a slow thread leaves its last ones to others.
  const int64_t wanted = threads == 1 ? 1 : 4 * static_cast<int64_t>(threads);
  const int64_t units = wanted < tiles ? wanted : tiles;
  for_each_unit(threads, units, [&](int64_t i) {
    kernel.few(args, prepared, part(tiles, units, i), part(tiles, units, i + 1));
  });
}

void run_many(const LinearKernel& kernel, const LinearArgs& args, int threads) {
  const int64_t tiles = nm::tiles_of(args.out_features);
  const int64_t vectors = (args.tokens + kernel.lanes - 1) / kernel.lanes;
  const int64_t panel_vectors = kernel.panel_tokens / kernel.lanes;
  const int64_t panels = (vectors + panel_vectors - 1) / panel_vectors;
  const int64_t tile_bytes = static_cast<int64_t>(sizeof(float)) * nm::kTileRows * kernel.panel_tokens;
  const int64_t held = args.order == nullptr ? 1 : nm::kWindowTiles;  // tiles that only one thread may hold
  const int64_t rows = (tiles + held - 1) / held;  // of the cut
  const int64_t for_sums = (tiles * tile_bytes + kBlockSums - 1) / kBlockSums;
  const int64_t weights = args.out_features * args.in_features / 2 * kernel.weight_bytes;
  const int64_t for_weights = panels == 1 ? 1 : (weights + kBlockWeights - 1) / kBlockWeights;
  const int64_t wanted = for_weights > for_sums && for_weights <= 2 * for_sums ? for_weights : for_sums;
  const Cut cut(panels, rows, wanted, (kLeastTiles + held - 1) / held, threads);
  const int panel_bytes = l1_bytes() * kernel.panel_percent / 100 / 64 * 64;
  const auto first_token = [&](int64_t panel) {
    const int64_t token = part(vectors, panels, panel) * kernel.lanes;
    return token < args.tokens ? token : args.tokens;
  };
  for_each_unit(threads, cut.pieces(), [&](int64_t i) {
    const Cut::Piece piece = cut[i];
    const int64_t token0 = first_token(piece.panel), token1 = first_token(piece.panel + 1);
    const int64_t next_token = i + threads < cut.pieces() ? first_token(cut[i + threads].panel) : args.tokens;
    const int64_t tile0 = piece.row0 * held, tile1 = piece.row1 * held < tiles ? piece.row1 * held : tiles;
    void* scratch = own_scratch().get(kernel.many_scratch_bytes(panel_bytes, tile1 - tile0));
    kernel.many(args, scratch, panel_bytes, token0, static_cast<int>(token1 - token0), tile0, tile1, next_token);
  });
}

}  // namespace

const char* default_isa() { return chosen_isa().name; }

int isa_count() {
  int count = 0;
  for (const Isa& isa : kIsas) count += isa.runs_here() ? 1 : 0;
  return count;
}

const char* isa_name(int index) {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && index-- == 0) return isa.name;
  }
  throw std::invalid_argument("no such instruction set");
}

const char* linear(LinearArgs args, DType dtype, const void* bias, DType bias_dtype, int threads, const char* isa,
                   Family family) {
  const Isa& chosen = isa == nullptr ? chosen_isa() : find_isa(isa);
  const LinearKernel& kernel = chosen.kernels->of(dtype);
  const bool many = family == Family::kAuto ? args.tokens >= chosen.many_from[static_cast<int>(dtype)]
                                            : family == Family::kMany;
  if (args.tokens > 0) {
    // Kernels of many tokens write rows in their own order, those of few add the bias where the sums lie.
    const uint8_t* order = many ? nullptr : args.order;
    args.bias = arranged_in(bias_scratch(), bias, bias_dtype, args.out_features, order);
    args.scales = arranged_in(scales_scratch(), args.scales, DType::kFp32, args.out_features, order);
    const bool small = args.tokens * args.out_features * args.in_features / 2 < kAlone;
    const int used = threads < 1 || small ? 1 : threads;
    (many ? run_many : run_few)(kernel, args, used);
  }
  return many ? chosen.many_name : chosen.few_name;
}

}  // namespace twofour::cpu
