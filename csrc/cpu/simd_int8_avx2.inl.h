// The vector of the int8 kernels: 8 rows in 32-bit lanes.
//
// vpmaddubsw multiplies unsigned by signed and saturates at 16 bits: |w| <= 128 times |q| <= 127, twice, is at most
// 32512 and fits. So |w| goes in unsigned and q with the sign of w signed, and every sum is exact. The eight inputs of a
// step are held twice, as q and as -q: the shuffle that picks the input picks its sign too.

constexpr int kRows = 8;
constexpr int kGroupVectors = 2;  // vectors of rows that share one load of inputs
constexpr int kBlockTokens = 4;   // 8 sums of the 16 registers
constexpr int kBlockStep = 4;
constexpr int kFewTokens = 8;
constexpr int few_vectors(int) { return 2; }  // of rows side by side: a tile. One: 1.4 times as long at four tokens
constexpr int kFewAhead = 128;                // steps from a prefetch to the use of the weights; with 64 8 % longer
constexpr int kInputBytes = 2 * kInt8Step;
constexpr uint8_t kZeroInput = 0;

using Ints = __m256i;

struct Weights {
  __m256i places;
  __m256i sizes;
};

TWOFOUR_INLINE inline Ints zero_ints() { return _mm256_setzero_si256(); }
TWOFOUR_INLINE inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
TWOFOUR_INLINE inline Ints load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
TWOFOUR_INLINE inline void store_ints(int32_t* p, Ints v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

using Places = __m256i;  // of the step at hand in the low bits of every byte, those of later steps above
TWOFOUR_INLINE inline Places load_places(const uint8_t* quad) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(quad));
}
TWOFOUR_INLINE inline Places of_next_step(Places places) { return _mm256_srli_epi16(places, 2); }

// Which of the sixteen bytes: 4 more for the second group, 8 more (-q) for a negative weight. Whatever the metadata say,
// the place is inside.
TWOFOUR_INLINE inline Weights weights_at(const int8_t* values, Places places) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i signs = _mm256_or_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi32(0x04040000));
  const __m256i more = _mm256_and_si256(signs, _mm256_set1_epi32(0x0C0C0808));
  return {_mm256_or_si256(_mm256_and_si256(places, _mm256_set1_epi8(3)), more), _mm256_abs_epi8(v)};
}
TWOFOUR_INLINE inline Weights load_weights(const uint8_t* decoded) {
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(decoded)),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(decoded + 32))};
}
TWOFOUR_INLINE inline void store_weights(uint8_t* decoded, const Weights& w) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(decoded), w.places);
  _mm256_store_si256(reinterpret_cast<__m256i*>(decoded + 32), w.sizes);
}

using Inputs = __m256i;
TWOFOUR_INLINE inline Inputs load_inputs(const uint8_t* step) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(step)));
}

TWOFOUR_INLINE inline Ints dot(Ints sum, const Weights& w, Inputs x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.sizes, _mm256_shuffle_epi8(x, w.places));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
TWOFOUR_INLINE inline Ints add_offsets(Ints offsets, const Weights&) { return offsets; }  // inputs are signed here

// y of one token and 8 rows, of which the first `rows` are written.
TWOFOUR_INLINE inline void store_outputs(Ints sum, Ints, float x_scale, const float* scales, const float* bias,
                                         Activation activation, void* y, DType dtype, int rows) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(rows), lanes);
  __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x_scale));
  value = _mm256_mul_ps(value, _mm256_maskload_ps(scales, mask));
  if (bias != nullptr) value = _mm256_add_ps(value, _mm256_maskload_ps(bias, mask));
  if (activation != Activation::kNone) value = floats::activated(value, activation, dtype);
  if (dtype == DType::kFp32) {
    if (rows == kRows) {
      _mm256_storeu_ps(static_cast<float*>(y), value);
    } else {
      _mm256_maskstore_ps(static_cast<float*>(y), mask, value);  // AMD takes dozens of cycles for it
    }
    return;
  }
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  if (rows == kRows) {
    _mm_storeu_si128(static_cast<__m128i*>(y), halves);
    return;
  }
  alignas(16) bf16 items[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(items), halves);
  __builtin_memcpy(y, items, static_cast<size_t>(rows) * sizeof(bf16));
}

// ---- quantization: 8 inputs at a time -------------------------------------------------------------------------------

constexpr int kFloats = 8;
using Floats = __m256;

TWOFOUR_INLINE inline Floats load_floats(const float* p, int64_t count) {
  if (count >= 8) return _mm256_loadu_ps(p);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes));
}
TWOFOUR_INLINE inline Floats load_floats(const bf16* p, int64_t count) {
  // Rows are whole groups: eight inputs or four.
  const __m128i half = count >= 8 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                  : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
// The larger |bits|; NaN is above infinity, infinity above every number.
TWOFOUR_INLINE inline Ints larger(Ints most, Floats v) {
  return _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)));
}
TWOFOUR_INLINE inline uint32_t largest_of(Ints v) {
  alignas(32) uint32_t items[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(items), v);
  uint32_t most = 0;
  for (uint32_t item : items) most = item > most ? item : most;
  return most;
}

// One step: eight bytes and their negatives.
TWOFOUR_INLINE inline void store_quantized(uint8_t* p, int64_t, Floats v, float factor, bool) {
  const __m256 scaled = _mm256_mul_ps(v, _mm256_set1_ps(factor));
  const __m256 rounded = _mm256_round_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i whole = _mm256_cvttps_epi32(rounded);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const __m128i negatives = _mm_sub_epi16(_mm_setzero_si128(), words);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, negatives));
}
