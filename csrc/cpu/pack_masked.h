// Dense weights and their mask -> the CPU layout (nm/layout.h) of W, and of W.T, in one pass: what training packs after
// each step. Exact bits, any item of 2 or 4 bytes.
#pragma once

#include <cstdint>

namespace twofour::cpu {

struct MaskedPackArgs {
  const void* weight;   // [out_features, in_features], rows `stride` elements apart
  const uint8_t* mask;  // [out_features, in_features] bytes, 0 or 1, without gaps: two kept in each four of a row
  void* values;         // of W: tiles * groups * 32 items
  uint8_t* metadata;    // of W: tiles * groups * 8 bytes
  // Of W.T, whose groups are four neighbours of a column; null where only W is packed. Needs two kept in each, and
  // out_features a multiple of 4.
  void* turned_values;
  uint8_t* turned_metadata;
  int64_t out_features;
  int64_t in_features;
  int64_t stride;
  int itemsize;
};

// False where a group does not keep two: what was written then means nothing. `isa` null takes the best that runs here.
bool pack_masked(const MaskedPackArgs& args, int threads, const char* isa);

int pack_masked_isa_count();
const char* pack_masked_isa_name(int index);

// ---- for the files of one instruction set --------------------------------------------------------------------------

// kTileRows rows and `columns` columns that lie wholly inside W, at `row` and `column`, multiples of kTileRows; [0] takes
// 2 bytes, [1] takes 4.
struct PackMaskedKernels {
  bool (*strip[2])(const MaskedPackArgs& args, int64_t row, int64_t column);
  int columns[2];  // multiples of kTileRows
};

extern const PackMaskedKernels pack_masked_avx512;

}  // namespace twofour::cpu
