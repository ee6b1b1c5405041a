// Dense matrices to and from the CUDA layout (cuda/layout.h). All of them are bound by memory.
//
//   prune_both_*   |W| -> the best transposable mask -> W and W.T packed, and the mask if asked for: one reading of W
//   mask_both_*    |W| -> the best transposable mask alone, of 4-byte items too
//   keep_both_*    W under a given mask -> W and W.T packed, and W masked in place if asked for: a training step
//   prune_*        |W| -> two of each four -> packed
//   quantize_*     |W| -> two of each four -> e4m3 with a scale for each row -> packed
//   compress_*     W that keeps two of each four already -> packed; tells where it does not
//   take_*         W where packed metadata keep it -> values: what is kept of a gradient, or of weights after a step
//   expand_*       packed -> W
//
// Sizes are multiples of 4 along groups; whatever the layout pads is written too. Rows are `stride` items apart. 16 bytes
// are read at a time where addresses allow it, and items one by one where not.
#include "cuda/best_mask.h"
#include "cuda/layout.h"
#include "cuda/ptx.h"

namespace twofour::cuda {

// Nibbles by the four bits of a group, its first place the highest.
constexpr uint64_t make_nibbles_of_bits() {
  uint64_t table = 0;
  for (int first = 0; first < 4; ++first) {
    for (int second = first + 1; second < 4; ++second) {
      table |= static_cast<uint64_t>(first | second << 2) << (4 * (8 >> first | 8 >> second));
    }
  }
  return table;
}

TWOFOUR_DEVICE uint32_t nibble_of_bits(uint32_t bits) {
  constexpr uint64_t table = make_nibbles_of_bits();
  return static_cast<uint32_t>(table >> (4 * bits)) & 15u;
}

TWOFOUR_DEVICE bool keeps_two(uint32_t bits) { return (0x1668u >> bits & 1u) != 0; }

// Of the sixteen bits of a 4x4 block.
TWOFOUR_DEVICE uint32_t column_of(uint32_t bits, int column) {
  return ((bits >> (3 - column) & 0x1111u) * 0x1248u >> 12) & 15u;
}

// The two items that a nibble keeps of four of 2 bytes, in two words.
TWOFOUR_DEVICE uint32_t kept_of_two_bytes(uint2 four, uint32_t nibble) {
  const uint32_t low = (nibble & 3u) * 0x22 + 0x10, high = (nibble >> 2) * 0x22 + 0x10;
  return byte_permute(four.x, four.y, low | high << 8);
}

// Four items of 1 byte in a word -> the two kept, in the lower half.
TWOFOUR_DEVICE uint32_t kept_of_one_byte(uint32_t four, uint32_t nibble) {
  return byte_permute(four, 0, (nibble & 3u) | (nibble >> 2) << 4 | 0x4400u);
}

// ---- W and W.T at once -----------------------------------------------------------------------------------------------

constexpr int kSquare = 64;          // a block packs a square of W
constexpr int kSquareStride = 80;    // items from row to row in shared memory: 8 rows of a fragment lie in 8 banks' worth
constexpr int kSquareBlocks = kSquare / 4;
constexpr int kBothThreads = kSquareBlocks * kSquareBlocks;

struct Square {
  alignas(16) uint16_t items[kSquare * kSquareStride];  // four are read and written at once
  uint16_t row_nibbles[kSquareBlocks][kSquareBlocks];     // of the 4x4 block: row r from bit 4 * r
  uint16_t column_nibbles[kSquareBlocks][kSquareBlocks];  // column c from bit 4 * c
};

TWOFOUR_DEVICE void magnitudes_of(uint2 four, uint32_t* to) {
  to[0] = four.x & 0x7fffu;
  to[1] = four.x >> 16 & 0x7fffu;
  to[2] = four.y & 0x7fffu;
  to[3] = four.y >> 16 & 0x7fffu;
}
TWOFOUR_DEVICE void magnitudes_of(uint4 four, uint32_t* to) {
  to[0] = four.x & 0x7fffffffu;
  to[1] = four.y & 0x7fffffffu;
  to[2] = four.z & 0x7fffffffu;
  to[3] = four.w & 0x7fffffffu;
}

// The bits of a 4x4 block as bytes, at its first place in a mask.
TWOFOUR_DEVICE void write_mask(uint32_t bits, uint8_t* to, int64_t columns) {
  unroll<4>([&](auto k) {  // the first column first
    const uint32_t four = bits >> (12 - 4 * k) & 15u;
    const uint32_t bytes = (four >> 3 & 1u) | (four >> 2 & 1u) << 8 | (four >> 1 & 1u) << 16 | (four & 1u) << 24;
    store_four(to + k * columns, bytes);
  });
}

// Sixteen bits of a 4x4 block, the first place of the first row the highest.
template <class Format>
struct BestMask {
  static constexpr bool kInPlace = false;
  uint8_t* mask;  // [rows, columns] where it is written, or null

  TWOFOUR_DEVICE uint32_t choose(const uint2 (&fours)[4], int64_t row, int64_t column, int64_t columns) const {
    uint32_t magnitudes[16];
    unroll<4>([&](auto r) { magnitudes_of(fours[r], magnitudes + 4 * r); });
    const uint32_t bits = best_mask<Format>(magnitudes);
    if (mask != nullptr) write_mask(bits, mask + row * columns + column, columns);
    return bits;
  }
};

struct GivenMask {
  static constexpr bool kInPlace = true;  // may be: the weight is not constant
  const uint8_t* mask;  // [rows, columns] of 0 and 1
  uint16_t* masked;     // the weight itself, where dropped places are to become zeros, or null
  int64_t stride;
  uint32_t* status;     // 1 is set where four places of a row or column do not keep two; or null

  TWOFOUR_DEVICE uint32_t choose(const uint2 (&fours)[4], int64_t row, int64_t column, int64_t columns) const {
    uint32_t bits = 0, wrong = 0;
    unroll<4>([&](auto k) {
      const uint32_t bytes = load_four(mask + (row + k) * columns + column);
      const uint32_t four = bytes * 0x08040201u >> 24 & 15u;
      bits |= four << (12 - 4 * k);
      wrong |= !keeps_two(four);
      if (masked == nullptr) return;
      const uint32_t low = (bytes & 1u) * 0xffffu | (bytes >> 8 & 1u) * 0xffff0000u;
      const uint32_t high = (bytes >> 16 & 1u) * 0xffffu | (bytes >> 24 & 1u) * 0xffff0000u;
      store_four(masked + (row + k) * stride + column, uint2{fours[k].x & low, fours[k].y & high});
    });
    unroll<4>([&](auto k) { wrong |= !keeps_two(column_of(bits, k)); });
    if (wrong != 0 && status != nullptr) or_into(status, 1u);
    return bits;
  }
};

template <class Mask>
TWOFOUR_DEVICE void pack_both(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values,
                              uint32_t* metadata, uint4* turned_values, uint32_t* turned_metadata, const Mask& mask) {
  TWOFOUR_SHARED Square square;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row0 = int64_t{blockIdx.y} * kSquare, column0 = int64_t{blockIdx.x} * kSquare;
  {  // a thread chooses the mask of a 4x4 block
    const int i = thread / kSquareBlocks, j = thread % kSquareBlocks;
    const int64_t row = row0 + 4 * i, column = column0 + 4 * j;
    const bool inside = row < rows && column < columns;
    uint2 fours[4];
    unroll<4>([&](auto r) {
      const uint16_t* const from = weight + (row + r) * stride + column;
      fours[r] = !inside ? uint2{0, 0} : Mask::kInPlace ? load_four_of_own(from) : load_four(from);
      *reinterpret_cast<uint2*>(square.items + (4 * i + r) * kSquareStride + 4 * j) = fours[r];
    });
    uint32_t of_rows = kPaddingNibble * 0x1111, of_columns = of_rows;
    if (inside) {
      const uint32_t bits = mask.choose(fours, row, column, columns);
      of_rows = of_columns = 0;
      unroll<4>([&](auto k) {
        of_rows |= nibble_of_bits(bits >> (12 - 4 * k) & 15u) << (4 * k);
        of_columns |= nibble_of_bits(column_of(bits, k)) << (4 * k);
      });
    }
    square.row_nibbles[i][j] = static_cast<uint16_t>(of_rows);
    square.column_nibbles[i][j] = static_cast<uint16_t>(of_columns);
  }
  sync_block();
  {  // a lane of a fragment of W, and of one of W.T
    const int lane = thread % kWarp, step = thread / kWarp % 2, tile = thread / (2 * kWarp);
    uint32_t own[4], turned[4];
    unroll<4>([&](auto r) {
      const int line = kTile * tile + row_of(lane, r), group = group_of(2, lane, step, r);
      const uint2 four = *reinterpret_cast<const uint2*>(square.items + line * kSquareStride + 4 * group);
      own[r] = kept_of_two_bytes(four, square.row_nibbles[line / 4][group] >> (4 * (line % 4)) & 15u);
      const uint32_t nibble = square.column_nibbles[group][line / 4] >> (4 * (line % 4)) & 15u;
      const uint16_t* column = square.items + 4 * group * kSquareStride + line;
      turned[r] = column[(nibble & 3u) * kSquareStride] | uint32_t{column[(nibble >> 2) * kSquareStride]} << 16;
    });
    const int64_t own_tile = row0 / kTile + tile, turned_tile = column0 / kTile + tile;
    if (own_tile < tiles_of(rows)) {
      const int64_t chunk = own_tile * chunks_of(columns) + blockIdx.x;
      values[(chunk * 2 + step) * kWarp + lane] = uint4{own[0], own[1], own[2], own[3]};
    }
    if (turned_tile < tiles_of(columns)) {
      const int64_t chunk = turned_tile * chunks_of(rows) + blockIdx.y;
      turned_values[(chunk * 2 + step) * kWarp + lane] = uint4{turned[0], turned[1], turned[2], turned[3]};
    }
  }
  {  // a word of the metadata of W, or of W.T
    const int lane = thread % kWarp, tile = thread / kWarp % 4;
    const bool of_turned = thread >= 4 * kWarp;
    uint32_t word = 0;
    unroll<8>([&](auto i) {
      const int line = kTile * tile + nibble_row(2, lane, i), group = nibble_group(2, lane, i);
      const uint32_t four = of_turned ? square.column_nibbles[group][line / 4] : square.row_nibbles[line / 4][group];
      word |= (four >> (4 * (line % 4)) & 15u) << (4 * i);
    });
    const int64_t first = (of_turned ? column0 : row0) / kTile + tile;
    if (first < tiles_of(of_turned ? columns : rows)) {
      const int64_t chunk = of_turned ? first * chunks_of(rows) + blockIdx.y : first * chunks_of(columns) + blockIdx.x;
      (of_turned ? turned_metadata : metadata)[chunk * kWarp + lane] = word;
    }
  }
}

#define TWOFOUR_PRUNE_BOTH(name, Format)                                                                               \
  TWOFOUR_KERNEL(kBothThreads, 3)                                                                                          \
  name(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,        \
       uint4* turned_values, uint32_t* turned_metadata, uint8_t* mask) {                                                \
    pack_both(weight, stride, rows, columns, values, metadata, turned_values, turned_metadata, BestMask<Format>{mask}); \
  }
// Four blocks at once would leave a thread 64 registers, a few short on sm_120.
TWOFOUR_PRUNE_BOTH(prune_both_bf16, Bfloat16)
TWOFOUR_PRUNE_BOTH(prune_both_fp16, Float16)

TWOFOUR_KERNEL(kBothThreads, 4)
keep_both_half(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,
               uint4* turned_values, uint32_t* turned_metadata, const uint8_t* mask, uint16_t* masked, uint32_t* status) {
  pack_both(weight, stride, rows, columns, values, metadata, turned_values, turned_metadata,
            GivenMask{mask, masked, stride, status});
}

// ---- the mask alone: a thread chooses for a 4x4 block ----------------------------------------------------------------

template <class Format, class Item>
TWOFOUR_DEVICE void mask_both(const Item* weight, int64_t stride, int64_t rows, int64_t columns, uint8_t* mask) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = int64_t{blockIdx.y} * kSquare + 4 * (thread / kSquareBlocks);
  const int64_t column = int64_t{blockIdx.x} * kSquare + 4 * (thread % kSquareBlocks);
  if (row >= rows || column >= columns) return;
  uint32_t magnitudes[16];
  unroll<4>([&](auto r) { magnitudes_of(load_four(weight + (row + r) * stride + column), magnitudes + 4 * r); });
  write_mask(best_mask<Format>(magnitudes), mask + row * columns + column, columns);
}

#define TWOFOUR_MASK_BOTH(name, Format, Item)                                                                         \
  TWOFOUR_KERNEL(kBothThreads, 3)                                                                                     \
  name(const Item* weight, int64_t stride, int64_t rows, int64_t columns, uint8_t* mask) {                            \
    mask_both<Format>(weight, stride, rows, columns, mask);                                                           \
  }
TWOFOUR_MASK_BOTH(mask_both_bf16, Bfloat16, uint16_t)
TWOFOUR_MASK_BOTH(mask_both_fp16, Float16, uint16_t)
TWOFOUR_MASK_BOTH(mask_both_fp32, Float32, float)

// ---- one way: a warp packs the chunks of a tile ----------------------------------------------------------------------

constexpr int kWarpsOfBlock = 8;
constexpr int kOneWayThreads = kWarp * kWarpsOfBlock;

// The nibble of the two places with the largest keys, the lower place where keys are equal.
TWOFOUR_DEVICE uint32_t two_largest(uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3) {
  // A place is kept where fewer than two are before it.
  const uint32_t b01 = k0 >= k1, b02 = k0 >= k2, b03 = k0 >= k3, b12 = k1 >= k2, b13 = k1 >= k3, b23 = k2 >= k3;
  const uint32_t kept0 = b01 + b02 + b03 >= 2, kept1 = (1 - b01) + b12 + b13 >= 2, kept2 = (1 - b02) + (1 - b12) + b23 >= 2;
  const uint32_t kept3 = 1 - ((kept0 + kept1 + kept2) >> 1);
  return nibble_of_bits(kept0 << 3 | kept1 << 2 | kept2 << 1 | kept3);
}

// Ranks |x|: NaN, as its bits lie above those of infinity, below every number.
template <class Format>
struct ByMagnitude {
  static constexpr int kItemsize = 2;
  TWOFOUR_DEVICE static uint32_t key(uint32_t item) {
    const uint32_t magnitude = item & 0x7fffu;
    return magnitude > Scores<Format>::kInfinity ? 0 : magnitude + 1;
  }
};

// The same of 1-byte floats: e4m3 has no infinity, and NaN is 0x7f.
template <uint32_t kLargest>
struct ByFp8Magnitude {
  static constexpr int kItemsize = 1;
  TWOFOUR_DEVICE static uint32_t key(uint32_t item) {
    const uint32_t magnitude = item & 0x7fu;
    return magnitude > kLargest ? 0 : magnitude + 1;
  }
};

struct ByInt8Magnitude {
  static constexpr int kItemsize = 1;
  TWOFOUR_DEVICE static uint32_t key(uint32_t item) { return item < 128 ? item : 256 - item; }
};

// Ranks what is no zero, of either sign, above zero.
template <int kBytes, uint32_t kMagnitude>
struct ByNonzero {
  static constexpr int kItemsize = kBytes;
  TWOFOUR_DEVICE static uint32_t key(uint32_t item) { return (item & kMagnitude) != 0; }
};

// Nibble of four items; `over` is set where more than two have a key of 1 or more.
template <class Key>
TWOFOUR_DEVICE uint32_t choose(uint2 four, uint32_t& over) {
  constexpr int bits = 8 * Key::kItemsize;
  constexpr uint32_t all = (1u << bits) - 1;
  const uint32_t k0 = Key::key(four.x & all), k1 = Key::key(four.x >> bits & all);
  const uint32_t high = Key::kItemsize == 2 ? four.y : four.x >> 16;
  const uint32_t k2 = Key::key(high & all), k3 = Key::key(high >> bits & all);
  over |= (k0 != 0) + (k1 != 0) + (k2 != 0) + (k3 != 0) > 2;
  return two_largest(k0, k1, k2, k3);
}

// Four items, of 1 byte all in x; zeros outside.
template <int kItemsize>
TWOFOUR_DEVICE uint2 load_group(const void* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t row,
                                int64_t column) {
  if (row >= rows || column >= columns) return uint2{0, 0};
  if constexpr (kItemsize == 2) {
    return load_four(static_cast<const uint16_t*>(matrix) + row * stride + column);
  } else {
    return uint2{load_four(static_cast<const uint8_t*>(matrix) + row * stride + column), 0};
  }
}

// Which group a lane's part i of a fragment is: 4 of 2 bytes (a register each), 8 of 1 byte (half a register each).
template <int kItemsize>
struct Parts {
  static constexpr int kCount = kItemsize == 2 ? 4 : 8;
  TWOFOUR_DEVICE static int row(int lane, int i) { return row_of(lane, kItemsize == 2 ? i : i / 2); }
  TWOFOUR_DEVICE static int group(int lane, int step, int i) {
    return kItemsize == 2 ? group_of(2, lane, step, i) : group_of(1, lane, step, i / 2) + i % 2;
  }
  TWOFOUR_DEVICE static uint32_t kept(uint2 four, uint32_t nibble) {
    return kItemsize == 2 ? kept_of_two_bytes(four, nibble) : kept_of_one_byte(four.x, nibble);
  }
  // Adds what part i keeps to the registers.
  TWOFOUR_DEVICE static void put(uint32_t (&registers)[4], int i, uint32_t two) {
    if (kItemsize == 2) {
      registers[i] = two;
    } else {
      registers[i / 2] |= two << (16 * (i % 2));
    }
  }
  TWOFOUR_DEVICE static uint32_t get(const uint32_t (&registers)[4], int i) {
    return kItemsize == 2 ? registers[i] : registers[i / 2] >> (16 * (i % 2)) & 0xffffu;
  }
};

// All parts of a step of a lane. Of 1-byte items two groups lie side by side, and come at once where they can.
template <int kItemsize>
TWOFOUR_DEVICE void load_parts(const void* matrix, int64_t stride, int64_t rows, int64_t columns, int64_t row0,
                               int64_t column0, int lane, int step, uint2 (&fours)[Parts<kItemsize>::kCount]) {
  using Part = Parts<kItemsize>;
  if constexpr (kItemsize == 2) {
    unroll<Part::kCount>([&](auto i) {
      fours[i] = load_group<2>(matrix, stride, rows, columns, row0 + Part::row(lane, i),
                               column0 + 4 * Part::group(lane, step, i));
    });
  } else {
    unroll<Part::kCount / 2>([&](auto pair) {
      constexpr int i = 2 * decltype(pair){};
      const int64_t row = row0 + Part::row(lane, i), column = column0 + 4 * Part::group(lane, step, i);
      const auto* const from = static_cast<const uint8_t*>(matrix) + row * stride + column;
      if (row < rows && column + 4 < columns && reinterpret_cast<uint64_t>(from) % sizeof(uint2) == 0) {
        const uint2 both = load_stream(reinterpret_cast<const uint2*>(from));
        fours[i] = uint2{both.x, 0};
        fours[i + 1] = uint2{both.y, 0};
      } else {
        fours[i] = load_group<1>(matrix, stride, rows, columns, row, column);
        fours[i + 1] = load_group<1>(matrix, stride, rows, columns, row, column + 4);
      }
    });
  }
}

// Nibbles of the parts of all four lanes of a row group -> the words of metadata of each. `of_part(step, i)` is the
// nibble of a lane's part; every lane of the warp takes part.
template <int kItemsize, class OfPart>
TWOFOUR_DEVICE uint32_t word_of_parts(int lane, OfPart&& of_part) {
  const uint32_t q = static_cast<uint32_t>(lane % 4);
  uint32_t words[4] = {0, 0, 0, 0};  // of lane 4 * g + w: what this lane knows
  if constexpr (kItemsize == 2) {
    unroll<2>([&](auto step) {
      unroll<4>([&](auto r) { words[2 * step + r / 2] |= of_part(step, r) << (4 * q + 16 * (r % 2)); });
    });
  } else {
    unroll<8>([&](auto i) { words[i / 2 % 2 + 2 * (i / 4)] |= of_part(Constant<0>{}, i) << (4 * (2 * q + i % 2)); });
  }
  // Lanes exchange halves of what they know, so that each ends with the whole of one word.
  const bool upper = q >= 2, odd = q % 2 != 0;
  uint32_t two[2];
  unroll<2>([&](auto k) {
    const uint32_t other = shuffle_xor(upper ? words[k] : words[k + 2], 2);
    two[k] = (upper ? words[k + 2] : words[k]) | other;
  });
  const uint32_t other = shuffle_xor(odd ? two[0] : two[1], 1);
  return (odd ? two[1] : two[0]) | other;
}

template <class Key, bool kMayKeepTwo>
TWOFOUR_DEVICE void pack_one_way(const void* matrix, int64_t stride, int64_t rows, int64_t columns, uint4* values,
                                 uint32_t* metadata, uint32_t* status) {
  constexpr int kItemsize = Key::kItemsize, kSteps = steps_of(kItemsize);
  using Part = Parts<kItemsize>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / kWarp, chunks = chunks_of(columns);
  if (warp >= tiles_of(rows) * chunks) return;  // whole warps only
  const int64_t row0 = warp / chunks * kTile, column0 = warp % chunks * kColumns;
  uint32_t nibbles[kSteps][Part::kCount], over = 0;
  unroll<kSteps>([&](auto step) {
    uint32_t registers[4] = {0, 0, 0, 0};
    uint2 fours[Part::kCount];
    load_parts<kItemsize>(matrix, stride, rows, columns, row0, column0, lane, step, fours);
    unroll<Part::kCount>([&](auto i) {
      const int64_t row = row0 + Part::row(lane, i), column = column0 + 4 * Part::group(lane, step, i);
      uint32_t beyond = 0;
      nibbles[step][i] = row < rows && column < columns ? choose<Key>(fours[i], beyond) : kPaddingNibble;
      over |= beyond;
      Part::put(registers, i, Part::kept(fours[i], nibbles[step][i]));
    });
    values[(warp * kSteps + step) * kWarp + lane] = uint4{registers[0], registers[1], registers[2], registers[3]};
  });
  metadata[warp * kWarp + lane] = word_of_parts<kItemsize>(lane, [&](auto step, auto i) { return nibbles[step][i]; });
  if (kMayKeepTwo && over != 0 && status != nullptr) or_into(status, 1u);
}

#define TWOFOUR_ONE_WAY(name, Key, may_keep_two)                                                                        \
  TWOFOUR_KERNEL(kOneWayThreads, 4)                                                                                        \
  name(const void* matrix, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,            \
       uint32_t* status) {                                                                                              \
    pack_one_way<Key, may_keep_two>(matrix, stride, rows, columns, values, metadata, status);                           \
  }
using NonzeroHalf = ByNonzero<2, 0x7fffu>;
using NonzeroFp8 = ByNonzero<1, 0x7fu>;
using NonzeroInt8 = ByNonzero<1, 0xffu>;
TWOFOUR_ONE_WAY(prune_bf16, ByMagnitude<Bfloat16>, false)
TWOFOUR_ONE_WAY(prune_fp16, ByMagnitude<Float16>, false)
TWOFOUR_ONE_WAY(prune_e4m3, ByFp8Magnitude<0x7eu>, false)
TWOFOUR_ONE_WAY(prune_e5m2, ByFp8Magnitude<0x7cu>, false)
TWOFOUR_ONE_WAY(prune_int8, ByInt8Magnitude, false)
TWOFOUR_ONE_WAY(compress_half, NonzeroHalf, true)
TWOFOUR_ONE_WAY(compress_fp8, NonzeroFp8, true)
TWOFOUR_ONE_WAY(compress_int8, NonzeroInt8, true)

// ---- 2-byte items in, e4m3 with a scale for each row out: a block packs a tile, and reads it twice -------------------

constexpr int kQuantizeWarps = 16;
constexpr int kQuantizeThreads = kWarp * kQuantizeWarps;
constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestRow = 1.5046327690525280e-36f;  // 2^-119: the factor of smaller rows would be no number

// Two groups of a row that lie side by side.
TWOFOUR_DEVICE void load_two_groups(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, int64_t row,
                                    int64_t column, uint2 (&fours)[2]) {
  const uint16_t* const from = weight + row * stride + column;
  if (row < rows && column + 4 < columns && reinterpret_cast<uint64_t>(from) % sizeof(uint4) == 0) {
    const uint4 both = load_kept(reinterpret_cast<const uint4*>(from));
    fours[0] = uint2{both.x, both.y};
    fours[1] = uint2{both.z, both.w};
    return;
  }
  fours[0] = load_group<2>(weight, stride, rows, columns, row, column);
  fours[1] = load_group<2>(weight, stride, rows, columns, row, column + 4);
}

template <class Format>
TWOFOUR_DEVICE float half_of(uint32_t bits) {
  if constexpr (Format::kFraction == Bfloat16::kFraction) return float_of_bf16(static_cast<uint16_t>(bits));
  return float_of_fp16(static_cast<uint16_t>(bits));
}

// The larger of `most` and the magnitudes of four items, NaN left out.
template <class Format>
TWOFOUR_DEVICE uint32_t largest_of(uint32_t most, uint2 four) {
  const uint32_t items[4] = {four.x & 0x7fffu, four.x >> 16 & 0x7fffu, four.y & 0x7fffu, four.y >> 16 & 0x7fffu};
  unroll<4>([&](auto i) {
    if (items[i] > most && items[i] <= Scores<Format>::kInfinity) most = items[i];
  });
  return most;
}

template <class Format>
TWOFOUR_DEVICE void quantize(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values,
                             uint32_t* metadata, float* scales) {
  using Part = Parts<1>;
  TWOFOUR_SHARED uint32_t largest[kTile];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, g = lane / 4;
  const int64_t tile = blockIdx.x, row0 = tile * kTile, chunks = chunks_of(columns);
  if (thread < kTile) largest[thread] = 0;
  sync_block();
  uint32_t most[2] = {0, 0};  // of rows g and g + 8
  for (int64_t chunk = thread / kWarp; chunk < chunks; chunk += kQuantizeWarps) {
    unroll<4>([&](auto pair) {
      uint2 fours[2];
      load_two_groups(weight, stride, rows, columns, row0 + Part::row(lane, 2 * pair),
                      chunk * kColumns + 4 * Part::group(lane, 0, 2 * pair), fours);
      unroll<2>([&](auto k) { most[pair % 2] = largest_of<Format>(most[pair % 2], fours[k]); });
    });
  }
  unroll<2>([&](auto k) { max_into(largest + g + 8 * k, most[k]); });
  sync_block();
  float factors[2];
  unroll<2>([&](auto k) {
    const float size = half_of<Format>(largest[g + 8 * k]);
    factors[k] = size >= kSmallestRow ? kLargestE4m3 / size : 0.0f;
  });
  if (thread < kTile && row0 + thread < rows) {
    const float size = half_of<Format>(largest[thread]);
    scales[row0 + thread] = size >= kSmallestRow ? size / kLargestE4m3 : 0.0f;
  }
  for (int64_t chunk = thread / kWarp; chunk < chunks; chunk += kQuantizeWarps) {
    uint32_t registers[4] = {0, 0, 0, 0}, nibbles[Part::kCount];
    unroll<4>([&](auto pair) {
      uint2 fours[2];
      const int64_t row = row0 + Part::row(lane, 2 * pair), column = chunk * kColumns + 4 * Part::group(lane, 0, 2 * pair);
      load_two_groups(weight, stride, rows, columns, row, column, fours);
      unroll<2>([&](auto k) {
        constexpr int i = 2 * decltype(pair){} + decltype(k){};
        uint32_t unused = 0;
        nibbles[i] = row < rows && column + 4 * k < columns ? choose<ByMagnitude<Format>>(fours[k], unused) : kPaddingNibble;
        const uint32_t two = kept_of_two_bytes(fours[k], nibbles[i]);
        const float factor = factors[pair % 2];
        const float low = half_of<Format>(two & 0xffffu) * factor, high = half_of<Format>(two >> 16) * factor;
        Part::put(registers, i, two_e4m3_of(low, high));
      });
    });
    values[(tile * chunks + chunk) * kWarp + lane] = uint4{registers[0], registers[1], registers[2], registers[3]};
    metadata[(tile * chunks + chunk) * kWarp + lane] =
        word_of_parts<1>(lane, [&](auto, auto i) { return nibbles[i]; });
  }
}

#define TWOFOUR_QUANTIZE(name, Format)                                                                                \
  TWOFOUR_KERNEL(kQuantizeThreads, 2)                                                                                 \
  name(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,      \
       float* scales) {                                                                                               \
    quantize<Format>(weight, stride, rows, columns, values, metadata, scales);                                        \
  }
TWOFOUR_QUANTIZE(quantize_bf16, Bfloat16)
TWOFOUR_QUANTIZE(quantize_fp16, Float16)

// ---- where metadata lie already --------------------------------------------------------------------------------------

// The nibble of part i of a step, from the words of the lanes of its row group.
template <int kItemsize>
TWOFOUR_DEVICE uint32_t nibble_of_part(const uint32_t* words, int lane, int step, int i) {
  const int group = Parts<kItemsize>::group(lane, step, i), row = Parts<kItemsize>::row(lane, i);
  if (kItemsize == 2) return words[lane / 4 * 4 + group / 4] >> (4 * (group % 4) + 16 * (row / 8)) & 15u;
  return words[lane / 4 * 4 + row / 8 + 2 * (group / 8)] >> (4 * (group % 8)) & 15u;
}

template <int kItemsize>
TWOFOUR_DEVICE void take(const void* matrix, int64_t stride, int64_t rows, int64_t columns, const uint32_t* metadata,
                         uint4* values) {
  constexpr int kSteps = steps_of(kItemsize);
  using Part = Parts<kItemsize>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / kWarp, chunks = chunks_of(columns);
  if (warp >= tiles_of(rows) * chunks) return;
  const int64_t row0 = warp / chunks * kTile, column0 = warp % chunks * kColumns;
  unroll<kSteps>([&](auto step) {
    uint32_t registers[4] = {0, 0, 0, 0};
    uint2 fours[Part::kCount];
    load_parts<kItemsize>(matrix, stride, rows, columns, row0, column0, lane, step, fours);
    unroll<Part::kCount>([&](auto i) {
      Part::put(registers, i, Part::kept(fours[i], nibble_of_part<kItemsize>(metadata + warp * kWarp, lane, step, i)));
    });
    values[(warp * kSteps + step) * kWarp + lane] = uint4{registers[0], registers[1], registers[2], registers[3]};
  });
}

TWOFOUR_KERNEL(kOneWayThreads, 4)
take_half(const void* matrix, int64_t stride, int64_t rows, int64_t columns, const uint32_t* metadata, uint4* values) {
  take<2>(matrix, stride, rows, columns, metadata, values);
}
TWOFOUR_KERNEL(kOneWayThreads, 4)
take_byte(const void* matrix, int64_t stride, int64_t rows, int64_t columns, const uint32_t* metadata, uint4* values) {
  take<1>(matrix, stride, rows, columns, metadata, values);
}

// Kept items back to their places, zeros beside them.
template <int kItemsize>
TWOFOUR_DEVICE void expand(const uint4* values, const uint32_t* metadata, int64_t rows, int64_t columns, void* matrix,
                           int64_t stride) {
  constexpr int kSteps = steps_of(kItemsize), kBits = 8 * kItemsize;
  using Part = Parts<kItemsize>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kWarpsOfBlock + threadIdx.x / kWarp, chunks = chunks_of(columns);
  if (warp >= tiles_of(rows) * chunks) return;
  const int64_t row0 = warp / chunks * kTile, column0 = warp % chunks * kColumns;
  unroll<kSteps>([&](auto step) {
    const uint4 loaded = values[(warp * kSteps + step) * kWarp + lane];
    const uint32_t registers[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    unroll<Part::kCount>([&](auto i) {
      const int64_t row = row0 + Part::row(lane, i), column = column0 + 4 * Part::group(lane, step, i);
      if (row >= rows || column >= columns) return;
      const uint32_t nibble = nibble_of_part<kItemsize>(metadata + warp * kWarp, lane, step, i);
      const uint32_t two = Part::get(registers, i), first = nibble & 3u, second = nibble >> 2;
      const uint64_t low = two & ((1u << kBits) - 1), high = two >> kBits;
      const uint64_t four = low << (kBits * first) | high << (kBits * second);
      if constexpr (kItemsize == 2) {
        store_four(static_cast<uint16_t*>(matrix) + row * stride + column,
                   uint2{static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32)});
      } else {
        store_four(static_cast<uint8_t*>(matrix) + row * stride + column, static_cast<uint32_t>(four));
      }
    });
  });
}

TWOFOUR_KERNEL(kOneWayThreads, 4)
expand_half(const uint4* values, const uint32_t* metadata, int64_t rows, int64_t columns, void* matrix, int64_t stride) {
  expand<2>(values, metadata, rows, columns, matrix, stride);
}
TWOFOUR_KERNEL(kOneWayThreads, 4)
expand_byte(const uint4* values, const uint32_t* metadata, int64_t rows, int64_t columns, void* matrix, int64_t stride) {
  expand<1>(values, metadata, rows, columns, matrix, stride);
}

}  // namespace twofour::cuda
