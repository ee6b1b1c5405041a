// Chooses the instruction set of the gradient kernels, cuts their work and lends them memory.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/cut.h"
#include "cpu/grad.h"
#include "cpu/work.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

struct GradIsa {
  const char* name;
  const GradKernels* kernels;
  const char* input_name;
  const char* values_name;
};

constexpr GradIsa kGradIsas[] = {
    {"baseline", &grad_baseline, "baseline/grad_input", "baseline/grad_values"},
#if defined(TWOFOUR_X86)
    {"avx2", &grad_avx2, "avx2/grad_input", "avx2/grad_values"},
    {"avx512", &grad_avx512, "avx512/grad_input", "avx512/grad_values"},
    {"avx512bf16", &grad_avx512bf16, "avx512bf16/grad_input", "avx512bf16/grad_values"},
#endif
};

const GradIsa& chosen(const char* isa) {
  const char* name = isa == nullptr ? default_isa() : isa;
  std::string here;
  for (int i = 0; i < isa_count(); ++i) {
    here += std::string(i == 0 ? "" : ", ") + isa_name(i);
    if (std::strcmp(name, isa_name(i)) != 0) continue;
    for (const GradIsa& each : kGradIsas) {
      if (std::strcmp(name, each.name) == 0) return each;
    }
    return kGradIsas[0];  // no kernels of its own: those of any machine
  }
  throw std::invalid_argument("instruction set '" + std::string(name) + "' does not run here; this machine has: " + here);
}

const GradKernel& kernel_of(const GradIsa& isa, DType dtype) {
  return dtype == DType::kFp32 ? isa.kernels->fp32 : isa.kernels->bf16;
}

// Below this many multiply-adds a call stays on its own thread: waking others costs a few microseconds.
constexpr int64_t kAlone = 1 << 18;
// Columns of a block of the input gradient: 1024 of 96 sums in fp32 are 384 KiB of an L2 cache.
constexpr int64_t kBlockGroups = 256;
constexpr int64_t kLeastFours = 12;  // for which it is worth packing a panel again
// Groups whose weights one unit sorts.
constexpr int64_t kSortGroups = 64;
// Rows of a block of the values' gradient: 128 rows of tokens of about 3 KiB are 384 KiB of an L2 cache.
constexpr int64_t kBlockTiles = 8;
constexpr int64_t kLeastTiles = 2;
constexpr int kPanelPercent = 65;   // of the L1 cache for the packed gradient
constexpr int kColumnsPercent = 72; // of the L1 cache for the transposed x

int used_threads(int threads, int64_t tokens, int64_t out_features, int64_t in_features) {
  return threads < 1 || tokens * out_features * in_features / 2 < kAlone ? 1 : threads;
}

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

Scratch& shared_memory() {
  thread_local Scratch memory;
  return memory;
}
Scratch& own_memory() {
  thread_local Scratch memory;
  return memory;
}

}  // namespace

const char* grad_input(const GradInputArgs& args, DType dtype, int threads, const char* isa) {
  const GradIsa& of = chosen(isa);
  if (args.tokens == 0) return of.input_name;
  const GradKernel& kernel = kernel_of(of, dtype);
  threads = used_threads(threads, args.tokens, args.out_features, args.in_features);
  const int64_t groups = nm::groups_of(args.in_features);
  const int64_t all_rows = nm::tiles_of(args.out_features) * nm::kTileRows;

  int64_t chunk_rows = l1_bytes() * kPanelPercent / 100 / kernel.panel_row_bytes / nm::kTileRows * nm::kTileRows;
  if (chunk_rows < nm::kTileRows) chunk_rows = nm::kTileRows;
  if (chunk_rows > 240) chunk_rows = 240;  // the number of a row, or one behind, is a byte
  if (chunk_rows > all_rows) chunk_rows = all_rows;
  const int rows = static_cast<int>(chunk_rows);
  const int64_t chunks = (all_rows + rows - 1) / rows;

  void* const sorted = shared_memory().get(static_cast<size_t>(chunks * groups) * kernel.cell_bytes(rows));
  const int64_t parts = (groups + kSortGroups - 1) / kSortGroups;
  for_each_unit(threads, parts, [&](int64_t i) {
    kernel.sort(args, rows, sorted, part(groups, parts, i), part(groups, parts, i + 1));
  });

  const int64_t vectors = (args.tokens + kernel.step_tokens - 1) / kernel.step_tokens;
  const int64_t panel_vectors = kernel.panel_tokens / kernel.step_tokens;
  const int64_t panels = (vectors + panel_vectors - 1) / panel_vectors;
  const int64_t fours = (groups + 3) / 4;  // blocks of whole 16 columns
  const Cut cut(panels, fours, (groups + kBlockGroups - 1) / kBlockGroups, kLeastFours, threads);
  for_each_unit(threads, cut.pieces(), [&](int64_t i) {
    const Cut::Piece piece = cut[i];
    const int64_t token0 = part(vectors, panels, piece.panel) * kernel.step_tokens;
    const int64_t end = part(vectors, panels, piece.panel + 1) * kernel.step_tokens;
    const int64_t token1 = end < args.tokens ? end : args.tokens;
    const int64_t group0 = piece.row0 * 4, group1 = piece.row1 * 4 < groups ? piece.row1 * 4 : groups;
    void* scratch = own_memory().get(kernel.input_scratch_bytes(rows, group1 - group0));
    kernel.input(args, rows, sorted, scratch, token0, static_cast<int>(token1 - token0), group0, group1);
  });
  return of.input_name;
}

const char* grad_values(const GradValuesArgs& args, DType dtype, int threads, const char* isa) {
  const GradIsa& of = chosen(isa);
  const GradKernel& kernel = kernel_of(of, dtype);
  const int64_t size = dtype == DType::kFp32 ? 4 : 2;
  const int64_t tiles = nm::tiles_of(args.out_features), groups = nm::groups_of(args.in_features);
  const int64_t slots = tiles * groups * nm::kTileRows * nm::kKeep;
  if (args.tokens == 0) {
    std::memset(args.grad_values, 0, static_cast<size_t>(slots * size));
    return of.values_name;
  }
  threads = used_threads(threads, args.tokens, args.out_features, args.in_features);

  // Chunks of tokens whose transposed x of a block of groups stays in the L1 cache.
  constexpr int64_t kLine = 64;
  const int64_t vector_bytes = kernel.vector_bytes;
  const int64_t columns = kernel.block_groups * nm::kGroup;
  const int64_t fitting = l1_bytes() * kColumnsPercent / 100 / columns / kLine * kLine;
  const int64_t vectors = (args.tokens + kernel.tokens_per_vector - 1) / kernel.tokens_per_vector;
  const int64_t chunks = (vectors * vector_bytes + fitting - 1) / fitting;
  // An odd number of lines: rows a power of two apart would share the same few cache sets.
  const int64_t longest = (vectors + chunks - 1) / chunks * vector_bytes;
  const int64_t pitch = (rounded_up(longest, kLine) / kLine | 1) * kLine;

  char* const x_rows =
      static_cast<char*>(shared_memory().get(static_cast<size_t>(pitch * (args.in_features + args.out_features + 1))));
  char* const grad_rows = x_rows + pitch * args.in_features;
  const bool own_sums = dtype == DType::kBf16 && chunks > 1;
  const CallMemory sums_memory(own_sums ? static_cast<size_t>(slots) * sizeof(float) : 0);
  float* const sums = static_cast<float*>(dtype == DType::kFp32 ? args.grad_values : own_sums ? sums_memory.get() : nullptr);

  const Cut cut(1, tiles, (tiles + kBlockTiles - 1) / kBlockTiles, kLeastTiles, threads);
  const int64_t x_parts = (args.in_features + 255) / 256, grad_parts = (args.out_features + 255) / 256;
  const auto turned = [&](auto transpose, const void* from, int64_t stride, int64_t token0, int64_t tokens, int64_t all,
                          int64_t part, char* rows) {
    const int64_t column = part * 256, count = all - column < 256 ? all - column : 256;
    const char* start = static_cast<const char*>(from) + (token0 * stride + column) * size;
    transpose(start, stride, tokens, count, rows + column * pitch, pitch);
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t vector0 = part(vectors, chunks, chunk), vector1 = part(vectors, chunks, chunk + 1);
    const int64_t token0 = vector0 * kernel.tokens_per_vector, end = vector1 * kernel.tokens_per_vector;
    const int64_t tokens = (end < args.tokens ? end : args.tokens) - token0;
    for_each_unit(threads, x_parts + grad_parts, [&](int64_t i) {
      if (i < x_parts) {
        turned(kernel.transpose_x, args.x, args.x_stride, token0, tokens, args.in_features, i, x_rows);
      } else {
        turned(kernel.transpose_grad, args.grad, args.grad_stride, token0, tokens, args.out_features, i - x_parts, grad_rows);
      }
    });
    for_each_unit(threads, cut.pieces(), [&](int64_t i) {
      kernel.values(args, x_rows, grad_rows, pitch, (vector1 - vector0) * vector_bytes, sums, chunk == 0,
                    chunk + 1 == chunks, cut[i].row0, cut[i].row1);
    });
  }
  return of.values_name;
}

}  // namespace twofour::cpu
