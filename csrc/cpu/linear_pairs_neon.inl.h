// bf16 on BFDOT, which adds the products of a pair of bf16 per 32-bit lane: the two kept values of a group are one such
// pair. Included inside an unnamed namespace, after the few- and many-token kernels whose cores these are. What
// linear_pairs.inl.h does on AVX-512.

inline bfloat16x8_t load_bf16(const void* p) { return vreinterpretq_bf16_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }

struct FewPairs {
  using WeightItem = bf16;
  using Activation = bf16;
  using Output = bf16;

  static void prepare_group(const bf16* x, bf16* prepared) { __builtin_memcpy(prepared, x, nm::kGroup * sizeof(bf16)); }

  // Groups per step: 16 accumulators hide the latency of BFDOT on four pipes.
  template <int T>
  static constexpr int unrolled() { return T == 1 ? 4 : T == 2 ? 2 : 1; }

  template <int T, int S>
  TWOFOUR_INLINE static void group(const bf16* slots, const uint8_t* metadata, const bf16* x, F (&sums)[kHalves][T]) {
    const uint8x16_t n = row_nibbles<S>(metadata), mask = vdupq_n_u8(0b110);
    const uint8x16_t byte0 = vandq_u8(vshlq_n_u8(n, 1), mask), byte1 = vandq_u8(vshrq_n_u8(n, 1), mask);
    unroll<kHalves>([&](auto half) TWOFOUR_INLINE {
      const uint8x16_t low = half < 2 ? vzip1q_u8(byte0, byte1) : vzip2q_u8(byte0, byte1);
      const uint8x16_t high = vorrq_u8(low, vdupq_n_u8(1));
      const uint8x16_t pairs = half % 2 == 0 ? vzip1q_u8(low, high) : vzip2q_u8(low, high);
      const bfloat16x8_t weights = load_bf16(slots + nm::kKeep * kLanes * half);
      unroll<T>([&](auto t) TWOFOUR_INLINE {
        const uint16x8_t x4 = vcombine_u16(vld1_u16(x + nm::kGroup * t), vdup_n_u16(0));
        const uint8x16_t kept = vqtbl1q_u8(vreinterpretq_u8_u16(x4), pairs);
        sums[half][t] = vbfdotq_f32(sums[half][t], vreinterpretq_bf16_u8(kept), weights);
      });
    });
  }
};

// The panel of a chunk holds all six pairs of every group, so that a kept pair is one load:
//
//   group g   (x0, x1) of NV * 4 tokens | (x0, x2) .. | (x0, x3) .. | (x1, x2) .. | (x1, x3) .. | (x2, x3) ..
struct ManyPairs {
  using Output = bf16;
  using WeightItem = bf16;
  using Weight = bf16;
  using Offset = uint16_t;
  static constexpr int kPanelRows = nm::kPairs;  // rows of tokens per group
  static constexpr int kPanelVectors = 6;        // of tokens
  static constexpr int kPanelPercent = 75;       // of the L1 cache
  static constexpr int rows_per_step(int vectors) { return rows_for_registers(vectors); }

  // The first n (0..8) bf16 of a row; the others are 0 and their memory is not touched.
  static F load_row(const bf16* p, int n) {
    if (n >= 2 * kLanes) return vreinterpretq_f32_u16(vld1q_u16(p));
    bf16 whole[2 * kLanes] = {};
    for (int i = 0; i < n; ++i) whole[i] = p[i];
    return vreinterpretq_f32_u16(vld1q_u16(whole));
  }

  template <int NV>
  static void pack(const LinearArgs& args, int64_t token0, int tokens, int64_t group0, int groups, char* panel) {
    constexpr int kColumns = 2 * kLanes;  // bf16 of one vector along K
    const bf16* x = static_cast<const bf16*>(args.x) + token0 * args.x_stride + group0 * nm::kGroup;
    const int columns = groups * nm::kGroup;
    for (int v = 0; v < NV; ++v) {
      for (int k = 0; k < columns; k += kColumns) {
        const int count = columns - k < kColumns ? columns - k : kColumns;
        F block[kLanes];
        unroll<kLanes>([&](auto t) TWOFOUR_INLINE {
          const int token = v * kLanes + t;
          block[t] = token < tokens ? load_row(x + token * args.x_stride + k, count) : zero();
        });
        transpose(block);  // lane t of block[j]: x[2j], x[2j + 1] of token t
        pack_group<NV>(block[0], block[1], panel + (k / nm::kGroup * kPanelRows * NV + v) * kVectorBytes);
        if (count == kColumns) {
          pack_group<NV>(block[2], block[3], panel + ((k / nm::kGroup + 1) * kPanelRows * NV + v) * kVectorBytes);
        }
      }
    }
  }

  static constexpr int64_t kVectorBytes = sizeof(F);

  // (x0, x1) and (x2, x3) of four tokens -> the six pairs.
  template <int NV>
  static void pack_group(F x0x1, F x2x3, char* out) {
    const uint32x4_t x01 = vreinterpretq_u32_f32(x0x1), x23 = vreinterpretq_u32_f32(x2x3);
    const uint16x8_t words01 = vreinterpretq_u16_u32(x01), words23 = vreinterpretq_u16_u32(x23);
    const uint32x4_t pairs[nm::kPairs] = {x01,
                                          vreinterpretq_u32_u16(vtrn1q_u16(words01, words23)),
                                          vbslq_u32(vdupq_n_u32(0xffff), x01, x23),
                                          vsliq_n_u32(vshrq_n_u32(x01, 16), x23, 16),
                                          vreinterpretq_u32_u16(vtrn2q_u16(words01, words23)),
                                          x23};
    unroll<nm::kPairs>([&](auto p) TWOFOUR_INLINE {
      vst1q_u32(reinterpret_cast<uint32_t*>(out + p * NV * kVectorBytes), pairs[p]);
    });
  }

  // Per nibble: the vectors before its pair. The table has bytes; the offsets in bytes of memory need 16 bits.
  struct PairTable {
    uint8_t pair[16];
  };
  static constexpr PairTable pair_table() {
    PairTable table{};
    for (unsigned nibble = 0; nibble < 16; ++nibble) table.pair[nibble] = static_cast<uint8_t>(nm::pair_of(nibble));
    return table;
  }

  template <int NV, int S>
  static void offsets(const uint8_t* metadata, int groups, uint16_t* offsets) {
    static constexpr PairTable kTable = pair_table();
    constexpr uint16_t kRow = NV * kVectorBytes;
    for (int g = 0; g < groups; ++g, metadata += nm::metadata_bytes(S), offsets += nm::kTileRows) {
      const uint8x16_t nibbles = vandq_u8(row_nibbles<S>(metadata), vdupq_n_u8(15));
      const uint8x16_t pairs = vqtbl1q_u8(vld1q_u8(kTable.pair), nibbles);
      vst1q_u16(offsets, vmulq_n_u16(vmovl_u8(vget_low_u8(pairs)), kRow));
      vst1q_u16(offsets + 8, vmulq_n_u16(vmovl_high_u8(pairs), kRow));
    }
  }

  static const bf16* weights(const bf16* values, int, float*) { return values; }

  template <int R, int NV, int S>
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
        const bfloat16x8_t quad = load_bf16(weights + q * 4 * nm::kKeep);
        unroll<4 / S>([&](auto s) TWOFOUR_INLINE {
          const char* x = panel + (now.words[q / 2][q % 2] >> (16 * S * s) & 0xffff);
          unroll<NV>([&](auto v) TWOFOUR_INLINE {
            const bfloat16x8_t x_v = load_bf16(x + v * kVectorBytes);
            unroll<S>([&](auto i) TWOFOUR_INLINE {
              F& sum = sums[4 * q + S * s + i][v];
              sum = vbfdotq_laneq_f32(sum, x_v, quad, S * s + i);
            });
          });
        });
      });
      panel += kPanelRows * NV * sizeof(F);
      weights += nm::kTileRows * nm::kKeep;
    }
  }
};
