// How rows of blocks come into vectors, and masks out of them, on AVX-512 (F, BW, VL, DQ).

using RowF = double __attribute__((vector_size(64)));
using RowBits = int32_t __attribute__((vector_size(64)));

// Lane l of x[c] is the score 4 * l + c of the row.
inline void load_rows(const float* row, RowF* x) {
  const __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + 16);
  const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  unroll<2>([&](auto half) {
    const __m512 two = _mm512_permutex2var_ps(low, _mm512_add_epi32(places, _mm512_set1_epi32(2 * half)), high);
    x[2 * half] = (RowF)_mm512_cvtps_pd(_mm512_castps512_ps256(two));
    x[2 * half + 1] = (RowF)_mm512_cvtps_pd(_mm512_extractf32x8_ps(two, 1));
  });
}

inline void load_rows(const double* row, RowF* x) {
  const __m512i places = _mm512_setr_epi64(0, 4, 8, 12, 0, 4, 8, 12);
  unroll<4>([&](auto c) {
    const __m512i from = _mm512_add_epi64(places, _mm512_set1_epi64(c));
    const __m512d low = _mm512_permutex2var_pd(_mm512_loadu_pd(row), from, _mm512_loadu_pd(row + 8));
    const __m512d high = _mm512_permutex2var_pd(_mm512_loadu_pd(row + 16), from, _mm512_loadu_pd(row + 24));
    x[c] = (RowF)_mm512_shuffle_f32x4(_mm512_castpd_ps(low), _mm512_castpd_ps(high), 0x44);
  });
}

inline void load_words(const bf16* row, RowBits (&words)[2]) {
  const __m512i low = _mm512_loadu_si512(row), high = _mm512_loadu_si512(row + 32);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  words[0] = (RowBits)_mm512_permutex2var_epi32(low, even, high);
  words[1] = (RowBits)_mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

inline bool any_lane(RowBits v) { return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0; }

// By the four bits of a row, column 0 the highest: one byte for each place, the first lowest.
alignas(64) constexpr uint32_t kRowWords[16] = {
    0x00000000, 0x01000000, 0x00010000, 0x01010000, 0x00000100, 0x01000100, 0x00010100, 0x01010100,
    0x00000001, 0x01000001, 0x00010001, 0x01010001, 0x00000101, 0x01000101, 0x00010101, 0x01010101};

inline __m512i row_words(__m512i bits, int row) {
  const __m512i own = _mm512_and_si512(_mm512_srli_epi32(bits, static_cast<unsigned>(12 - 4 * row)), _mm512_set1_epi32(15));
  return _mm512_permutexvar_epi32(own, _mm512_load_si512(kRowWords));
}

inline bool store_rows(RowBits bits, uint8_t* mask, int64_t columns) {
  unroll<4>([&](auto row) { _mm512_storeu_si512(mask + row * columns, row_words((__m512i)bits, row)); });
  return true;
}

inline bool store_rows(RowF bits, uint8_t* mask, int64_t columns) {
  const __m512i whole = _mm512_castsi256_si512(_mm512_cvttpd_epi32((__m512d)bits));
  unroll<4>([&](auto row) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + row * columns), _mm512_castsi512_si256(row_words(whole, row)));
  });
  return true;
}

inline void load_rows(const bf16* row, RowF* x) {
  const __m512i all = _mm512_loadu_si512(row);
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  unroll<4>([&](auto c) {
    const __m512i from = _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(c)), 16);
    const __m512i scores = _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, all);
    x[c] = (RowF)_mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_castsi512_ps(scores)));
  });
}

inline void store_soft(const RowF* x, float* row) {
  __m512 two[2];
  unroll<2>([&](auto half) {
    const __m256 low = _mm512_cvtpd_ps((__m512d)x[2 * half]), high = _mm512_cvtpd_ps((__m512d)x[2 * half + 1]);
    two[half] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  });
  const __m512i places = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  _mm512_storeu_ps(row, _mm512_permutex2var_ps(two[0], places, two[1]));
  _mm512_storeu_ps(row + 16, _mm512_permutex2var_ps(two[0], _mm512_add_epi32(places, _mm512_set1_epi32(4)), two[1]));
}
