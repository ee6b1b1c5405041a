// The inner loop of many tokens for the 16 registers of AVX2. Included inside an unnamed namespace, after linear_many.inl.h,
// whose layout and chunks it shares.
//
// Twelve sums, two weights and an activation leave one register, and the compilers do not find that arrangement: they
// move products between registers, and what goes to the stack and back lengthens the chain of its sum. So each product
// is one instruction that names its sum, in this order:
//
//   every row its own mask   pair of weights, loaded once and spread by two shuffles (they have ports of their own,
//                            loads are the limit); each activation is the memory operand of its product
//   rows share a mask        two weights in all lanes; each activation loaded once for the products of both rows
//
// Share of the machine's FMAs in the loop alone, NV = 6, Zen 4: 0.73 -> 0.80 and 0.78 -> 0.98.

TWOFOUR_INLINE inline void add_product(F& sum, F w, F x) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
}
TWOFOUR_INLINE inline void add_product(F& sum, F w, const float* x) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "m"(*reinterpret_cast<const __m256_u*>(x)));
}
TWOFOUR_INLINE inline F in_all_lanes(const float* p) {
  F v;
  asm volatile("vbroadcastss %1, %0" : "=x"(v) : "m"(*p));
  return v;
}
// p[0] and p[1], each in all lanes.
TWOFOUR_INLINE inline void two_in_all_lanes(const float* p, F& v0, F& v1) {
  F pairs;
  asm volatile("vbroadcastsd %1, %0" : "=x"(pairs) : "m"(*reinterpret_cast<const double*>(p)));
  asm volatile("vmovsldup %1, %0" : "=x"(v0) : "x"(pairs));
  asm volatile("vmovshdup %1, %0" : "=x"(v1) : "x"(pairs));
}

// The offsets of R rows, those of two rows in a word, each loaded two groups ahead of its turn. Vector registers have no
// room for them (as OffsetsAhead has it), and Zen 4 loses nothing by that. Rows that share a mask share an offset.
template <int R, int S>
struct OffsetWords {
  static constexpr int kWords = S == 4 && R >= 4 ? R / 4 : S == 4 ? 1 : R / 2;
  static constexpr int kStride = nm::kTileRows / S;  // offsets of a group
  uint64_t now[kWords], next[kWords], after[kWords];
  const uint32_t* offsets;

  TWOFOUR_INLINE OffsetWords(const uint32_t* first, int row) : offsets(first + row / S) {
    load(next);
    load(after);
  }
  TWOFOUR_INLINE void load(uint64_t (&words)[kWords]) {
    unroll<kWords>([&](auto i) TWOFOUR_INLINE {
      if constexpr (S == 1) __builtin_memcpy(&words[i], offsets + 2 * i, sizeof words[i]);
      if constexpr (S != 1) words[i] = offsets[i];
      asm volatile("" : "+r"(words[i]));  // here, not where it is used
    });
    offsets += kStride;
  }
  TWOFOUR_INLINE void advance() {
    unroll<kWords>([&](auto i) TWOFOUR_INLINE {
      now[i] = next[i];
      next[i] = after[i];
    });
    load(after);
  }
  TWOFOUR_INLINE uint64_t of_pair(int pair) const { return now[S == 4 ? pair / 2 : pair]; }
};

template <class Item, class Token = Item>
struct ManyAvx2 : ManyWide<Item, Token> {
  using Offset = typename ManyWide<Item, Token>::Offset;

  // [groups][rows of a tile, one for those that share a mask].
  template <int NV, int S>
  static void offsets(const uint8_t* metadata, int groups, Offset* offsets) {
    constexpr int kRowBytes = NV * kLanes * static_cast<int>(sizeof(float));
    if constexpr (S == 1) {
      ManyWide<Item, Token>::template offsets<NV, S>(metadata, groups, offsets);
    } else {  // one nibble behind the other
      const I shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      const int bytes = groups * nm::metadata_bytes(S);
      for (int b = 0; b < bytes; b += 4, offsets += kLanes) {
        const uint32_t word = b + 4 <= bytes ? bits_of<uint32_t>(metadata + b) : bits_of<uint16_t>(metadata + b);
        const I nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets), offsets_of(nibbles, kRowBytes));
      }
    }
  }

  template <int R, int NV, int S>
  TWOFOUR_INLINE static void step(const char* panel, const Offset* offsets, const float* weights, int row, int groups,
                                  const char* next_weights, F (&sums)[R][NV]) {
    weights += row;
    OffsetWords<R, S> words(offsets, row);
    for (int g = 0; g < groups; ++g) {
      __builtin_prefetch(next_weights);
      next_weights += R * nm::kKeep * sizeof(Item);
      words.advance();
      unroll<nm::kKeep>([&](auto k) TWOFOUR_INLINE {
        unroll<R / 2>([&](auto pair) TWOFOUR_INLINE {
          const float* const w = weights + k * nm::kTileRows + 2 * pair;
          const uint64_t word = words.of_pair(pair);
          const auto* x0 = reinterpret_cast<const float*>(panel + (word >> (16 * k) & 0xffff));
          F w0, w1;
          if constexpr (S == 1) {
            const auto* x1 = reinterpret_cast<const float*>(panel + (word >> (16 * k + 32) & 0xffff));
            two_in_all_lanes(w, w0, w1);
            unroll<NV>([&](auto v) TWOFOUR_INLINE { add_product(sums[2 * pair][v], w0, x0 + v * kLanes); });
            unroll<NV>([&](auto v) TWOFOUR_INLINE { add_product(sums[2 * pair + 1][v], w1, x1 + v * kLanes); });
          } else {
            w0 = in_all_lanes(w);
            w1 = in_all_lanes(w + 1);
            unroll<NV>([&](auto v) TWOFOUR_INLINE {
              const F x_v = load(x0 + v * kLanes);
              add_product(sums[2 * pair][v], w0, x_v);
              add_product(sums[2 * pair + 1][v], w1, x_v);
            });
          }
        });
      });
      panel += ManyAvx2::kPanelRows * NV * sizeof(F);
      weights += nm::kTileRows * nm::kKeep;
    }
  }
};
