// bf16 on vdpbf16ps for the values' gradient: pairs of tokens in the lanes. Included inside an unnamed namespace.

struct MultiplyPairs {
  static constexpr int kTokensPerVector = 2 * kLanes;
  using Vector = I;
  static I load_grad(const char* p) { return _mm512_loadu_si512(p); }
  static F add_product(F sum, I grad, const char* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)grad, (__m512bh)_mm512_loadu_si512(x));
  }
};

struct GradValuesPairs : GradValues<bf16, MultiplyPairs> {
  static I load_row(const bf16* from, int64_t stride, int64_t token, int64_t tokens, int count) {
    if (token >= tokens) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from + token * stride));
  }

  template <int kTogether>
  static void transpose(const void* from, int64_t stride, int64_t tokens, int64_t columns, void* to, int64_t pitch) {
    const bf16* items = static_cast<const bf16*>(from);
    char* rows = static_cast<char*>(to);
    for (int64_t token = 0; token < tokens; token += 2 * kLanes) {
      for (int64_t k = 0; k < columns; k += kLanes) {
        const int count = static_cast<int>(smaller(kLanes, columns - k));
        F block[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          const I even = load_row(items + k, stride, token + 2 * t, tokens, count);
          const I odd = load_row(items + k, stride, token + 2 * t + 1, tokens, count);
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
