// Which weights survive, chosen for a matrix of scores. The masks of src/twofour/masks/*.py, which is the specification:
// the same bits on every instruction set, for any number of threads, whatever the scores.
//
// A mask is [rows, columns] bytes, 0 or 1, without gaps between rows. Nothing outside the arrays is read or written.
#pragma once

#include <cstdint>

namespace twofour::cpu {

enum class ScoreType { kFp32, kFp64, kBf16 };

struct MaskArgs {
  const void* scores;  // [rows, columns] of `type`, rows `stride` elements apart
  uint8_t* mask;
  ScoreType type;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  bool magnitude = false;  // ranks |score|
};

// The best mask with two kept in every row and column of each 4x4 block. rows and columns are multiples of 4.
//
// The 90 masks of a block split into 19 kinds by how many places of each column the upper two rows keep. A half with
// the sum ((x + y) + (z + w)), each pair in column order, is chosen for every kind and either half, then the kind whose
// two halves have the largest sum. All sums are in double, or exact. Equal sums: in a half the one, then of the kinds the one,
// whose kept places come first in row order. Returns what ran, as "isa".
const char* transposable_2_4(const MaskArgs& args, int threads, const char* isa);

// The best mask with `keep` kept in every row and column of each block of size x size, size 2 .. 32, proven: scores are
// rounded to 2^-54 of the largest |score| of their block, and of those no other mask has a larger sum. NaN count below
// everything, infinities before numbers. Of equal sums any: the same one everywhere (masks_solver.cpp).
void transposable_blocks(const MaskArgs& args, int keep, int size, int threads);

struct GroupArgs {
  const void* scores;  // [rows, columns] of `type`, rows `stride` elements apart
  uint8_t* mask;       // or null
  void* kept;          // [rows, columns] of `type` or null: the scores where they are kept, 0 elsewhere; may be `scores`
  ScoreType type;
  int64_t rows;     // a multiple of `shared`
  int64_t columns;  // a multiple of `group`
  int64_t stride;
  int64_t kept_stride;
  int keep;
  int group;       // 2 .. 32 neighbours in a row
  int64_t shared;  // so many neighbouring rows have one mask, chosen by the sums of their scores, row after row, in double
  bool magnitude;  // ranks |score|
};

// The `keep` best of each group. Equal scores keep the lower index, NaN ranks below every number, -0.0 equals 0.0.
const char* best_of_groups(const GroupArgs& args, int threads, const char* isa);

struct SoftArgs {
  const void* weight;  // [rows, columns] of fp32 or bf16, rows `stride` elements apart; columns a multiple of 4
  float* soft;         // [rows, columns] without gaps
  ScoreType type;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  double scale;  // of what is written
};

// The soft threshold of "2:4": what is left of each |w| above the second smallest of its four. NaN make their group NaN.
void soft_2_4(const SoftArgs& args, int threads, const char* isa);

// The soft threshold of "2:4t", rows a multiple of 4: sign(w) * min(|w|, best sum of |w| of all masks - best of those without the place), sums in
// double, rounded once. NaN and infinities make their block NaN.
void soft_2_4t(const SoftArgs& args, int threads, const char* isa);

// Places where two masks of `count` bytes, 0 or 1, differ.
int64_t count_differences(const uint8_t* one, const uint8_t* other, int64_t count, int threads);

int masks_isa_count();
const char* masks_isa_name(int index);
const char* default_masks_isa();

// ---- for the files of one instruction set --------------------------------------------------------------------------

// A mask of a 4x4 block as bits: row 0, column 0 is the highest of 16. Of two masks the one whose kept places come
// first in row order is the larger number. Takes any scores: NaN count below everything, infinities before numbers, and
// a block with numbers beyond kLargestPlain is divided by 16 first.
uint32_t transposable_2_4_of_any(const double (&block)[16]);

constexpr double kLargestPlain = 0x1p1019;

// Pure workers, called from several threads at once; [0] takes fp32 scores, [1] fp64, [2] bf16.
struct MaskKernels {
  void (*transposable_2_4[3])(const MaskArgs& args, int64_t band0, int64_t band1);  // bands of four rows
  void (*soft_2_4[3])(const SoftArgs& args, int64_t row0, int64_t row1);     // [1] is null
  void (*soft_2_4t[3])(const SoftArgs& args, int64_t band0, int64_t band1);  // [1] is null
  void (*best_of_groups[2])(const GroupArgs& args, int64_t band0, int64_t band1);   // bands of `shared` rows
};

extern const MaskKernels masks_baseline;
extern const MaskKernels masks_avx2;
extern const MaskKernels masks_avx512;

}  // namespace twofour::cpu
