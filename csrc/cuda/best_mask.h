// The best transposable 2:4 mask of a 4x4 block of |weights|, by one thread: the mask of twofour/masks/
// transposable.py, bit for bit. nm/halves.inl.h has the 19 kinds of halves.
//
// Scores are whole numbers in units of the last bit of the least that is no zero, and below them stands what tells masks of
// equal sums apart. Where they lie close together, as nearly always, eight of them fit in 32 bits; else in 64; the few that
// span more than double can tell apart, infinities and NaN are summed in double, as the specification does.
#pragma once

#include "cuda/formats.h"
#include "cuda/two_of_four.h"

namespace twofour::cuda {

#include "nm/halves.inl.h"

// A kept place of row 0, 1 or 2 adds its row's 36, 6 or 1 times 4, 2, 1 or 0 to the number of a mask: pairs of places count
// 6 .. 1 from the first to the last, and the columns tell what row 3 keeps. So masks whose places come first have larger
// numbers, 43 .. 258, which differ in their last eight bits.
constexpr int kNumberBits = 8;
TWOFOUR_BOTH constexpr uint32_t number_of_place(int place) {
  constexpr int kRows[4] = {36, 6, 1, 0}, kColumns[4] = {4, 2, 1, 0};
  return static_cast<uint32_t>(kRows[place / 4] * kColumns[place % 4]);
}

template <class Format>
struct Scores {
  static constexpr int kBias = (1 << (Format::kExponentBits - 1)) - 1;
  // The largest number that a kernel may shift by: bits of the significand, of eight, of the number of a mask. None where it
  // is negative.
  static constexpr int kNarrow = 32 - kNumberBits - 3 - (Format::kFraction + 1);
  static constexpr int kWide = 53 - 3 - (Format::kFraction + 1);  // what double sums exactly
};

TWOFOUR_DEVICE uint64_t add_max(uint64_t a, uint64_t b, uint64_t c) { return a + b > c ? a + b : c; }

// Of two columns; the other two have 5 less their number.
constexpr int kFirstOfTwo[6] = {0, 0, 0, 1, 1, 2}, kSecondOfTwo[6] = {1, 2, 3, 2, 3, 3};

// The largest sum of eight numbers that a mask keeps.
//
// The upper two rows keep two, one or none of a column, and the lower two the rest. Of two columns with one each, either may
// be that of the upper row (`crossed`); of two columns that are full in one half and empty in the other, either may be the
// one that is full above (`opposite`). A mask is two pairs of columns of the one kind or of the other: with all pairs of one
// kind two ways to pair the columns reach every mask.
template <class Unsigned>
TWOFOUR_DEVICE Unsigned best_sum(const Unsigned (&x)[16]) {
  Unsigned columns[2][4], crossed[2][6], opposite[6], even[2];
  unroll<2>([&](auto half) {
    const Unsigned* const row = x + 8 * half;
    unroll<4>([&](auto c) { columns[half][c] = row[c] + row[4 + c]; });
    unroll<6>([&](auto two) {
      constexpr int k = kFirstOfTwo[decltype(two){}], l = kSecondOfTwo[decltype(two){}];
      crossed[half][two] = add_max(row[k], row[4 + l], row[l] + row[4 + k]);
    });
    even[half] = add_max(crossed[half][1], crossed[half][4], crossed[half][0] + crossed[half][5]);
  });
  unroll<6>([&](auto two) {
    constexpr int k = kFirstOfTwo[decltype(two){}], l = kSecondOfTwo[decltype(two){}];
    opposite[two] = add_max(columns[0][k], columns[1][l], columns[0][l] + columns[1][k]);
  });
  Unsigned best = even[0] + even[1];
  best = add_max(opposite[0], opposite[5], best);
  best = add_max(opposite[1], opposite[4], best);
  unroll<6>([&](auto two) { best = add_max(crossed[0][two] + crossed[1][two], opposite[5 - two], best); });
  return best;
}

// ---- masks by the last eight bits of their number --------------------------------------------------------------------

constexpr int kMasks = 1 << kNumberBits;

// Of the four rows and the four columns of a mask: the nibbles that they keep, and of those the selectors of byte_permute
// for four items of 2 bytes.
struct MaskTable {
  uint32_t nibbles[kMasks];  // of row r from bit 4 * r, of column c from bit 16 + 4 * c
  uint4 selectors[kMasks];   // two and two: of rows 0 .. 3 and columns 0 .. 3
};

constexpr uint32_t nibble_of_two(int two) { return static_cast<uint32_t>(kFirstOfTwo[two] | kSecondOfTwo[two] << 2); }

constexpr MaskTable make_masks() {
  MaskTable table{};
  for (int half = 0; half < 216; ++half) {
    const int rows[3] = {half / 36, half / 6 % 6, half % 6};
    int counts[4] = {}, number = 0;
    uint32_t nibbles = 0, of_columns[4] = {};
    for (int r = 0; r < 4; ++r) {
      int kept[2] = {-1, -1};
      if (r < 3) {
        kept[0] = kFirstOfTwo[rows[r]], kept[1] = kSecondOfTwo[rows[r]];
        number += (6 - rows[r]) * (r == 0 ? 36 : r == 1 ? 6 : 1);
      } else {
        int places = 0;
        for (int c = 0; c < 4; ++c) {
          if (counts[c] == 1 && places < 2) kept[places++] = c;
        }
        if (places < 2) break;
      }
      for (int k = 0; k < 2; ++k) {
        of_columns[kept[k]] |= static_cast<uint32_t>(r) << (2 * counts[kept[k]]);
        ++counts[kept[k]];
      }
      nibbles |= static_cast<uint32_t>(kept[0] | kept[1] << 2) << (4 * r);
    }
    if (counts[0] != 2 || counts[1] != 2 || counts[2] != 2 || counts[3] != 2) continue;
    for (int c = 0; c < 4; ++c) nibbles |= of_columns[c] << (16 + 4 * c);
    const int at = number % kMasks;
    table.nibbles[at] = nibbles;
    uint32_t selectors[4] = {};
    for (int i = 0; i < 8; ++i) selectors[i / 2] |= selector_of(nibbles >> (4 * i) & 15) << (16 * (i % 2));
    table.selectors[at] = uint4{selectors[0], selectors[1], selectors[2], selectors[3]};
  }
  return table;
}

TWOFOUR_TABLE MaskTable kMaskTable = make_masks();

// ---- a block ---------------------------------------------------------------------------------------------------------

// Compared by rank (NaN count -64, infinities 1), then by the sum of the numbers.
struct Worth {
  int rank;
  double sum;

  TWOFOUR_DEVICE bool above(const Worth& other) const {
    return rank != other.rank ? rank > other.rank : sum > other.sum;
  }
};
TWOFOUR_DEVICE Worth together(const Worth& a, const Worth& b) { return {a.rank + b.rank, a.sum + b.sum}; }

template <class Format>
TWOFOUR_APART uint32_t best_mask_of_any(const uint32_t* bits) {
  Worth single[16];
  TWOFOUR_ROLLED
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent = bits[i] >> Format::kFraction, fraction = bits[i] & ((1u << Format::kFraction) - 1);
    const uint32_t significand = exponent == 0 ? fraction : fraction | 1u << Format::kFraction;
    const int power = static_cast<int>(exponent == 0 ? 1 : exponent) - Scores<Format>::kBias - Format::kFraction;
    single[i] = bits[i] > Format::kInfinity    ? Worth{-64, 0.0}
                : bits[i] == Format::kInfinity ? Worth{1, 0.0}
                                                       : Worth{0, significand * power_of_two(power)};
  }
  // Rolled loops over memory: this runs once in thousands of blocks, and registers would cost all of them.
  Worth halves[2][kKinds], best{-1000, 0.0};
  uint32_t bits_of[2][kKinds], best_bits = 0;
  TWOFOUR_ROLLED
  for (int i = 0; i < 2 * kHalves; ++i) {
    const int lower = i / kHalves, half = i % kHalves, kind = kHalf.kind[half];
    const int pairs[2] = {kPairBits[half / kPairs], kPairBits[half % kPairs]};
    Worth rows[2];
    TWOFOUR_ROLLED
    for (int row = 0; row < 2; ++row) {  // the two places of its pair, in column order
      const int bits_of_pair = pairs[row], first = bits_of_pair >= 8 ? 0 : bits_of_pair >= 4 ? 1 : 2;
      const int last = bits_of_pair % 2 != 0 ? 3 : bits_of_pair % 4 != 0 ? 2 : 1;
      rows[row] = together(single[8 * lower + 4 * row + first], single[8 * lower + 4 * row + last]);
    }
    const Worth whole = together(rows[0], rows[1]);
    if (kHalf.first[half] || whole.above(halves[lower][kind])) {
      halves[lower][kind] = whole;
      bits_of[lower][kind] = static_cast<uint32_t>(pairs[0] << 4 | pairs[1]);
    }
  }
  TWOFOUR_ROLLED
  for (int kind = 0; kind < kKinds; ++kind) {
    const int other = kHalf.rest[kind];
    const Worth whole = together(halves[0][kind], halves[1][other]);
    const uint32_t own_bits = bits_of[0][kind] << 8 | bits_of[1][other];
    if (whole.above(best) || (!best.above(whole) && own_bits > best_bits)) {
      best = whole;
      best_bits = own_bits;
    }
  }
  uint32_t number = 0;
  TWOFOUR_ROLLED
  for (int row = 0; row < 3; ++row) {
    const int four = static_cast<int>(best_bits >> (12 - 4 * row)) & 15;
    int two = 0;
    while (kPairBits[two] != four) ++two;
    number = 6 * number + static_cast<uint32_t>(6 - two);
  }
  return number;
}

// Sums of 64 bits, in units of the last bit of the smallest exponent, `first`.
template <class Format>
TWOFOUR_APART uint32_t best_mask_in_64(const uint32_t* bits, uint32_t first) {
  uint64_t x[16];
  unroll<16>([&](auto i) {
    const uint32_t exponent = bits[i] >> Format::kFraction, fraction = bits[i] & ((1u << Format::kFraction) - 1);
    const uint64_t significand = exponent == 0 ? fraction : fraction | 1u << Format::kFraction;
    const uint32_t shift = exponent == 0 ? 0 : exponent - first;
    x[i] = (shift_left(significand, shift) << kNumberBits) + number_of_place(i);
  });
  return static_cast<uint32_t>(best_sum(x));
}

// Magnitudes of a 4x4 block: the largest, and the smallest that is no zero; the former where all are.
struct Range {
  uint32_t most, least;

  // Exponents; that of subnormal numbers is 1.
  template <class Format>
  TWOFOUR_DEVICE uint32_t first() const { return least < 2u << Format::kFraction ? 1 : least >> Format::kFraction; }
  template <class Format>
  TWOFOUR_DEVICE uint32_t span() const {
    return (most < 2u << Format::kFraction ? 1 : most >> Format::kFraction) - first<Format>();
  }
};

TWOFOUR_DEVICE Range range_of(const uint2 (&rows)[4]) {
  constexpr uint32_t kMagnitudes = 0x7fff7fff;
  uint32_t most = 0, least = kMagnitudes;
  unroll<8>([&](auto i) {
    const uint32_t two = (i % 2 == 0 ? rows[i / 2].x : rows[i / 2].y) & kMagnitudes;
    most = max_halves(most, two);
    least = min_signed_halves(least, two + kMagnitudes);  // one less than a number, below zero; but of a zero 0x7fff
  });
  least ^= 0x80008000u;  // without a sign
  const uint32_t lower = least & 0xffffu, upper = least >> 16, largest = most >> 16 > (most & 0xffffu) ? most >> 16 : most & 0xffffu;
  const uint32_t smallest = (lower < upper ? lower : upper) + 1;
  return {largest, smallest < largest ? smallest : largest};
}
TWOFOUR_DEVICE Range range_of(const uint4 (&rows)[4]) {
  uint32_t most = 0, least = ~0u;  // one less than the least: zeros, which wrap around, do not count
  unroll<4>([&](auto r) {
    const uint32_t four[4] = {rows[r].x & 0x7fffffffu, rows[r].y & 0x7fffffffu, rows[r].z & 0x7fffffffu, rows[r].w & 0x7fffffffu};
    unroll<4>([&](auto c) {
      most = four[c] > most ? four[c] : most;
      least = four[c] - 1 < least ? four[c] - 1 : least;
    });
  });
  return {most, least < most ? least + 1 : most};
}

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

// Four magnitudes of 2 bytes in float32.
template <class Format>
TWOFOUR_DEVICE void floats_of(uint2 four, float* to) {
  const uint32_t words[2] = {four.x & 0x7fff7fffu, four.y & 0x7fff7fffu};
  unroll<2>([&](auto i) {
    if constexpr (Format::kFraction == Bfloat16::kFraction) {
      to[2 * i] = float_of_bits(words[i] << 16);
      to[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
    } else {
      to[2 * i] = float_of_fp16(static_cast<uint16_t>(words[i]));
      to[2 * i + 1] = float_of_fp16(static_cast<uint16_t>(words[i] >> 16));
    }
  });
}

// Exponent of 2^23 units, of which float32 holds every whole number below.
constexpr uint32_t kFloatBias = 127, kFloatFraction = 23;

// The number of the mask of a block, from its items; its last eight bits are a place of kMaskTable.
template <class Format, class Four>
TWOFOUR_DEVICE uint32_t best_mask(const Four (&rows)[4]) {
  const Range range = range_of(rows);
  const uint32_t first = range.template first<Format>(), span = range.template span<Format>();
  if constexpr (Scores<Format>::kNarrow > 0) {
    // 1 / unit as a float, whose exponent must be one.
    const int exponent = static_cast<int>(kFloatBias + Scores<Format>::kBias + Format::kFraction) - static_cast<int>(first);
    const bool has_unit = exponent < 255 || range.most == 0;  // any will do where all are zeros
    if (range.most < Format::kInfinity && span <= Scores<Format>::kNarrow && has_unit) {
      const float units = float_of_bits(static_cast<uint32_t>(exponent < 255 ? exponent : 254) << kFloatFraction);
      const float top = float_of_bits((kFloatBias + kFloatFraction) << kFloatFraction);
      float values[16];
      unroll<4>([&](auto r) { floats_of<Format>(rows[r], values + 4 * r); });
      uint32_t x[16];  // 2^23 and units, whose exponent the shift moves out
      unroll<16>([&](auto i) {
        x[i] = (bits_of_float(multiply_add(values[i], units, top)) << kNumberBits) + number_of_place(i);
      });
      return best_sum(x);
    }
  }
  uint32_t bits[16];
  unroll<4>([&](auto r) { magnitudes_of(rows[r], bits + 4 * r); });
  if (range.most >= Format::kInfinity || span > Scores<Format>::kWide) return best_mask_of_any<Format>(bits);
  return best_mask_in_64<Format>(bits, first);
}

}  // namespace twofour::cuda
