// Stands in front of the compiler's <immintrin.h> where AVX-512 is emulated (`make emulated`): the names of its
// intrinsics mean SIMDe's functions in plain C, and those that SIMDe 0.7 lacks are written out here. So the kernels for
// AVX-512 run, and are checked, on machines without it. They are the same sources; only the speed is another.
#pragma once

#include_next <immintrin.h>  // before SIMDe, whose macros would rename what it declares

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstring>

namespace twofour_emulated {
namespace {

template <class Element, class Vector>
Element get(const Vector& v, int i) {
  Element element;
  std::memcpy(&element, reinterpret_cast<const char*>(&v) + i * static_cast<int>(sizeof element), sizeof element);
  return element;
}
template <class Element, class Vector>
void set(Vector& v, int i, Element element) {
  std::memcpy(reinterpret_cast<char*>(&v) + i * static_cast<int>(sizeof element), &element, sizeof element);
}

// Memory of elements whose bit is not set is not touched.
template <class Element, class Vector>
Vector load_masked(unsigned mask, const void* p) {
  Vector v;
  std::memset(&v, 0, sizeof v);
  for (int i = 0; i < static_cast<int>(sizeof v / sizeof(Element)); ++i) {
    if (mask >> i & 1) std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof(Element), static_cast<const Element*>(p) + i, sizeof(Element));
  }
  return v;
}
template <class Element, class Vector>
void store_masked(void* p, unsigned mask, const Vector& v) {
  for (int i = 0; i < static_cast<int>(sizeof v / sizeof(Element)); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<Element*>(p) + i, reinterpret_cast<const char*>(&v) + i * sizeof(Element), sizeof(Element));
  }
}

// The first elements of `from`, each turned into an element of the result.
template <class To, class From, class Result, class Vector, class Function>
Result map(const Vector& from, Function function) {
  Result result;
  for (int i = 0; i < static_cast<int>(sizeof result / sizeof(To)); ++i) set<To>(result, i, function(get<From>(from, i)));
  return result;
}

inline __m512 permute_by_low_bits(__m512 v, __m512i control) {
  __m512 result;
  for (int i = 0; i < 16; ++i) set<float>(result, i, get<float>(v, i / 4 * 4 + (get<int32_t>(control, i) & 3)));
  return result;
}
inline __m512 permute_by_constant(__m512 v, int control) {
  __m512 result;
  for (int i = 0; i < 16; ++i) set<float>(result, i, get<float>(v, i / 4 * 4 + (control >> 2 * (i % 4) & 3)));
  return result;
}
// Lane `from[i]` of two vectors side by side, where the bit is set; 0 elsewhere.
template <class Element, class Index, class Vector>
Vector permute_two(uint64_t mask, const Vector& low, __m512i from, const Vector& high) {
  constexpr int kCount = static_cast<int>(sizeof(Vector) / sizeof(Element));
  Vector result;
  for (int i = 0; i < kCount; ++i) {
    const int place = static_cast<int>(get<Index>(from, i)) & (2 * kCount - 1);
    set<Element>(result, i, !(mask >> i & 1) ? Element{} : get<Element>(place < kCount ? low : high, place % kCount));
  }
  return result;
}
inline __m512i compressed(unsigned mask, __m512i v) {
  __m512i result = simde_mm512_setzero_si512();
  int count = 0;
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) set<int32_t>(result, count++, get<int32_t>(v, i));
  }
  return result;
}
template <class Element, class Vector, class Half>
Half half_of(const Vector& v, int which) {
  Half result;
  std::memcpy(&result, reinterpret_cast<const char*>(&v) + which * static_cast<int>(sizeof result), sizeof result);
  return result;
}
template <class Vector, class Half>
Vector with_half(Vector v, const Half& half, int which) {
  std::memcpy(reinterpret_cast<char*>(&v) + which * static_cast<int>(sizeof half), &half, sizeof half);
  return v;
}
inline unsigned largest(__m512i v) {
  unsigned most = 0;
  for (int i = 0; i < 16; ++i) most = get<uint32_t>(v, i) > most ? get<uint32_t>(v, i) : most;
  return most;
}

}  // namespace
}  // namespace twofour_emulated

// SIMDe's are macros of two arguments, and nibbles<0, S>(..) has a comma.
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32(...) simde_mm512_permutexvar_epi32(__VA_ARGS__)
#define _mm512_shuffle_f32x4(a, b, control) simde_mm512_shuffle_f32x4(a, b, control)
#undef _mm512_and_si512
#define _mm512_and_si512(...) simde_mm512_and_si512(__VA_ARGS__)

#define _mm512_rcp14_ps(v) simde_mm512_div_ps(simde_mm512_set1_ps(1), v)
#define _mm512_maskz_loadu_ps(mask, p) (twofour_emulated::load_masked<float, __m512>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (twofour_emulated::store_masked<float>(p, mask, v))
#define _mm512_maskz_loadu_epi16(mask, p) (twofour_emulated::load_masked<int16_t, __m512i>(mask, p))
#define _mm256_maskz_loadu_epi8(mask, p) (twofour_emulated::load_masked<int8_t, __m256i>(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (twofour_emulated::load_masked<int16_t, __m256i>(mask, p))
#define _mm256_mask_storeu_epi16(p, mask, v) (twofour_emulated::store_masked<int16_t>(p, mask, v))
#define _mm512_permutevar_ps(v, control) (twofour_emulated::permute_by_low_bits(v, control))
#define _mm512_permute_ps(v, control) (twofour_emulated::permute_by_constant(v, control))
#define _mm512_cvtepu8_epi16(v) \
  (twofour_emulated::map<uint16_t, uint8_t, __m512i>(__m256i(v), [](uint8_t x) { return static_cast<uint16_t>(x); }))
#define _mm512_cvtepu16_epi32(v) \
  (twofour_emulated::map<uint32_t, uint16_t, __m512i>(v, [](uint16_t x) { return static_cast<uint32_t>(x); }))
#define _mm512_cvtepi32_epi16(v) \
  (twofour_emulated::map<int16_t, int32_t, __m256i>(v, [](int32_t x) { return static_cast<int16_t>(x); }))
#define _mm512_cvtepi32_epi8(v) \
  (twofour_emulated::map<int8_t, int32_t, __m128i>(v, [](int32_t x) { return static_cast<int8_t>(x); }))
#define _mm512_cvtepi32_ps(v) \
  (twofour_emulated::map<float, int32_t, __m512>(v, [](int32_t x) { return static_cast<float>(x); }))
#define _mm512_cvt_roundps_epi32(v, rounding)                           \
  (static_assert_nearest<(rounding)>(),                                 \
   twofour_emulated::map<int32_t, float, __m512i>(v, [](float x) { return static_cast<int32_t>(std::nearbyint(x)); }))
#define _mm512_reduce_max_epu32(v) (twofour_emulated::largest(v))
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd(v) \
  (twofour_emulated::map<double, float, __m512d>(v, [](float x) { return static_cast<double>(x); }))
#undef _mm512_cvtpd_ps
#define _mm512_cvtpd_ps(v) \
  (twofour_emulated::map<float, double, __m256>(v, [](double x) { return static_cast<float>(x); }))
#undef _mm512_cvttps_epi32
#define _mm512_cvttps_epi32(v) \
  (twofour_emulated::map<int32_t, float, __m512i>(v, [](float x) { return static_cast<int32_t>(x); }))
#undef _mm512_cvttpd_epi32
#define _mm512_cvttpd_epi32(v) \
  (twofour_emulated::map<int32_t, double, __m256i>(v, [](double x) { return static_cast<int32_t>(x); }))
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(v, which) (twofour_emulated::half_of<float, __m512, __m256>(v, which))
#undef _mm512_insertf32x8
#define _mm512_insertf32x8(v, half, which) (twofour_emulated::with_half(v, half, which))
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32(mask, v) (twofour_emulated::compressed(mask, v))
#undef _mm512_madd_epi16  // SIMDe's takes four arguments
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps(low, from, high) (twofour_emulated::permute_two<float, int32_t>(~0ull, low, from, high))
#undef _mm512_permutex2var_pd
#define _mm512_permutex2var_pd(low, from, high) (twofour_emulated::permute_two<double, int64_t>(~0ull, low, from, high))
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32(low, from, high) \
  (twofour_emulated::permute_two<int32_t, int32_t>(~0ull, low, from, high))
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16(low, from, high) \
  (twofour_emulated::permute_two<int16_t, int16_t>(~0ull, low, from, high))
#undef _mm512_maskz_permutexvar_epi16
#define _mm512_maskz_permutexvar_epi16(mask, from, v) (twofour_emulated::permute_two<int16_t, int16_t>(mask, v, from, v))

template <int kRounding>
inline void static_assert_nearest() {
  static_assert(kRounding == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), "only to nearest");
}
