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
// Three times the bytes of x, but no shuffle in the inner loop. A panel of x alone, from which one vpermt2w per S rows makes
// the pair, lost 6 % with S = 4 and 30 % with S = 2: permutes share a port with the products.
struct ManyPairs {
  using Output = bf16;
  using WeightItem = bf16;
  using Weight = bf16;
  using Offset = uint8_t;
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
      const bf16* rows[kLanes];  // where tokens end the last one again, whose lanes nobody reads
      for (int t = 0; t < kLanes; ++t) rows[t] = x + smaller(v * kLanes + t, tokens - 1) * args.x_stride;
      for (int k = 0; k < columns; k += kColumns) {
        const int count = columns - k < kColumns ? columns - k : kColumns;
        const __mmask32 mask = count == kColumns ? ~0u : (1u << count) - 1u;
        F block[kLanes];
        unroll<kLanes>([&](auto t) TWOFOUR_INLINE {
          const bf16* from = rows[t] + k;
          __builtin_prefetch(from + 2 * kColumns);  // from L2, where prefetch_x left it
          block[t] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
        });
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

  // Offsets in units of eight bytes, so that they fit in one: [half of a tile][group][8 rows, one for those that share a
  // mask]. What 32 bytes of metadata hold makes 32 bytes per half, the zmm below.
  static constexpr int kStepRows = nm::kTileRows / 2;
  static constexpr int kUnit = 8;
  static constexpr int kHalfBytes = (kMaxChunkGroups + 4) * kStepRows;  // the last are loaded, not used
  static constexpr int rows_per_step(int) { return kStepRows; }

  // How 64 bytes are found in the metadata of 4 * S groups: each 128-bit block takes the 16-bit words with the nibbles of
  // its half and its groups, each byte one of those bytes; in `high` ones the nibble is the upper one.
  struct OffsetTables {
    uint16_t word[32];
    uint8_t byte[64], offset[16];
    uint64_t high;
  };
  template <int NV, int S>
  static constexpr OffsetTables offset_tables() {
    static_assert((nm::kPairs - 1) * NV * sizeof(F) / kUnit < 256, "offsets are bytes");
    constexpr int kOfGroup = kStepRows / S, kGroups = 16 / kOfGroup;  // bytes of a group, groups of a block
    constexpr int kWords = S == 1 ? 2 : 1;  // with the nibbles of half a tile; for rows of their own, in two 32-bit words
    OffsetTables tables{};
    for (unsigned nibble = 0; nibble < 16; ++nibble) {
      tables.offset[nibble] = static_cast<uint8_t>(nm::pair_of(nibble) * NV * static_cast<int>(sizeof(F)) / kUnit);
    }
    for (int block = 0; block < 4; ++block) {
      const int first_row = block / 2 * kStepRows, first_group = block % 2 * kGroups;
      for (int of_block = 0; of_block < 16; ++of_block) {
        const int row = first_row + of_block % kOfGroup * S, group = of_block / kOfGroup;
        const int bit = nm::bit_of_row(row, S), slot = kWords * group + (kWords == 2 ? nm::word_of_row(row) : 0);
        const int byte = 16 * block + of_block;
        tables.word[8 * block + slot] = static_cast<uint16_t>((first_group + group) * nm::metadata_bytes(S) / 2 + bit / 16);
        tables.byte[byte] = static_cast<uint8_t>(2 * slot + bit / 8 % 2);
        tables.high |= static_cast<uint64_t>(bit / 4 % 2) << byte;
      }
    }
    return tables;
  }

  template <int NV, int S>
  static void offsets(const uint8_t* metadata, int groups, uint8_t* offsets) {
    static constexpr OffsetTables kTables = offset_tables<NV, S>();
    const I word = _mm512_loadu_si512(kTables.word), byte = _mm512_loadu_si512(kTables.byte);
    const I offset = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kTables.offset)));
    constexpr int kBytes = 32;  // of metadata, and of offsets per half
    const int bytes = groups * nm::metadata_bytes(S);
    for (int b = 0; b < bytes; b += kBytes, offsets += kBytes) {
      const __mmask32 held = ~0u >> (32 - (bytes - b < kBytes ? bytes - b : kBytes));
      const I from = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(held, metadata + b));
      const I found = _mm512_shuffle_epi8(_mm512_permutexvar_epi16(word, from), byte);
      const I low = _mm512_mask_blend_epi8(kTables.high, found, _mm512_srli_epi16(found, 4));
      const I both = _mm512_shuffle_epi8(offset, _mm512_and_si512(low, _mm512_set1_epi8(15)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets + kHalfBytes), _mm512_extracti64x4_epi64(both, 1));
    }
  }

  static const bf16* weights(const bf16* values, int, float*) { return values; }

  // sums[r] += weights of row r * the pair that its offset names, for 8 rows of one group. `offset(i)`: the i-th.
  template <int NV, int S, class OffsetOf>
  TWOFOUR_INLINE static void add_group(const char* panel, OffsetOf&& offset, const bf16* weights, F (&sums)[kStepRows][NV]) {
    const Quad both = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(weights))));
    unroll<2>([&](auto q) TWOFOUR_INLINE {
      // Every row with a load of its own: the loads are the limit, so two quads come by one. Else the shuffles are.
      const Quad quad = S == 1 ? _mm512_shuffle_f32x4(both, both, 0x55 * q)
                               : load_quad(reinterpret_cast<const float*>(weights + q * 4 * nm::kKeep));
      unroll<4 / S>([&](auto s) TWOFOUR_INLINE {
        const char* x = panel + offset(4 / S * q + s) * kUnit;
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
  }

  template <int R, int NV, int S>
  TWOFOUR_INLINE static void step(const char* panel, const uint8_t* offsets, const bf16* weights, int row, int groups,
                                  const char* next_weights, F (&sums)[R][NV]) {
    static_assert(R == kStepRows);
    offsets += row / kStepRows * kHalfBytes;
    weights += row * nm::kKeep;
    const auto add_next = [&](auto&& offset) TWOFOUR_INLINE {
      add_group<NV, S>(panel, offset, weights, sums);
      panel += kPanelRows * NV * sizeof(F);
      weights += nm::kTileRows * nm::kKeep;
    };
    // Two groups at once: a line of the share that is fetched.
    constexpr int kAtOnce = 2;
    const auto prefetch = [&]() TWOFOUR_INLINE {
      __builtin_prefetch(next_weights);
      next_weights += kAtOnce * R * nm::kKeep * sizeof(bf16);
    };
    const int paired = groups - groups % kAtOnce;
    if constexpr (S == 1) {
      // The loads are the limit: the offsets of both groups by one. No more bytes than are used: a load that began inside one
      // store of `offsets` and ended in the next would wait for both.
      const auto of_word = [](uint64_t word) TWOFOUR_INLINE {
        return [=](int i) TWOFOUR_INLINE { return word >> 8 * i & 0xff; };
      };
      uint64_t words[kAtOnce];
      Ahead next;
      const auto load_next = [&]() TWOFOUR_INLINE {
        next = load_ahead(offsets);
        offsets += kAtOnce * kStepRows;
      };
      const auto advance = [&]() TWOFOUR_INLINE {
        unroll<kAtOnce>([&](auto i) TWOFOUR_INLINE { words[i] = arrived<i>(next); });
        load_next();
      };
      load_next();
      advance();
      for (int g = 0; g < paired; g += kAtOnce) {
        prefetch();
        uint64_t now[kAtOnce];
        unroll<kAtOnce>([&](auto i) TWOFOUR_INLINE { now[i] = words[i]; });
        advance();
        unroll<kAtOnce>([&](auto i) TWOFOUR_INLINE { add_next(of_word(now[i])); });
      }
      if (paired != groups) add_next(of_word(words[0]));
    } else {
      const auto add_one = [&]() TWOFOUR_INLINE {
        add_next([=](int i) TWOFOUR_INLINE { return static_cast<uint64_t>(offsets[i]); });
        offsets += kStepRows / S;
      };
      for (int g = 0; g < paired; g += kAtOnce) {
        prefetch();
        unroll<kAtOnce>([&](auto) TWOFOUR_INLINE { add_one(); });
      }
      if (paired != groups) add_one();
    }
  }
};
