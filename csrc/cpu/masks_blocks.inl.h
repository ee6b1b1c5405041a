// Transposable 2:4 masks, several blocks of 4x4 at a time, each in a lane of its own. Plain C++ with the vectors of the
// compiler: this file is compiled once for each instruction set, which sets kLanes and may add to masks_rows.inl.h.
//
// A vector holds one place of its blocks. Sums of the six pairs of each row, 24 additions; of the 36 halves above and
// below, and the best of each of the 19 kinds, 72; of whole masks, 19. A mask is carried along as the number that its
// bits make (transposable_2_4_of_any), in the type of the sums, so that one kind of vector does.
//
// Sums are in double. Those of bf16 scores are exact in 32-bit integers too, with twice the lanes, where the scores of a
// block lie close enough together: best_masks_of_integers.

using F = double __attribute__((vector_size(8 * kLanes)));
using Bits = int64_t __attribute__((vector_size(8 * kLanes)));
using Narrow = float __attribute__((vector_size(8 * kLanes)));  // 2 * kLanes blocks
using NarrowBits = int32_t __attribute__((vector_size(8 * kLanes)));

template <class V>
TWOFOUR_INLINE inline V larger(V a, V b) { return a > b ? a : b; }
template <class V>
TWOFOUR_INLINE inline V lesser(V a, V b) { return a < b ? a : b; }
TWOFOUR_INLINE inline F magnitude(F a) { return (F)((Bits)a & INT64_MAX); }

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

// A bf16 score has 8 bits: in units of the last bit of the least that is no zero, scores of up to 2^15 times it are whole
// numbers below 2^22, and eight of them below 2^25. Six bits beside the sum say which half it is: 42 - (6 * p + q), so that of
// equal sums the larger number is the half whose kept places come first. One maximum does for both.
constexpr int kCodeBits = 6, kCodes = 1 << kCodeBits, kFirstCode = 42;
constexpr int kLargestExponent = 227, kSmallestExponent = 27, kExponents = 14;  // of the float, and between two scores

constexpr int packed_pair_bits() {
  int bits = 0;
  for (int p = 0; p < kPairs; ++p) bits |= kPairBits[p] << (4 * p);
  return bits;
}

// Scores as they lie in memory: a lane of words[row][h] has the places 2 * h, below, and 2 * h + 1, above, of its block.
using Words = NarrowBits[4][2];
using Halfwords = uint16_t __attribute__((vector_size(8 * kLanes)));

TWOFOUR_INLINE inline Narrow score_of(const Words& words, int place) {
  const NarrowBits word = words[place / 4][place % 4 / 2];
  return (Narrow)(place % 2 == 0 ? word << 16 : word & INT32_MIN >> 15);
}

// The scores as whole numbers times kCodes; false where they do not lie close enough together, or are no numbers.
TWOFOUR_INLINE inline bool to_integers(const Words& words, NarrowBits (&whole)[16]) {
  Halfwords most{}, least = Halfwords{} - 1;  // one less than the least: zeros, which wrap around, do not count
  unroll<8>([&](auto i) {
    const Halfwords size = (Halfwords)words[i / 2][i % 2] & INT16_MAX;
    most = larger(size, most);
    least = lesser(Halfwords(size - 1), least);
  });
  const NarrowBits low = NarrowBits{} + UINT16_MAX;
  const NarrowBits largest = larger((NarrowBits)most & low, (NarrowBits)most >> 16 & low);
  const NarrowBits smallest = lesser((NarrowBits)least & low, (NarrowBits)least >> 16 & low) + 1;
  const NarrowBits most_exponent = largest >> 7, zeros = largest == 0;
  const NarrowBits exponent = zeros ? NarrowBits{} + 127 : smallest >> 7;
  const NarrowBits far = (most_exponent >= kLargestExponent) |
                         (~zeros & ((exponent < kSmallestExponent) | (most_exponent - exponent > kExponents)));
  if (__builtin_expect(any_lane(far), 0)) return false;
  const Narrow scale = (Narrow)((127 + 127 + 7 + kCodeBits - exponent) << 23);
  unroll<16>([&](auto place) { whole[place] = __builtin_convertvector(score_of(words, place) * scale, NarrowBits); });
  return true;
}

TWOFOUR_INLINE inline void best_halves(const NarrowBits* upper, const NarrowBits* lower, NarrowBits (&best)[kKinds]) {
  unroll<kHalves>([&](auto half) {
    constexpr int kind = kHalf.kind[decltype(half){}];
    const NarrowBits sum = upper[half / kPairs] + lower[half % kPairs];
    if constexpr (kHalf.first[decltype(half){}]) {
      best[kind] = sum;
    } else {
      best[kind] = larger(sum, best[kind]);
    }
  });
}

// The bits of the two rows of a half, the upper above the lower.
TWOFOUR_INLINE inline NarrowBits bits_of_code(NarrowBits code) {
  const NarrowBits half = kFirstCode - code, p = (half * 43) >> 8, q = half - 6 * p;  // a sixth, exactly below 36
  const NarrowBits table = NarrowBits{} + packed_pair_bits();
  return ((table >> (4 * p)) & 15) << 4 | ((table >> (4 * q)) & 15);
}

TWOFOUR_INLINE inline NarrowBits best_masks_of_integers(const NarrowBits (&x)[16]) {
  NarrowBits pairs[4][kPairs];
  unroll<4>([&](auto row) {
    constexpr int step = decltype(row){} % 2 == 0 ? 6 : 1;  // times 6 .. 1 for the six pairs
    const NarrowBits a = x[4 * row] + 4 * step, b = x[4 * row + 1] + 2 * step, c = x[4 * row + 2] + step, d = x[4 * row + 3];
    pairs[row][0] = a + b;
    pairs[row][1] = a + c;
    pairs[row][2] = a + d;
    pairs[row][3] = b + c;
    pairs[row][4] = b + d;
    pairs[row][5] = c + d;
  });
  NarrowBits above[kKinds], below[kKinds];
  best_halves(pairs[0], pairs[1], above);
  best_halves(pairs[2], pairs[3], below);
  // The sum of both halves and the code of the upper one, which tells the kind; the lower half goes along. Four chains side
  // by side, for the time of each.
  constexpr int kChains = 4;
  NarrowBits bests[kChains], rests[kChains];
  const auto take_better = [](NarrowBits sum, NarrowBits with, NarrowBits& best, NarrowBits& rest) {
    rest = sum > best ? with : rest;
    best = larger(sum, best);
  };
  unroll<kKinds>([&](auto kind) {
    constexpr int chain = kind % kChains;
    const NarrowBits other = below[kHalf.rest[kind]], sum = above[kind] + (other & -kCodes);
    if (kind < kChains) {
      bests[chain] = sum;
      rests[chain] = other;
    } else {
      take_better(sum, other, bests[chain], rests[chain]);
    }
  });
  take_better(bests[1], rests[1], bests[0], rests[0]);
  take_better(bests[3], rests[3], bests[2], rests[2]);
  take_better(bests[2], rests[2], bests[0], rests[0]);
  const NarrowBits best = bests[0], rest = rests[0];
  return bits_of_code(best & (kCodes - 1)) << 8 | bits_of_code(rest & (kCodes - 1));
}

// 2 * kLanes blocks side by side.
__attribute__((noinline)) void choose_far(const bf16* scores, int64_t stride, bool magnitude, uint8_t* mask, int64_t columns) {
  for (int64_t column = 0; column < 8 * kLanes; column += 4 * kLanes) {
    F x[16];
    load_blocks(scores + column, stride, kLanes, x);
    if (magnitude) to_magnitudes(x);
    choose_wide(x, kLanes, mask + column, columns);
  }
}

TWOFOUR_INLINE inline void choose_narrow(const bf16* scores, int64_t stride, bool magnitude, uint8_t* mask, int64_t columns) {
  Words words;
  NarrowBits whole[16];
  unroll<4>([&](auto row) {
    load_words(scores + row * stride, words[row]);
    __builtin_prefetch(scores + (row + 4) * stride);  // the next band: streams of four rows end soon
    __builtin_prefetch(scores + (row + 4) * stride + 4 * kLanes);
  });
  if (magnitude) {
    unroll<8>([&](auto i) { words[i / 2][i % 2] &= INT32_MAX & ~(1 << 15); });
  }
  if (__builtin_expect(to_integers(words, whole), 1)) {
    store_masks(best_masks_of_integers(whole), 2 * kLanes, mask, columns);
  } else {
    choose_far(scores, stride, magnitude, mask, columns);
  }
}

template <>
void transposable_2_4<bf16>(const MaskArgs& args, int64_t band0, int64_t band1) {
  constexpr int64_t kColumns = 8 * kLanes;
  const int64_t whole = args.columns / kColumns * kColumns, rest = args.columns - whole;
  for (int64_t band = band0; band < band1; ++band) {
    const bf16* scores = static_cast<const bf16*>(args.scores) + 4 * band * args.stride;
    uint8_t* mask = args.mask + 4 * band * args.columns;
    for (int64_t column = 0; column < whole; column += kColumns) {
      choose_narrow(scores + column, args.stride, args.magnitude, mask + column, args.columns);
    }
    if (rest == 0) continue;
    bf16 last[4 * kColumns] = {};
    uint8_t last_mask[4 * kColumns];
    for (int row = 0; row < 4; ++row) {
      __builtin_memcpy(last + row * kColumns, scores + row * args.stride + whole, sizeof(bf16) * static_cast<unsigned>(rest));
    }
    choose_narrow(last, kColumns, args.magnitude, last_mask, kColumns);
    for (int row = 0; row < 4; ++row) {
      __builtin_memcpy(mask + row * args.columns + whole, last_mask + row * kColumns, static_cast<unsigned>(rest));
    }
  }
}
