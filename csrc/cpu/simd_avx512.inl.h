// Vectors of 16 floats on AVX-512 (F, BW, VL, DQ). Included inside an unnamed namespace: see linear_avx512.cpp.

using F = __m512;   // 16 floats
using I = __m512i;  // 16 32-bit integers
constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;
constexpr int kFewTokens = 8;  // tokens per pass of the few-token kernel

#include "cpu/simd_x86.inl.h"

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline F zero() { return _mm512_setzero_ps(); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

// The first n (0..16) elements; the other lanes are 0 and their memory is not touched.
inline F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_first(float* p, F v, int n) {
  if (n >= kLanes) return store(p, v);
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}

inline F widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
inline F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F load_first(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

// Rounds to nearest even, keeps subnormals and NaN.
inline __m256i rounded(F v) {
#if defined(__AVX512BF16__) && !defined(TWOFOUR_EMULATED_AVX512)
  constexpr int kSubnormal = 0x20;  // vcvtneps2bf16 takes them for 0
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kSubnormal) == 0, 1)) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const I quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const I kept = _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}
inline void store_first(bf16* p, F v, int n) {
  if (n >= kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v));
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(n), rounded(v));
  }
}

// 32 float8 as bf16, exactly; NaN stays NaN.
inline void widen_cell(const E4m3* from, bf16* to) {
  static constexpr E4m3Table kTable = e4m3_table();
  const I quarter[4] = {_mm512_loadu_si512(kTable.entry), _mm512_loadu_si512(kTable.entry + 32),
                        _mm512_loadu_si512(kTable.entry + 64), _mm512_loadu_si512(kTable.entry + 96)};
  const I bits = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const I low = _mm512_permutex2var_epi16(quarter[0], bits, quarter[1]);  // by the lowest six bits
  const I high = _mm512_permutex2var_epi16(quarter[2], bits, quarter[3]);
  const I magnitude = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(bits, _mm512_set1_epi16(64)), low, high);
  const I sign = _mm512_and_si512(_mm512_slli_epi16(bits, 8), _mm512_set1_epi16(static_cast<short>(0x8000)));
  _mm512_storeu_si512(to, _mm512_or_si512(magnitude, sign));
}

// 16 pairs of bf16 -> their first and second members.
inline F first_of_pairs(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline F second_of_pairs(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Lane r: the nibble of row r of the tile in the low bits, the nibbles of other rows above it. S rows share a nibble.
template <int kHalf, int S>
inline I nibbles(const uint8_t* metadata) {
  static_assert(kHalf == 0, "one vector holds the 16 rows");
  if constexpr (S == 4) {
    return _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(bits_of<uint16_t>(metadata))),
                             _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  } else {
    const I words = S == 2 ? _mm512_set1_epi32(static_cast<int>(bits_of<uint32_t>(metadata)))
                           : _mm512_set1_epi64(static_cast<int64_t>(bits_of<uint64_t>(metadata)));
    return _mm512_srlv_epi32(words, _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28));
  }
}
inline I second_index(I nibbles) { return _mm512_srli_epi32(nibbles, 2); }

// The four activations of a group in every 128-bit block; then, per lane, the one that its index names.
inline F group_of(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
inline F select(F group, I index) { return _mm512_permutevar_ps(group, index); }

// Four neighbouring weights, and one of them in all lanes.
using Quad = __m512;
inline Quad load_quad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
template <int kIndex>
inline F splat(Quad quad) {
  return _mm512_permute_ps(quad, kIndex * 0x55);
}

// Per row of the tile: i0 * row_bytes | (i1 * row_bytes) << 16.
template <int S>
inline void row_offsets(const uint8_t* metadata, int row_bytes, uint32_t* offsets) {
  const I nibble = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I i0 = _mm512_and_si512(nibble, _mm512_set1_epi32(3));
  const I both = _mm512_or_si512(i0, _mm512_slli_epi32(_mm512_srli_epi32(nibble, 2), 16));
  const I table = _mm512_mullo_epi16(both, _mm512_set1_epi16(static_cast<short>(row_bytes)));  // hoisted out of loops
  _mm512_storeu_si512(offsets, _mm512_permutexvar_epi32(nibbles<0, S>(metadata), table));
}

inline void transpose(F (&v)[16]) {
  F t[16];
  TWOFOUR_UNROLL
  for (int i = 0; i < 16; i += 4) {  // 4x4 blocks inside the 128-bit blocks
    const F a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const F c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
  }
  TWOFOUR_UNROLL
  for (int j = 0; j < 4; ++j) {  // then the 4x4 of 128-bit blocks
    const F a = _mm512_shuffle_f32x4(t[j], t[j + 4], 0x88), b = _mm512_shuffle_f32x4(t[j], t[j + 4], 0xdd);
    const F c = _mm512_shuffle_f32x4(t[j + 8], t[j + 12], 0x88), d = _mm512_shuffle_f32x4(t[j + 8], t[j + 12], 0xdd);
    v[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// For epilogue.inl.h: one number in all lanes; products, quotients; 1 / v within 2^-13.9; a < b ? yes : no (no for NaN);
// a < b ? a : b; v & mask; and the low nine bits moved into sign and exponent.
inline F all(float value) { return _mm512_set1_ps(value); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F divide(F a, F b) { return _mm512_div_ps(a, b); }
inline F about_one_over(F v) { return _mm512_rcp14_ps(v); }
inline F select_less(F a, F b, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline F lesser(F a, F b) { return _mm512_min_ps(a, b); }
inline F and_bits(F v, uint32_t mask) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(static_cast<int>(mask))));
}
inline F low_bits_as_exponent(F v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23)); }
