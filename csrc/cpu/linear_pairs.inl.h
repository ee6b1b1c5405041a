// bf16 on vdpbf16ps, which adds the products of a pair of bf16 per 32-bit lane: the two kept values of a group are one
// such pair. Included inside an unnamed namespace, after the few- and many-token kernels whose cores these are.

inline F dot(F sum, I a, I b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);  // C-style: g++ and clang define __m512bh differently
}

// A table of 16 32-bit entries, one per nibble.
struct NibbleTable {
  uint32_t entry[16];
};

// For a 4-bit nibble: the bytes of the two kept bf16 of a group, as vpshufb reads them.
constexpr NibbleTable pair_shuffles() {
  NibbleTable table{};
  for (unsigned nibble = 0; nibble < 16; ++nibble) {
    const uint32_t a = 2 * nm::first_of(nibble), b = 2 * nm::second_of(nibble);
    table.entry[nibble] = a | (a + 1) << 8 | b << 16 | (b + 1) << 24;
  }
  return table;
}
constexpr NibbleTable kPairShuffles = pair_shuffles();

// Looks up the low four bits of every lane; vpermd ignores the others.
inline I look_up(const NibbleTable& table, I nibbles) {
  return _mm512_permutexvar_epi32(nibbles, _mm512_loadu_si512(table.entry));
}

struct FewPairs {
  using WeightItem = bf16;
  using Activation = bf16;
  using Output = bf16;

  static void prepare_group(const bf16* x, bf16* prepared) { __builtin_memcpy(prepared, x, nm::kGroup * sizeof(bf16)); }

  // Groups per step: 12 accumulators hide the latency of vdpbf16ps; the selects leave time, so 6 to 8 are enough.
  template <int T>
  static constexpr int unrolled() { return T <= 3 ? 4 : T <= 6 ? 2 : 1; }

  template <int T, int S>
  TWOFOUR_INLINE static void group(const bf16* slots, const uint8_t* metadata, const bf16* x, F (&sums)[1][T]) {
    const I shuffle = look_up(kPairShuffles, nibbles<0, S>(metadata));
    const I weights = _mm512_loadu_si512(slots);
    unroll<T>([&](auto t) TWOFOUR_INLINE {
      const I x4 = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + nm::kGroup * t)));
      sums[0][t] = dot(sums[0][t], _mm512_shuffle_epi8(x4, shuffle), weights);
    });
  }
};

// The panel of a chunk holds all six pairs of every group, so that a kept pair is one memory operand:
//
//   group g   (x0, x1) of NV * 16 tokens | (x0, x2) .. | (x0, x3) .. | (x1, x2) .. | (x1, x3) .. | (x2, x3) ..
//
// Three times the bytes of x, but no shuffle in the inner loop.
struct ManyPairs {
  using Output = bf16;
  using WeightItem = bf16;
  using Weight = bf16;
  using Offset = uint16_t;
  static constexpr int kPanelRows = nm::kPairs;  // rows of tokens per group
  // Few vectors, so that a chunk has many groups: between chunks the sums go to the L2 cache and back (with 6 vectors a
  // chunk has 16 groups, and that takes 10 % of the time).
  static constexpr int kPanelVectors = 3;
  static constexpr int kPanelPercent = 77;       // of the L1 cache

  template <int NV>
  static void pack(const LinearArgs& args, int64_t token0, int tokens, int64_t group0, int groups, char* panel) {
    constexpr int kColumns = 2 * kLanes;  // bf16 of one vector along K
    const bf16* x = static_cast<const bf16*>(args.x) + token0 * args.x_stride + group0 * nm::kGroup;
    const int columns = groups * nm::kGroup;
    const I low_low = pair_words(0, 0), high_low = pair_words(1, 0), high_high = pair_words(1, 1);
    for (int v = 0; v < NV; ++v) {
      for (int k = 0; k < columns; k += kColumns) {
        const int count = columns - k < kColumns ? columns - k : kColumns;
        const __mmask32 mask = count == kColumns ? ~0u : (1u << count) - 1u;
        F block[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          const int token = v * kLanes + t;
          block[t] = token < tokens ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x + token * args.x_stride + k))
                                    : zero();
        }
        transpose(block);  // lane t of block[j]: x[2j], x[2j + 1] of token t
        for (int g = 0; g < count / nm::kGroup; ++g) {
          const I x01 = _mm512_castps_si512(block[2 * g]), x23 = _mm512_castps_si512(block[2 * g + 1]);
          const I pairs[nm::kPairs] = {x01,
                                       _mm512_permutex2var_epi16(x01, low_low, x23),
                                       _mm512_mask_blend_epi16(0xaaaaaaaau, x01, x23),
                                       _mm512_permutex2var_epi16(x01, high_low, x23),
                                       _mm512_permutex2var_epi16(x01, high_high, x23),
                                       x23};
          char* out = panel + ((k / nm::kGroup + g) * kPanelRows * NV + v) * static_cast<int64_t>(sizeof(F));
          for (int p = 0; p < nm::kPairs; ++p) _mm512_storeu_si512(out + p * NV * sizeof(F), pairs[p]);
        }
      }
    }
  }

  // Control of vpermt2w: per 32-bit lane, word `a` of the first operand and word `b` of the second.
  static I pair_words(int a, int b) {
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I base = _mm512_mullo_epi32(lane, _mm512_set1_epi32(2 | 2 << 16));
    return _mm512_add_epi32(base, _mm512_set1_epi32(a | (32 + b) << 16));
  }

  // Three vectors of 32 words for 16 bytes of metadata: which 16 bits of them have the nibble, how far up it is, and the
  // byte offset of its pair (twice, because vpermw reads five bits of the index). 32 nibbles are those of two groups, or of
  // 2 * S where S rows share one.
  struct OffsetTables {
    uint16_t word[32], shift[32], offset[32];
  };
  template <int NV, int S>
  static constexpr OffsetTables offset_tables() {
    OffsetTables tables{};
    for (int i = 0; i < 32; ++i) {
      const int bit = S == 1 ? 8 * nm::kTileMetadataBytes * (i / nm::kTileRows) + nm::bit_of_row(i % nm::kTileRows, 1) : 4 * i;
      tables.word[i] = static_cast<uint16_t>(bit / 16);
      tables.shift[i] = static_cast<uint16_t>(bit % 16);
      tables.offset[i] = static_cast<uint16_t>(nm::pair_of(i % 16) * NV * static_cast<int>(sizeof(F)));
    }
    return tables;
  }

  // The first n bytes, and zeros behind them where there are fewer than 16.
  static __m128i load_bytes(const uint8_t* p, int n) {
    if (n >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    uint8_t bytes[16] = {};
    __builtin_memcpy(bytes, p, static_cast<size_t>(n));
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  }

  // [groups][rows of a tile, one for those that share a mask].
  template <int NV, int S>
  static void offsets(const uint8_t* metadata, int groups, uint16_t* offsets) {
    static constexpr OffsetTables kTables = offset_tables<NV, S>();
    const I word = _mm512_loadu_si512(kTables.word), shift = _mm512_loadu_si512(kTables.shift);
    const I offset = _mm512_loadu_si512(kTables.offset);
    const int bytes = groups * nm::metadata_bytes(S);
    for (int b = 0; b < bytes; b += 16, offsets += 32) {
      const I from = _mm512_castsi128_si512(load_bytes(metadata + b, bytes - b));
      const I nibbles = _mm512_srlv_epi16(_mm512_permutexvar_epi16(word, from), shift);
      _mm512_storeu_si512(offsets, _mm512_permutexvar_epi16(nibbles, offset));
    }
  }

  static const bf16* weights(const bf16* values, int, float*) { return values; }

  template <int R, int NV, int S>
  TWOFOUR_INLINE static void step(const char* panel, const uint16_t* offsets, const bf16* weights, int row, int groups,
                                  const char* next_weights, F (&sums)[R][NV]) {
    weights += row * nm::kKeep;
    OffsetsAhead<Offset, R, S> ahead(offsets + row / S);
    for (int g = 0; g < groups; ++g) {
      __builtin_prefetch(next_weights);
      next_weights += R * nm::kKeep * sizeof(bf16);
      const OffsetsAhead<Offset, R, S> now = ahead;
      ahead.advance();
      unroll<R / 4>([&](auto q) TWOFOUR_INLINE {
        const Quad quad = load_quad(reinterpret_cast<const float*>(weights + q * 4 * nm::kKeep));
        unroll<4 / S>([&](auto s) TWOFOUR_INLINE {
          constexpr int offset = 4 / S * q + s;
          const char* x = panel + (now.words[offset / 8][offset / 4 % 2] >> (16 * (offset % 4)) & 0xffff);
          I w[S];
          unroll<S>([&](auto i) TWOFOUR_INLINE { w[i] = _mm512_castps_si512(splat<S * s + i>(quad)); });
          unroll<NV>([&](auto v) TWOFOUR_INLINE {
            const I x_v = _mm512_loadu_si512(x + v * sizeof(F));
            unroll<S>([&](auto i) TWOFOUR_INLINE {
              F& sum = sums[4 * q + S * s + i][v];
              sum = dot(sum, w[i], x_v);
            });
          });
        });
      });
      panel += kPanelRows * NV * sizeof(F);
      weights += nm::kTileRows * nm::kKeep;
    }
  }
};
