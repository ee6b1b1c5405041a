// What AVX2 and AVX-512 share. Included inside an unnamed namespace, by the simd files of both.

// Sixteen bytes on their way to scalar registers. They go through a vector register, well before their use: behind
// plain loads, the loads of activations whose addresses they hold were issued too early and then again (Zen 5: 0.66
// cycles per vdpbf16ps instead of 0.51).
using Ahead = __m128i;
inline Ahead load_ahead(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
template <int kWord>
inline uint64_t arrived(Ahead bytes) {
  asm("" : "+x"(bytes));  // or the compiler turns both into one plain load
  return static_cast<uint64_t>(kWord == 0 ? _mm_cvtsi128_si64(bytes) : _mm_extract_epi64(bytes, 1));
}
