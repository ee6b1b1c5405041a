// The vector of the int8 kernels on NEON: 4 rows in 32-bit lanes, inputs as they are. The file that includes this has
// defined `dot_bytes`, which adds the products of each lane's four bytes to the lane, kBlockTokens and kFewWide, the
// most tokens that `few` takes with a whole tile of rows side by side.
//
// Run under emulation only, so without times: with these sizes the inner loops have the fewest loads and need no stack.

constexpr int kRows = 4;
constexpr int kGroupVectors = 4;  // vectors of rows that share one load of inputs: a tile
constexpr int kBlockStep = 1;
constexpr int kFewTokens = 8;
constexpr int few_vectors(int tokens) { return tokens <= kFewWide ? 4 : 2; }  // of rows side by side
constexpr int kFewAhead = 128;  // steps from a prefetch to the use of the weights, over all vectors
constexpr int kInputBytes = kInt8Step;
constexpr uint8_t kZeroInput = 0;

using Ints = int32x4_t;

struct Weights {
  uint8x16_t places;
  int8x16_t values;
};

TWOFOUR_INLINE inline Ints zero_ints() { return vdupq_n_s32(0); }
TWOFOUR_INLINE inline Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
TWOFOUR_INLINE inline Ints load_ints(const int32_t* p) { return vld1q_s32(p); }
TWOFOUR_INLINE inline void store_ints(int32_t* p, Ints v) { vst1q_s32(p, v); }

using Places = uint8x16_t;  // of the step at hand in the low bits of every byte, those of later steps above
TWOFOUR_INLINE inline Places load_places(const uint8_t* quad) { return vld1q_u8(quad); }
TWOFOUR_INLINE inline Places of_next_step(Places places) { return vshrq_n_u8(places, 2); }

// Which of the eight inputs: 4 more for the second group. Whatever the metadata say, the place is inside.
TWOFOUR_INLINE inline Weights weights_at(const int8_t* values, Places places) {
  const uint8x16_t second = vreinterpretq_u8_u32(vdupq_n_u32(0x04040000));
  return {vorrq_u8(vandq_u8(places, vdupq_n_u8(3)), second), vld1q_s8(values)};
}
TWOFOUR_INLINE inline Weights load_weights(const uint8_t* decoded) {
  return {vld1q_u8(decoded), vreinterpretq_s8_u8(vld1q_u8(decoded + 16))};
}
TWOFOUR_INLINE inline void store_weights(uint8_t* decoded, const Weights& w) {
  vst1q_u8(decoded, w.places);
  vst1q_u8(decoded + 16, vreinterpretq_u8_s8(w.values));
}

using Inputs = int8x16_t;  // eight inputs and zeros: a load of half a register clears the rest
TWOFOUR_INLINE inline Inputs load_inputs(const uint8_t* eight) {
  return vcombine_s8(vreinterpret_s8_u8(vld1_u8(eight)), vdup_n_s8(0));
}

TWOFOUR_INLINE inline Ints dot(Ints sum, const Weights& w, Inputs x) {
  return dot_bytes(sum, vqtbl1q_s8(x, w.places), w.values);
}
TWOFOUR_INLINE inline Ints add_offsets(Ints offsets, const Weights&) { return offsets; }  // inputs are signed here

TWOFOUR_INLINE inline float32x4_t load_first(const float* p, int n) {
  if (n >= 4) return vld1q_f32(p);
  float whole[4] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return vld1q_f32(whole);
}

// y of one token and 4 rows, of which the first `rows` are written.
TWOFOUR_INLINE inline void store_outputs(Ints sum, Ints, float x_scale, const float* scales, const float* bias,
                                         Activation activation, void* y, DType dtype, int rows) {
  float32x4_t value = vmulq_f32(vcvtq_f32_s32(sum), vdupq_n_f32(x_scale));
  value = vmulq_f32(value, load_first(scales, rows));
  if (bias != nullptr) value = vaddq_f32(value, load_first(bias, rows));
  if (activation != Activation::kNone) value = floats::activated(value, activation, dtype);
  if (dtype == DType::kFp32) {
    if (rows == kRows) return vst1q_f32(static_cast<float*>(y), value);
    float items[4];
    vst1q_f32(items, value);
    for (int i = 0; i < rows; ++i) static_cast<float*>(y)[i] = items[i];
    return;
  }
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint16x4_t halves =
      vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, vdupq_n_u32(0x7FC00000)), 16);
  if (rows == kRows) return vst1_u16(static_cast<bf16*>(y), halves);
  bf16 items[4];
  vst1_u16(items, halves);
  for (int i = 0; i < rows; ++i) static_cast<bf16*>(y)[i] = items[i];
}

// ---- quantization: 8 inputs at a time -------------------------------------------------------------------------------

constexpr int kFloats = 8;
struct Floats {
  float32x4_t low, high;
};

// Rows are whole groups: eight inputs or four.
TWOFOUR_INLINE inline Floats load_floats(const float* p, int64_t count) {
  return {vld1q_f32(p), count >= 8 ? vld1q_f32(p + 4) : vdupq_n_f32(0)};
}
TWOFOUR_INLINE inline Floats load_floats(const bf16* p, int64_t count) {
  const uint16x4_t high = count >= 8 ? vld1_u16(p + 4) : vdup_n_u16(0);
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)), vreinterpretq_f32_u32(vshll_n_u16(high, 16))};
}
// The larger |bits|; NaN is above infinity, infinity above every number.
TWOFOUR_INLINE inline Ints larger(Ints most, Floats v) {
  const uint32x4_t low = vreinterpretq_u32_f32(vabsq_f32(v.low)), high = vreinterpretq_u32_f32(vabsq_f32(v.high));
  return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(most), vmaxq_u32(low, high)));
}
TWOFOUR_INLINE inline uint32_t largest_of(Ints v) { return vmaxvq_u32(vreinterpretq_u32_s32(v)); }

// One step: eight bytes.
TWOFOUR_INLINE inline void store_quantized(uint8_t* p, int64_t, Floats v, float factor, bool) {
  const float32x4_t factors = vdupq_n_f32(factor);
  const int16x4_t low = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(v.low, factors)));
  const int16x4_t high = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(v.high, factors)));
  vst1_s8(reinterpret_cast<int8_t*>(p), vmovn_s16(vcombine_s16(low, high)));
}
