// Transposable 2:4 masks, kLanes blocks of 4x4 at a time, each in a lane of its own. Plain C++ with the vectors of the
// compiler: this file is compiled once for each instruction set, which sets kLanes.
//
// A vector holds one place of kLanes blocks. Sums of the six pairs of each row, 24 additions; of the 36 halves above and
// below, and the best of each of the 19 kinds, 72; of whole masks, 19. A mask is carried along as the number that its
// bits make (transposable_2_4_of_any), as a double, so that one kind of vector does.

using F = double __attribute__((vector_size(8 * kLanes)));
using Bits = int64_t __attribute__((vector_size(8 * kLanes)));

TWOFOUR_INLINE inline F broadcast(double value) { return F{} + value; }
TWOFOUR_INLINE inline F larger(F a, F b) { return a > b ? a : b; }
TWOFOUR_INLINE inline F magnitude(F a) { return (F)((Bits)a & INT64_MAX); }

// The scores of `blocks` <= kLanes neighbouring blocks; lanes beyond are 0.
template <class Score>
TWOFOUR_INLINE inline void load_blocks(const Score* scores, int64_t stride, int64_t blocks, F (&x)[16]) {
  if (blocks == kLanes) {
    unroll<16>([&](auto place) {
      const Score* from = scores + place / 4 * stride + place % 4;
      unroll<kLanes>([&](auto lane) { x[place][int{lane}] = static_cast<double>(from[4 * lane]); });
    });
    return;
  }
  for (int place = 0; place < 16; ++place) {
    const Score* from = scores + place / 4 * stride + place % 4;
    F lanes{};
    for (int64_t lane = 0; lane < blocks; ++lane) lanes[lane] = static_cast<double>(from[4 * lane]);
    x[place] = lanes;
  }
}

// The best half of each kind, and its bits times `unit`.
TWOFOUR_INLINE inline void best_halves(const F* upper, const F* lower, double unit, F (&sums)[kKinds], F (&bits)[kKinds]) {
  unroll<kHalves>([&](auto half) {
    constexpr int kind = kHalf.kind[decltype(half){}];
    const F sum = upper[half / kPairs] + lower[half % kPairs], own = broadcast(unit * half_bits(half));
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

// The bits of the best masks. Scores are finite and no larger than kLargestPlain.
TWOFOUR_INLINE inline F best_masks(const F (&x)[16]) {
  F pairs[4][kPairs];
  unroll<4>([&](auto row) {
    const F a = x[4 * row], b = x[4 * row + 1], c = x[4 * row + 2], d = x[4 * row + 3];
    pairs[row][0] = a + b;
    pairs[row][1] = a + c;
    pairs[row][2] = a + d;
    pairs[row][3] = b + c;
    pairs[row][4] = b + d;
    pairs[row][5] = c + d;
  });
  F above[kKinds], above_bits[kKinds], below[kKinds], below_bits[kKinds];
  best_halves(pairs[0], pairs[1], 256.0, above, above_bits);
  best_halves(pairs[2], pairs[3], 1.0, below, below_bits);
  unroll<kKinds>([&](auto kind) { above[kind] = above[kind] + below[kHalf.rest[kind]]; });
  F best = above[0];
  unroll<kKinds>([&](auto kind) { best = larger(above[kind], best); });
  F bits{};
  unroll<kKinds>([&](auto kind) {
    const F whole = above_bits[kind] + below_bits[kHalf.rest[kind]];
    bits = larger(above[kind] == best ? whole : F{}, bits);
  });
  return bits;
}

// One byte for each place of a row of four: column 0 is the highest bit and the first byte.
constexpr uint8_t kRowBytes[16][4] = {
    {0, 0, 0, 0}, {0, 0, 0, 1}, {0, 0, 1, 0}, {0, 0, 1, 1}, {0, 1, 0, 0}, {0, 1, 0, 1}, {0, 1, 1, 0}, {0, 1, 1, 1},
    {1, 0, 0, 0}, {1, 0, 0, 1}, {1, 0, 1, 0}, {1, 0, 1, 1}, {1, 1, 0, 0}, {1, 1, 0, 1}, {1, 1, 1, 0}, {1, 1, 1, 1}};

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
      F bits = best_masks(x), size{};
      unroll<16>([&](auto place) { size = size + magnitude(x[place]); });
      for (int64_t lane = 0; lane < now; ++lane) {
        uint32_t chosen = static_cast<uint32_t>(bits[lane]);
        if (__builtin_expect(!(size[lane] <= kLargestPlain), 0)) {
          double any[16];
          for (int place = 0; place < 16; ++place) any[place] = x[place][lane];
          chosen = transposable_2_4_of_any(any);
        }
        for (int row = 0; row < 4; ++row) {
          __builtin_memcpy(mask + row * args.columns + 4 * (block + lane), kRowBytes[chosen >> (12 - 4 * row) & 15u], 4);
        }
      }
    }
  }
}
