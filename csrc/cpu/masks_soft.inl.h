// Soft thresholds of 2:4, kLanes groups at a time, and of transposable 2:4, kLanes blocks at a time (masks_blocks.inl.h).

// What is left of four weights above the second smallest magnitude.
TWOFOUR_INLINE inline void shrink(F (&x)[4], double scale) {
  F size[4], nothing{};
  unroll<4>([&](auto c) {
    size[c] = magnitude(x[c]);
    nothing = nothing + (x[c] != x[c] ? x[c] : F{});  // NaN where one is
  });
  const F dropped = lesser(larger(lesser(size[0], size[1]), lesser(size[2], size[3])),
                           lesser(larger(size[0], size[1]), larger(size[2], size[3])));
  unroll<4>([&](auto c) {
    const F inside = lesser(larger(x[c], -dropped), dropped);
    x[c] = (x[c] - inside) * scale + nothing;
  });
}

template <class Score>
void soft_2_4(const SoftArgs& args, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; ++row) {
    const Score* weight = static_cast<const Score*>(args.weight) + row * args.stride;
    float* soft = args.soft + row * args.columns;
    for (int64_t column = 0; column < args.columns; column += 4 * kLanes) {
      const int64_t now = smaller(4 * kLanes, args.columns - column);
      F x[4];
      if (now == 4 * kLanes) {
        load_rows(weight + column, x);
        shrink(x, args.scale);
        store_soft(x, soft + column);
        continue;
      }
      for (int c = 0; c < 4; ++c) {
        x[c] = F{};
        for (int64_t lane = 0; lane < now / 4; ++lane) x[c][lane] = widened(weight[column + 4 * lane + c]);
      }
      shrink(x, args.scale);
      for (int64_t i = 0; i < now; ++i) soft[column + i] = static_cast<float>(x[i % 4][i / 4]);
    }
  }
}

// For each half, two rows with a pair of places kept in each, the best half that completes it; so for each pair of each row
// the best mask that has it; and the best without a place is the best of the three pairs of its row that leave it out.

// The best sum of the other half for each kind, given the sums of the pairs of its two rows.
TWOFOUR_INLINE inline void best_sums(const F* upper, const F* lower, F (&best)[kKinds]) {
  unroll<kHalves>([&](auto half) {
    constexpr int kind = kHalf.kind[decltype(half){}];
    const F sum = upper[half / kPairs] + lower[half % kPairs];
    if constexpr (kHalf.first[decltype(half){}]) {
      best[kind] = sum;
    } else {
      best[kind] = larger(sum, best[kind]);
    }
  });
}

// For each pair of the two rows, the best whole mask that keeps it, given the best other halves.
TWOFOUR_INLINE inline void best_with(const F* upper, const F* lower, const F (&others)[kKinds], F* with_upper, F* with_lower) {
  unroll<kHalves>([&](auto half) {
    constexpr int p = decltype(half){} / kPairs, q = decltype(half){} % kPairs;
    const F whole = upper[p] + lower[q] + others[kHalf.rest[kHalf.kind[decltype(half){}]]];
    if constexpr (q == 0) {
      with_upper[p] = whole;
    } else {
      with_upper[p] = larger(whole, with_upper[p]);
    }
    if constexpr (p == 0) {
      with_lower[q] = whole;
    } else {
      with_lower[q] = larger(whole, with_lower[q]);
    }
  });
}

template <class Score>
void soft_2_4t(const SoftArgs& args, int64_t band0, int64_t band1) {
  const int64_t blocks = args.columns / 4;
  for (int64_t band = band0; band < band1; ++band) {
    const Score* weight = static_cast<const Score*>(args.weight) + 4 * band * args.stride;
    float* soft = args.soft + 4 * band * args.columns;
    for (int64_t block = 0; block < blocks; block += kLanes) {
      const int64_t now = smaller(kLanes, blocks - block);
      F x[16], pairs[4][kPairs], with[4][kPairs], best_above[kKinds], best_below[kKinds];
      load_blocks(weight + 4 * block, args.stride, now, x);
      unroll<4>([&](auto row) {
        const F a = magnitude(x[4 * row]), b = magnitude(x[4 * row + 1]), c = magnitude(x[4 * row + 2]),
                d = magnitude(x[4 * row + 3]);
        pairs[row][0] = a + b;
        pairs[row][1] = a + c;
        pairs[row][2] = a + d;
        pairs[row][3] = b + c;
        pairs[row][4] = b + d;
        pairs[row][5] = c + d;
      });
      best_sums(pairs[0], pairs[1], best_above);
      best_sums(pairs[2], pairs[3], best_below);
      best_with(pairs[0], pairs[1], best_below, with[0], with[1]);
      best_with(pairs[2], pairs[3], best_above, with[2], with[3]);
      F best = with[0][0], size{};
      unroll<kPairs>([&](auto p) { best = larger(with[0][p], best); });
      unroll<16>([&](auto place) { size = size + magnitude(x[place]); });
      const F nothing = size - size;  // NaN where a number is none, else 0
      unroll<16>([&](auto place) {
        constexpr int row = decltype(place){} / 4, column = decltype(place){} % 4;
        // Pairs without the column, in the order of kPairBits: 01 02 03 12 13 23.
        constexpr int out[4][3] = {{3, 4, 5}, {1, 2, 5}, {0, 2, 4}, {0, 1, 3}};
        const F without =
            larger(with[row][out[column][0]], larger(with[row][out[column][1]], with[row][out[column][2]]));
        const F gain = lesser(best - without, magnitude(x[place])) * args.scale;
        x[place] = (F)(((Bits)x[place] & INT64_MIN) | (Bits)(gain > F{} ? gain : F{})) + nothing;
        x[place] = gain > F{} ? x[place] : nothing;
      });
      if (now == kLanes) {
        unroll<4>([&](auto row) { store_soft(x + 4 * row, soft + row * args.columns + 4 * block); });
        continue;
      }
      for (int place = 0; place < 16; ++place) {
        for (int64_t lane = 0; lane < now; ++lane) {
          soft[place / 4 * args.columns + 4 * (block + lane) + place % 4] = static_cast<float>(x[place][lane]);
        }
      }
    }
  }
}
