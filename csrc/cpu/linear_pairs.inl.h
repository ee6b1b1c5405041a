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

  template <int T>
  TWOFOUR_INLINE static void group(const bf16* slots, const uint8_t* metadata, const bf16* x, F (&sums)[1][T]) {
    const I shuffle = look_up(kPairShuffles, nibbles<0>(metadata));
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
  static constexpr int kPanelPercent = 68;       // of the L1 cache

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

  // Three vectors of 32 words: where the 16 bits with the nibble of a row begin in the metadata of two groups, how far
  // up the nibble is, and the byte offset of its pair (twice, because vpermw reads five bits of the index).
  struct OffsetTables {
    uint16_t word[32], shift[32], offset[32];
  };
  template <int NV>
  static constexpr OffsetTables offset_tables() {
    OffsetTables tables{};
    for (int i = 0; i < 32; ++i) {
      const int row = i % nm::kTileRows, shift = nm::shift_of_row(row);
      tables.word[i] = static_cast<uint16_t>(4 * (i / nm::kTileRows) + 2 * nm::word_of_row(row) + shift / 16);
      tables.shift[i] = static_cast<uint16_t>(shift % 16);
      tables.offset[i] = static_cast<uint16_t>(nm::pair_of(i % 16) * NV * static_cast<int>(sizeof(F)));
    }
    return tables;
  }

  template <int NV>
  static void offsets(const uint8_t* metadata, int groups, uint16_t* offsets) {
    static constexpr OffsetTables kTables = offset_tables<NV>();
    const I word = _mm512_loadu_si512(kTables.word), shift = _mm512_loadu_si512(kTables.shift);
    const I offset = _mm512_loadu_si512(kTables.offset);
    for (int g = 0; g < groups; g += 2) {
      const auto* from = reinterpret_cast<const __m128i*>(metadata + g * nm::kTileMetadataBytes);
      const __m128i bytes = g + 1 < groups ? _mm_loadu_si128(from) : _mm_loadl_epi64(from);
      const I nibbles = _mm512_srlv_epi16(_mm512_permutexvar_epi16(word, _mm512_castsi128_si512(bytes)), shift);
      _mm512_storeu_si512(offsets + g * nm::kTileRows, _mm512_permutexvar_epi16(nibbles, offset));
    }
  }

  static const bf16* weights(const bf16* values, int, float*) { return values; }

  template <int R, int NV>
  TWOFOUR_INLINE static void step(const char* panel, const uint16_t* offsets, const bf16* weights, int row, int groups,
                                  const char* next_weights, F (&sums)[R][NV]) {
    weights += row * nm::kKeep;
    OffsetsAhead<Offset, R> ahead(offsets + row);
    for (int g = 0; g < groups; ++g) {
      __builtin_prefetch(next_weights);
      next_weights += R * nm::kKeep * sizeof(bf16);
      const OffsetsAhead<Offset, R> now = ahead;
      ahead.advance();
      unroll<R / 4>([&](auto q) TWOFOUR_INLINE {
        const Quad quad = load_quad(reinterpret_cast<const float*>(weights + q * 4 * nm::kKeep));
        unroll<4>([&](auto i) TWOFOUR_INLINE {
          const char* x = panel + (now.words[q / 2][q % 2] >> (16 * i) & 0xffff);
          const I w = _mm512_castps_si512(splat<i>(quad));
          F(&to)[NV] = sums[4 * q + i];
          unroll<NV>([&](auto v) TWOFOUR_INLINE {
            to[v] = dot(to[v], w, _mm512_loadu_si512(x + v * sizeof(F)));
          });
        });
      });
      panel += kPanelRows * NV * sizeof(F);
      weights += nm::kTileRows * nm::kKeep;
    }
  }
};
