// bf16 on vdpbf16ps, which adds the products of a pair of bf16 per 32-bit lane. Included inside an unnamed namespace.

// The input gradient: a pair is two rows of W of one kind, each kind padded to whole pairs with a row of zeros.
//
//   panel row r of 32 tokens, bf16   t0 .. t3 t16 .. t19 | t4 .. t7 t20 .. t23 | ..     per 128-bit block
//   unpack low of rows a, b          (a.t0, b.t0) .. (a.t15, b.t15);  high: tokens 16 .. 31
//   sums[i] += (a, b) * (a.w0, b.w0);  sums[j] += (a, b) * (a.w1, b.w1)
struct GradInputPairs {
  using Element = bf16;
  static constexpr int kStepVectors = 2;
  static constexpr int kRowBytes = kGradRowBytes / 2;
  static constexpr int kSpareRows = 1;  // zeros

  struct Weights {
    uint32_t of_row[kMaxChunkRows + 1];
  };
  static void gather(const bf16* values, int64_t groups, int tiles, int chunk_rows, Weights& weights) {
    for (int tile = 0; tile < tiles; ++tile) {
      const bf16* slots = values + tile * groups * nm::kTileRows * nm::kKeep;
      prefetch_cell(slots);
      _mm512_storeu_si512(weights.of_row + tile * nm::kTileRows, _mm512_loadu_si512(slots));
    }
    weights.of_row[chunk_rows] = 0;
  }

  static void pack(const bf16* grad, int64_t stride, int tokens, int64_t rows, int chunk_rows, int vectors,
                   char* panel) {
    for (int v = 0; v < vectors; v += 2) {
      for (int64_t k = 0; k < rows; k += kLanes) {
        const int count = static_cast<int>(smaller(kLanes, rows - k));
        F halves[2][kLanes];
        for (int half = 0; half < 2; ++half) {
          for (int t = 0; t < kLanes; ++t) {
            halves[half][t] = _mm512_castsi512_ps(row_as_words(grad + k, stride, (v + half) * kLanes + t, tokens, count));
          }
          transpose(halves[half]);
        }
        for (int j = 0; j < count; ++j) {
          _mm512_storeu_si512(panel + (k + j) * kRowBytes + v * static_cast<int>(sizeof(F)) / 2,
                              _mm512_packus_epi32(_mm512_castps_si512(halves[0][j]), _mm512_castps_si512(halves[1][j])));
        }
      }
    }
    __builtin_memset(panel + chunk_rows * kRowBytes, 0, kRowBytes);
  }

  static int filler(int chunk_rows) { return chunk_rows; }

  static I row_as_words(const bf16* from, int64_t stride, int64_t token, int64_t tokens, int count) {
    if (token >= tokens) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from + token * stride));
  }

  template <int NV>
  TWOFOUR_OWN_REGISTERS static void cell(const char* panel, const char* memory, const uint32_t* of_row, float* sums,
                                         bool first) {
    constexpr int kCopies = NV == 2 ? 2 : 1;
    const auto* const ends = reinterpret_cast<const uint16_t*>(memory);
    const auto* const rows = reinterpret_cast<const uint8_t*>(memory + kCellHead);
    F acc[kCopies][nm::kGroup][NV];
    unroll<kCopies>([&](auto u) TWOFOUR_INLINE {
      unroll<nm::kGroup>([&](auto j) TWOFOUR_INLINE {
        unroll<NV>([&](auto v) TWOFOUR_INLINE { acc[u][j][v] = zero(); });
      });
    });
    int entry = 0;
    unroll<nm::kPairs>([&](auto pair) TWOFOUR_INLINE {
      constexpr int i = first_column<pair>(), j = second_column<pair>();
      const int end = ends[pair];
      const auto add_rows = [&](int at, F(&to)[nm::kGroup][NV]) TWOFOUR_INLINE {
        const uint64_t a = rows[at], b = rows[at + 1];
        const char *grad_a = panel + a * kRowBytes, *grad_b = panel + b * kRowBytes;
        const I wa = _mm512_set1_epi32(static_cast<int>(of_row[a])), wb = _mm512_set1_epi32(static_cast<int>(of_row[b]));
        const I w0 = _mm512_mask_blend_epi16(0xaaaaaaaau, wa, _mm512_slli_epi32(wb, 16));
        const I w1 = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(wa, 16), wb);
        unroll<NV / 2>([&](auto v) TWOFOUR_INLINE {
          const I ga = _mm512_loadu_si512(grad_a + v * 64), gb = _mm512_loadu_si512(grad_b + v * 64);
          const I low = _mm512_unpacklo_epi16(ga, gb), high = _mm512_unpackhi_epi16(ga, gb);
          to[i][2 * v] = dot_of(to[i][2 * v], low, w0);
          to[j][2 * v] = dot_of(to[j][2 * v], low, w1);
          to[i][2 * v + 1] = dot_of(to[i][2 * v + 1], high, w0);
          to[j][2 * v + 1] = dot_of(to[j][2 * v + 1], high, w1);
        });
      };
      for (; entry + 2 * kCopies <= end; entry += 2 * kCopies) {
        unroll<kCopies>([&](auto u) TWOFOUR_INLINE { add_rows(entry + 2 * u, acc[u]); });
      }
      if (kCopies > 1) {
        for (; entry < end; entry += 2) add_rows(entry, acc[0]);
      }
    });
    unroll<nm::kGroup>([&](auto j) TWOFOUR_INLINE {
      unroll<NV>([&](auto v) TWOFOUR_INLINE {
        float* place = sums + (j * kGradPanelVectors + v) * kLanes;
        F sum = acc[0][j][v];
        unroll<kCopies - 1>([&](auto u) TWOFOUR_INLINE { sum = add(sum, acc[u + 1][j][v]); });
        store(place, first ? sum : add(sum, load(place)));
      });
    });
  }

  static F dot_of(F sum, I a, I b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);  // C-style: g++ and clang define __m512bh differently
  }

  static void add_cell(const char* panel, const char* memory, const Weights& weights, int vectors, float* sums,
                       bool first) {
    static_assert(kGradPanelVectors == 6, "one case for each number of vectors");
    switch (vectors) {
      case 2: return cell<2>(panel, memory, weights.of_row, sums, first);
      case 4: return cell<4>(panel, memory, weights.of_row, sums, first);
      case 6: return cell<6>(panel, memory, weights.of_row, sums, first);
    }
  }
};

// The values' gradient: a pair is two tokens.
struct MultiplyPairs {
  static constexpr int kTokensPerVector = 2 * kLanes;
  using Vector = I;
  static I load_grad(const char* p) { return _mm512_loadu_si512(p); }
  static F add_product(F sum, I grad, const char* x) {
    return GradInputPairs::dot_of(sum, grad, _mm512_loadu_si512(x));
  }
};

struct GradValuesPairs : GradValues<bf16, MultiplyPairs> {
  template <int kTogether>
  static void transpose(const void* from, int64_t stride, int64_t tokens, int64_t columns, void* to, int64_t pitch) {
    const bf16* items = static_cast<const bf16*>(from);
    char* rows = static_cast<char*>(to);
    for (int64_t token = 0; token < tokens; token += 2 * kLanes) {
      for (int64_t k = 0; k < columns; k += kLanes) {
        const int count = static_cast<int>(smaller(kLanes, columns - k));
        F block[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          const I even = GradInputPairs::row_as_words(items + k, stride, token + 2 * t, tokens, count);
          const I odd = GradInputPairs::row_as_words(items + k, stride, token + 2 * t + 1, tokens, count);
          block[t] = _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
        turn(block);
        for (int j = 0; j < count; ++j) {
          _mm512_storeu_ps(vector_of<kTogether>(rows, pitch, k + j, token / (2 * kLanes)), block[j]);
        }
      }
    }
  }
};
