// Transposable 2:4 masks, several blocks of 4x4 at a time, each in a lane of its own. Plain C++ with the vectors of the
// compiler: this file is compiled once for each instruction set, which sets kLanes and may bring its own load_rows and
// store_rows.
//
// A vector holds one place of its blocks. Sums of the six pairs of each row, 24 additions; of the 36 halves above and
// below, and the best of each of the 19 kinds, 72; of whole masks, 19. A mask is carried along as the number that its
// bits make (transposable_2_4_of_any), in the type of the sums, so that one kind of vector does.
//
// Sums are in double. Those of bf16 scores are exact in float too, with twice the lanes, where the scores of a block lie
// close enough together: kFloatSpread.

using F = double __attribute__((vector_size(8 * kLanes)));
using Bits = int64_t __attribute__((vector_size(8 * kLanes)));
using Narrow = float __attribute__((vector_size(8 * kLanes)));  // 2 * kLanes blocks
using NarrowBits = int32_t __attribute__((vector_size(8 * kLanes)));

template <class V>
TWOFOUR_INLINE inline V larger(V a, V b) { return a > b ? a : b; }
template <class V>
TWOFOUR_INLINE inline V lesser(V a, V b) { return a < b ? a : b; }
TWOFOUR_INLINE inline F magnitude(F a) { return (F)((Bits)a & INT64_MAX); }
TWOFOUR_INLINE inline Narrow magnitude(Narrow a) { return (Narrow)((NarrowBits)a & INT32_MAX); }

// The scores of `blocks` neighbouring blocks, no more than a vector has lanes; lanes beyond are 0.
template <class V, class Score>
TWOFOUR_INLINE inline void load_blocks(const Score* scores, int64_t stride, int64_t blocks, V (&x)[16]) {
  constexpr int kAll = sizeof(V) / sizeof(V{}[0]);
  if (blocks == kAll) {
    unroll<4>([&](auto row) { load_rows(scores + row * stride, x + 4 * row); });
    return;
  }
  for (int place = 0; place < 16; ++place) {
    const Score* from = scores + place / 4 * stride + place % 4;
    V lanes{};
    for (int64_t lane = 0; lane < blocks; ++lane) lanes[lane] = widened(from[4 * lane]);
    x[place] = lanes;
  }
}

// The best half of each kind, and its bits times `unit`.
template <class V>
TWOFOUR_INLINE inline void best_halves(const V* upper, const V* lower, float unit, V (&sums)[kKinds], V (&bits)[kKinds]) {
  unroll<kHalves>([&](auto half) {
    constexpr int kind = kHalf.kind[decltype(half){}];
    const V sum = upper[half / kPairs] + lower[half % kPairs], own = V{} + unit * half_bits(half);
    if constexpr (kHalf.first[decltype(half){}]) {
      sums[kind] = sum;
      bits[kind] = own;
    } else {
      const auto wins = sum > sums[kind];
      sums[kind] = larger(sum, sums[kind]);
      bits[kind] = wins ? own : bits[kind];
    }
  });
}

// The bits of the best masks. Scores are finite, and so are the sums of eight.
template <class V>
TWOFOUR_INLINE inline V best_masks(const V (&x)[16]) {
  V pairs[4][kPairs];
  unroll<4>([&](auto row) {
    const V a = x[4 * row], b = x[4 * row + 1], c = x[4 * row + 2], d = x[4 * row + 3];
    pairs[row][0] = a + b;
    pairs[row][1] = a + c;
    pairs[row][2] = a + d;
    pairs[row][3] = b + c;
    pairs[row][4] = b + d;
    pairs[row][5] = c + d;
  });
  V above[kKinds], above_bits[kKinds], below[kKinds], below_bits[kKinds];
  best_halves(pairs[0], pairs[1], 256.0f, above, above_bits);
  best_halves(pairs[2], pairs[3], 1.0f, below, below_bits);
  unroll<kKinds>([&](auto kind) { above[kind] = above[kind] + below[kHalf.rest[kind]]; });
  V best = above[0];
  unroll<kKinds>([&](auto kind) { best = larger(above[kind], best); });
  V bits{};
  unroll<kKinds>([&](auto kind) {
    const V whole = above_bits[kind] + below_bits[kHalf.rest[kind]];
    bits = larger(above[kind] == best ? whole : V{}, bits);
  });
  return bits;
}

// One byte for each place of a row of four: column 0 is the highest bit and the first byte.
constexpr uint8_t kRowBytes[16][4] = {
    {0, 0, 0, 0}, {0, 0, 0, 1}, {0, 0, 1, 0}, {0, 0, 1, 1}, {0, 1, 0, 0}, {0, 1, 0, 1}, {0, 1, 1, 0}, {0, 1, 1, 1},
    {1, 0, 0, 0}, {1, 0, 0, 1}, {1, 0, 1, 0}, {1, 0, 1, 1}, {1, 1, 0, 0}, {1, 1, 0, 1}, {1, 1, 1, 0}, {1, 1, 1, 1}};

inline void store_mask(uint32_t chosen, uint8_t* mask, int64_t columns) {
  for (int row = 0; row < 4; ++row) {
    __builtin_memcpy(mask + row * columns, kRowBytes[chosen >> (12 - 4 * row) & 15u], 4);
  }
}

// As many masks as a vector has lanes, side by side.
template <class V>
TWOFOUR_INLINE inline void store_masks(V bits, int64_t blocks, uint8_t* mask, int64_t columns) {
  constexpr int kAll = sizeof(V) / sizeof(V{}[0]);
  if (blocks == kAll && store_rows(bits, mask, columns)) return;
  for (int64_t lane = 0; lane < blocks; ++lane) {
    store_mask(static_cast<uint32_t>(bits[lane]), mask + 4 * lane, columns);
  }
}

// kLanes blocks or fewer, with sums in double.
TWOFOUR_INLINE inline void choose_wide(const F (&x)[16], int64_t blocks, uint8_t* mask, int64_t columns) {
  F size{};
  unroll<16>([&](auto place) { size = size + magnitude(x[place]); });
  store_masks(best_masks(x), blocks, mask, columns);
  for (int64_t lane = 0; lane < blocks; ++lane) {
    if (__builtin_expect(!(size[lane] <= kLargestPlain), 0)) {
      double any[16];
      for (int place = 0; place < 16; ++place) any[place] = x[place][lane];
      store_mask(transposable_2_4_of_any(any), mask + 4 * lane, columns);
    }
  }
}

template <class V>
TWOFOUR_INLINE inline void to_magnitudes(V (&x)[16]) {
  unroll<16>([&](auto place) { x[place] = magnitude(x[place]); });
}

template <class Score>
void transposable_2_4(const MaskArgs& args, int64_t band0, int64_t band1) {
  const int64_t blocks = args.columns / 4;
  for (int64_t band = band0; band < band1; ++band) {
    const Score* scores = static_cast<const Score*>(args.scores) + 4 * band * args.stride;
    uint8_t* mask = args.mask + 4 * band * args.columns;
    for (int64_t block = 0; block < blocks; block += kLanes) {
      const int64_t now = smaller(kLanes, blocks - block);
      F x[16];
      load_blocks(scores + 4 * block, args.stride, now, x);
      if (args.magnitude) to_magnitudes(x);
      choose_wide(x, now, mask + 4 * block, args.columns);
    }
  }
}

// A bf16 score has 8 bits. Eight of them, none more than 2^13 times another but zeros, are multiples of one number of which
// they make up less than 2^24: every sum is exact in float.
constexpr float kFloatSpread = 0x1p13f, kFloatLargest = 0x1p100f, kFloatSmallest = 0x1p-100f;

inline bool are_close(const Narrow (&x)[16]) {
  Narrow most{}, least = Narrow{} + kFloatLargest;
  unroll<16>([&](auto place) {
    const Narrow size = magnitude(x[place]);
    most = larger(size, most);
    least = lesser(size == Narrow{} ? Narrow{} + kFloatLargest : size, least);
  });
  // NaN are not above anything and no number is above them: the sum of all tells.
  Narrow sum{};
  unroll<16>([&](auto place) { sum = sum + magnitude(x[place]); });
  const auto fine = (most <= least * kFloatSpread) & (least >= Narrow{} + kFloatSmallest) & (most < Narrow{} + kFloatLargest) &
                    (sum == sum);
  int all = -1;
  for (int lane = 0; lane < 2 * kLanes; ++lane) all &= fine[lane];
  return all != 0;
}

template <>
void transposable_2_4<bf16>(const MaskArgs& args, int64_t band0, int64_t band1) {
  const int64_t blocks = args.columns / 4;
  for (int64_t band = band0; band < band1; ++band) {
    const bf16* scores = static_cast<const bf16*>(args.scores) + 4 * band * args.stride;
    uint8_t* mask = args.mask + 4 * band * args.columns;
    for (int64_t block = 0; block < blocks; block += 2 * kLanes) {
      const int64_t now = smaller(2 * kLanes, blocks - block);
      Narrow x[16];
      load_blocks(scores + 4 * block, args.stride, now, x);
      if (args.magnitude) to_magnitudes(x);
      if (__builtin_expect(are_close(x), 1)) {
        store_masks(best_masks(x), now, mask + 4 * block, args.columns);
        continue;
      }
      for (int64_t first = 0; first < now; first += kLanes) {
        F wide[16];
        for (int place = 0; place < 16; ++place) {
          for (int lane = 0; lane < kLanes; ++lane) wide[place][lane] = static_cast<double>(x[place][first + lane]);
        }
        choose_wide(wide, smaller(kLanes, now - first), mask + 4 * (block + first), args.columns);
      }
    }
  }
}
