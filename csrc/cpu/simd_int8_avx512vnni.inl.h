// The vector of the int8 kernels: 16 rows in 32-bit lanes. Inputs are held as q + 128, because vpdpbusd multiplies
// unsigned by signed; 128 times the sum of the row's weights comes off at the end. All of it is exact modulo 2^32.

constexpr int kRows = 16;           // rows of a vector
constexpr int kGroupVectors = 2;    // vectors of rows that share one load of inputs
constexpr int kBlockTokens = 12;    // 24 sums
constexpr int kBlockStep = 4;
constexpr int kFewTokens = 8;
constexpr int few_vectors(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }  // of rows side by side
constexpr int kFewAhead = 64;       // steps from a prefetch to the use of the weights: 16 cost 25 %, bursts 60 %
constexpr int kInputBytes = kInt8Step;
constexpr uint8_t kZeroInput = 128;

using Ints = __m512i;

struct Weights {
  __m512i places;
  __m512i values;
};

TWOFOUR_INLINE inline Ints zero_ints() { return _mm512_setzero_si512(); }
TWOFOUR_INLINE inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
TWOFOUR_INLINE inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
TWOFOUR_INLINE inline void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }

using Places = __m512i;  // of the step at hand in the low bits of every byte, those of later steps above
TWOFOUR_INLINE inline Places load_places(const uint8_t* quad) { return _mm512_loadu_si512(quad); }
TWOFOUR_INLINE inline Places of_next_step(Places places) { return _mm512_srli_epi16(places, 2); }

// Which of the eight inputs: 4 more for the second group. Whatever the metadata say, the place is inside.
TWOFOUR_INLINE inline Weights weights_at(const int8_t* values, Places places) {
  constexpr int kAAndBOrC = 0xEA;
  const __m512i inputs =
      _mm512_ternarylogic_epi32(places, _mm512_set1_epi8(3), _mm512_set1_epi32(0x04040000), kAAndBOrC);
  return {inputs, _mm512_loadu_si512(values)};
}
TWOFOUR_INLINE inline Weights load_weights(const uint8_t* decoded) {
  return {_mm512_load_si512(decoded), _mm512_load_si512(decoded + 64)};
}
TWOFOUR_INLINE inline void store_weights(uint8_t* decoded, const Weights& w) {
  _mm512_store_si512(decoded, w.places);
  _mm512_store_si512(decoded + 64, w.values);
}

using Inputs = __m512i;
TWOFOUR_INLINE inline Inputs load_inputs(const uint8_t* eight) {
  int64_t bits;
  __builtin_memcpy(&bits, eight, sizeof bits);
  return _mm512_set1_epi64(bits);
}

TWOFOUR_INLINE inline Ints dot(Ints sum, const Weights& w, Inputs x) {
  return _mm512_dpbusd_epi32(sum, _mm512_shuffle_epi8(x, w.places), w.values);
}
// What the 128 added to every input has added to the sums.
TWOFOUR_INLINE inline Ints add_offsets(Ints offsets, const Weights& w) {
  return _mm512_dpbusd_epi32(offsets, _mm512_set1_epi8(-128), w.values);
}

// y of one token and 16 rows, of which the first `rows` are written.
TWOFOUR_INLINE inline void store_outputs(Ints sum, Ints offsets, float x_scale, const float* scales, const float* bias,
                                         Activation activation, void* y, DType dtype, int rows) {
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
  __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offsets));
  value = _mm512_mul_ps(value, _mm512_set1_ps(x_scale));
  value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, scales));
  if (bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias));
  if (activation != Activation::kNone) value = floats::activated(value, activation, dtype);
  if (dtype == DType::kFp32) {
    _mm512_mask_storeu_ps(y, mask, value);
    return;
  }
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  _mm256_mask_storeu_epi16(y, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// ---- quantization: 16 inputs at a time ------------------------------------------------------------------------------

constexpr int kFloats = 16;
using Floats = __m512;

TWOFOUR_INLINE inline Floats load_floats(const float* p, int64_t count) {
  return count >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
TWOFOUR_INLINE inline Floats load_floats(const bf16* p, int64_t count) {
  const __m256i half = count >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                   : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
// The larger |bits|; NaN is above infinity, infinity above every number.
TWOFOUR_INLINE inline Ints larger(Ints most, Floats v) {
  return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)));
}
TWOFOUR_INLINE inline uint32_t largest_of(Ints v) { return _mm512_reduce_max_epu32(v); }

// Two steps of eight bytes, `stride` bytes apart; only the first where `both` is false.
TWOFOUR_INLINE inline void store_quantized(uint8_t* p, int64_t stride, Floats v, float factor, bool both) {
  const __m512 scaled = _mm512_mul_ps(v, _mm512_set1_ps(factor));
  const __m512i whole = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8(-128));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  if (both) _mm_storel_epi64(reinterpret_cast<__m128i*>(p + stride), _mm_unpackhi_epi64(bytes, bytes));
}
