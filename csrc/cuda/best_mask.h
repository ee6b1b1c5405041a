// The best transposable 2:4 mask of a 4x4 block of |weights|, by one thread: the mask of twofour/masks/
// transposable.py, bit for bit. nm/halves.inl.h has the 19 kinds of halves.
//
// Scores are whole numbers in units of the last bit of the least that is no zero. Where they lie close together, as nearly
// always, eight of them and the number of a half fit in 32 bits; else in 64; the few that span more than double can tell
// apart, infinities and NaN are summed in double, as the specification does.
#pragma once

#include "cuda/ptx.h"

namespace twofour::cuda {

#include "nm/halves.inl.h"

struct Bfloat16 {
  static constexpr int kFraction = 7, kExponentBits = 8;
};
struct Float16 {
  static constexpr int kFraction = 10, kExponentBits = 5;
};
struct Float32 {
  static constexpr int kFraction = 23, kExponentBits = 8;
};

template <class Format>
struct Scores {
  static constexpr uint32_t kInfinity = ((1u << Format::kExponentBits) - 1) << Format::kFraction;
  static constexpr int kBias = (1 << (Format::kExponentBits - 1)) - 1;
  // The largest number that a kernel may shift by: bits of the significand, of eight, of the number of a half. None where
  // it is negative.
  static constexpr int kNarrow = 31 - 6 - 3 - (Format::kFraction + 1);
  static constexpr int kWide = 53 - 3 - (Format::kFraction + 1);  // what double sums exactly
};

TWOFOUR_DEVICE int32_t add_larger(int32_t a, int32_t b, int32_t c) { return add_max(a, b, c); }
TWOFOUR_DEVICE int64_t add_larger(int64_t a, int64_t b, int64_t c) { return a + b > c ? a + b : c; }

// Bits of the two rows of a half by its number 6 * p' + q', 1 .. 6 for the pairs from the last to the first.
TWOFOUR_DEVICE uint32_t bits_of_number(uint32_t number) {
  constexpr uint32_t table = kPairBits[5] << 4 | kPairBits[4] << 8 | kPairBits[3] << 12 | kPairBits[2] << 16 |
                             kPairBits[1] << 20 | static_cast<uint32_t>(kPairBits[0]) << 24;
  const uint32_t p = (number - 1) * 43 >> 8, q = number - 6 * p;  // a sixth, exactly below 128
  return (table >> (4 * p) & 15u) << 4 | (table >> (4 * q) & 15u);
}

template <class Int>
TWOFOUR_DEVICE uint32_t best_mask_of_integers(const Int (&x)[16]) {
  Int pairs[4][kPairs];
  unroll<4>([&](auto row) {
    constexpr int step = decltype(row){} % 2 == 0 ? 6 : 1;  // times 6 .. 1 for the six pairs
    const Int a = x[4 * row] + 4 * step, b = x[4 * row + 1] + 2 * step, c = x[4 * row + 2] + step, d = x[4 * row + 3];
    pairs[row][0] = a + b;
    pairs[row][1] = a + c;
    pairs[row][2] = a + d;
    pairs[row][3] = b + c;
    pairs[row][4] = b + d;
    pairs[row][5] = c + d;
  });
  Int halves[2][kKinds];
  unroll<2>([&](auto lower) {
    unroll<kHalves>([&](auto half) {
      constexpr int kind = kHalf.kind[decltype(half){}];
      const Int a = pairs[2 * lower][half / kPairs], b = pairs[2 * lower + 1][half % kPairs];
      if constexpr (kHalf.first[decltype(half){}]) {
        halves[lower][kind] = a + b;
      } else {
        halves[lower][kind] = add_larger(a, b, halves[lower][kind]);
      }
    });
  });
  Int best = -1, rest = 0;  // the number of the upper half tells the kind, so it decides between equal sums
  unroll<kKinds>([&](auto kind) {
    constexpr int other = kHalf.rest[decltype(kind){}];
    const Int sum = halves[0][kind] + (halves[1][other] & Int{-64});
    rest = sum > best ? halves[1][other] : rest;
    best = sum > best ? sum : best;
  });
  return bits_of_number(static_cast<uint32_t>(best) & 63u) << 8 | bits_of_number(static_cast<uint32_t>(rest) & 63u);
}

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
    single[i] = bits[i] > Scores<Format>::kInfinity    ? Worth{-64, 0.0}
                : bits[i] == Scores<Format>::kInfinity ? Worth{1, 0.0}
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
  return best_bits;
}

// The scores as whole numbers times 64, in units of the last bit of the smallest exponent, `first`.
template <class Format, class Int, class Unsigned>
TWOFOUR_DEVICE uint32_t best_mask_in(const uint32_t* bits, uint32_t first) {
  Int x[16];
  unroll<16>([&](auto i) {
    const Unsigned significand = (bits[i] & ((1u << Format::kFraction) - 1)) | 1u << Format::kFraction;
    // A zero is shifted by less than nothing, that is by too much.
    x[i] = static_cast<Int>(shift_left(significand, (bits[i] >> Format::kFraction) - first) << 6);
  });
  return best_mask_of_integers(x);
}

template <class Format>
TWOFOUR_APART uint32_t best_mask_in_64(const uint32_t* bits, uint32_t first) {
  return best_mask_in<Format, int64_t, uint64_t>(bits, first);
}

// The mask of a block as bits, row 0 and column 0 the highest of 16, from the bits of its magnitudes.
template <class Format>
TWOFOUR_DEVICE uint32_t best_mask(const uint32_t (&bits)[16]) {
  uint32_t most = 0, least = ~0u;  // one less than the least: zeros, which wrap around, do not count
  unroll<16>([&](auto i) {
    most = bits[i] > most ? bits[i] : most;
    least = bits[i] - 1 < least ? bits[i] - 1 : least;
  });
  const uint32_t first = (least + 1) >> Format::kFraction, span = (most >> Format::kFraction) - first;
  if (most == 0) return 0b1100110000110011u;
  if (first == 0 || most >= Scores<Format>::kInfinity || span > Scores<Format>::kWide) return best_mask_of_any<Format>(bits);
  if constexpr (Scores<Format>::kNarrow > 0) {
    if (span <= Scores<Format>::kNarrow) return best_mask_in<Format, int32_t, uint32_t>(bits, first);
  }
  return best_mask_in_64<Format>(bits, first);
}

}  // namespace twofour::cuda
