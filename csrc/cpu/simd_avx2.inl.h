// Vectors of 8 floats on AVX2 and FMA. Included inside an unnamed namespace: see linear_avx2.cpp.

using F = __m256;   // 8 floats
using I = __m256i;  // 8 32-bit integers
constexpr int kLanes = 8;
constexpr int kVectorRegisters = 16;
constexpr int kFewTokens = 4;  // tokens per pass of the few-token kernel

#include "cpu/simd_x86.inl.h"

inline F zero() { return _mm256_setzero_ps(); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

inline I first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The first n (0..8) elements; the other lanes are 0 and their memory is not touched.
inline F load_first(const float* p, int n) { return n >= kLanes ? load(p) : _mm256_maskload_ps(p, first_lanes(n)); }
inline void store_first(float* p, F v, int n) {
  if (n >= kLanes) return store(p, v);
  _mm256_maskstore_ps(p, first_lanes(n), v);  // AMD takes dozens of cycles for it
}

inline F widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
inline F load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline F load_first(const bf16* p, int n) {
  if (n >= kLanes) return load(p);
  bf16 whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}

// Rounds to nearest even, keeps subnormals and NaN.
inline void store_first(bf16* p, F v, int n) {
  const I bits = _mm256_castps_si256(v);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const I quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const I high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  if (n >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  } else {
    bf16 whole[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), packed);
    for (int i = 0; i < n; ++i) p[i] = whole[i];
  }
}

// 32 float8 as bf16, exactly; NaN stays NaN.
inline void widen_cell(const E4m3* from, bf16* to) {
  // Numbers below 2^-6 (bits 0 .. 7) by their low and high bytes, all others by arithmetic.
  static constexpr E4m3Table kTable = e4m3_table();
  const __m128i small = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTable.entry));
  const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const I bytes = _mm256_broadcastsi128_si256(_mm_shuffle_epi8(small, apart));
  for (int i = 0; i < 32; i += 16) {
    const I bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    const I magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(127));
    const I normal = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
    const I twice = _mm256_or_si256(magnitude, _mm256_slli_epi16(magnitude, 8));
    const I places = _mm256_add_epi16(twice, _mm256_set1_epi16(8 << 8));
    const I is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
    const I number = _mm256_blendv_epi8(normal, _mm256_shuffle_epi8(bytes, places), is_small);
    const I nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(127)), _mm256_set1_epi16(0x7fff));
    const I sign = _mm256_slli_epi16(_mm256_srli_epi16(bits, 7), 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_or_si256(_mm256_or_si256(number, nan), sign));
  }
}

// 8 pairs of bf16 -> their first and second members.
inline I load_pairs(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline F first_of_pairs(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_pairs(p), 16)); }
inline F second_of_pairs(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_and_si256(load_pairs(p), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Lane r: the nibble of row 8 * kHalf + r of the tile in the low bits, the nibbles of other rows above it. S rows share a
// nibble.
template <int kHalf, int S>
inline I nibbles(const uint8_t* metadata) {
  if constexpr (S == 4) {
    const I word = _mm256_set1_epi32(static_cast<int>(bits_of<uint16_t>(metadata)));
    const int s = 8 * kHalf;
    return _mm256_srlv_epi32(word, _mm256_setr_epi32(s, s, s, s, s + 4, s + 4, s + 4, s + 4));
  } else {
    const I words = S == 2 ? _mm256_set1_epi32(static_cast<int>(bits_of<uint32_t>(metadata)))
                           : _mm256_set1_epi64x(static_cast<int64_t>(bits_of<uint64_t>(metadata)));
    const int s = 16 * kHalf;
    return _mm256_srlv_epi32(words, _mm256_setr_epi32(s, s, s + 4, s + 4, s + 8, s + 8, s + 12, s + 12));
  }
}
inline I second_index(I nibbles) { return _mm256_srli_epi32(nibbles, 2); }

// The four activations of a group in every 128-bit block; then, per lane, the one that its index names. Loaded for each
// use: held for the second half of a tile, they push a sum out of the 16 registers (4096x4096, eight tokens: 3.65 ms held, 3.1 so).
TWOFOUR_INLINE inline F group_of(const float* p) {
  F v;
  asm volatile("vbroadcastf128 %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const __m128_u*>(p)));
  return v;
}
inline F select(F group, I index) { return _mm256_permutevar_ps(group, index); }

// Four neighbouring weights, and one of them in all lanes (a broadcast load needs no shuffle here).
using Quad = const float*;
inline Quad load_quad(const float* p) { return p; }
template <int kIndex>
inline F splat(Quad quad) {
  return _mm256_broadcast_ss(quad + kIndex);
}

// Per lane, from the nibble in its low bits: i0 * row_bytes | (i1 * row_bytes) << 16.
inline I offsets_of(I nibbles, int row_bytes) {
  const I halves = _mm256_blend_epi16(nibbles, _mm256_slli_epi32(nibbles, 14), 0xaa);  // i1: bits 2, 3 -> 16, 17
  const I both = _mm256_and_si256(halves, _mm256_set1_epi32(3 << 16 | 3));
  return _mm256_mullo_epi16(both, _mm256_set1_epi16(static_cast<short>(row_bytes)));
}

// Per row of the tile: i0 * row_bytes | (i1 * row_bytes) << 16.
template <int S>
inline void row_offsets(const uint8_t* metadata, int row_bytes, uint32_t* offsets) {
  auto* to = reinterpret_cast<__m256i*>(offsets);
  _mm256_storeu_si256(to, offsets_of(nibbles<0, S>(metadata), row_bytes));
  _mm256_storeu_si256(to + 1, offsets_of(nibbles<1, S>(metadata), row_bytes));
}

inline void transpose(F (&v)[8]) {
  F t[8];
  TWOFOUR_UNROLL
  for (int i = 0; i < 8; i += 4) {  // 4x4 blocks inside the 128-bit blocks
    const F a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const F c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(c)));
    t[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(c)));
    t[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(b), _mm256_castps_pd(d)));
    t[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(b), _mm256_castps_pd(d)));
  }
  TWOFOUR_UNROLL
  for (int j = 0; j < 4; ++j) {  // then the 2x2 of 128-bit blocks
    v[j] = _mm256_permute2f128_ps(t[j], t[j + 4], 0x20);
    v[j + 4] = _mm256_permute2f128_ps(t[j], t[j + 4], 0x31);
  }
}

// For epilogue.inl.h: one number in all lanes; products, quotients; 1 / v within 2^-13.9; a < b ? yes : no (no for NaN);
// a < b ? a : b; v & mask; and the low nine bits moved into sign and exponent.
inline F all(float value) { return _mm256_set1_ps(value); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F divide(F a, F b) { return _mm256_div_ps(a, b); }
inline F about_one_over(F v) { return divide(all(1), v); }
inline F select_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline F lesser(F a, F b) { return _mm256_min_ps(a, b); }
inline F and_bits(F v, uint32_t mask) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(mask))));
}
inline F low_bits_as_exponent(F v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23)); }
