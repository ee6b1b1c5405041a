// Vectors of 4 floats on NEON (AArch64). Included inside an unnamed namespace: see linear_neon.cpp.

using F = float32x4_t;  // 4 floats
constexpr int kLanes = 4;
constexpr int kVectorRegisters = 32;
constexpr int kFewTokens = 4;  // tokens per pass of the few-token kernel

inline F zero() { return vdupq_n_f32(0); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F v) { vst1q_f32(p, v); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }

// The first n (0..4) elements; the other lanes are 0 and their memory is not touched.
inline F load_first(const float* p, int n) {
  if (n >= kLanes) return load(p);
  float whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
inline void store_first(float* p, F v, int n) {
  if (n >= kLanes) return store(p, v);
  float whole[kLanes];
  store(whole, v);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

inline F load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F load_first(const bf16* p, int n) {
  if (n >= kLanes) return load(p);
  bf16 whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}

// Rounds to nearest even, keeps subnormals and NaN.
inline void store_first(bf16* p, F v, int n) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint16x4_t high = vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  if (n >= kLanes) return vst1_u16(p, high);
  bf16 whole[kLanes];
  vst1_u16(whole, high);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

// 32 float8 as bf16, exactly; NaN stays NaN.
inline void widen_cell(const E4m3* from, bf16* to) {
  // Numbers below 2^-6 (bits 0 .. 7) by their low and high bytes, all others by arithmetic.
  static constexpr E4m3Table kTable = e4m3_table();
  const uint8x16_t small = vreinterpretq_u8_u16(vld1q_u16(kTable.entry));
  for (int i = 0; i < 32; i += 8) {
    const uint16x8_t bits = vmovl_u8(vld1_u8(reinterpret_cast<const uint8_t*>(from + i)));
    const uint16x8_t magnitude = vandq_u16(bits, vdupq_n_u16(127));
    const uint16x8_t normal = vaddq_u16(vshlq_n_u16(magnitude, 4), vdupq_n_u16(120 << 7));
    const uint16x8_t twice = vshlq_n_u16(magnitude, 1);
    const uint16x8_t places = vorrq_u16(twice, vshlq_n_u16(vorrq_u16(twice, vdupq_n_u16(1)), 8));
    const uint16x8_t looked_up = vreinterpretq_u16_u8(vqtbl1q_u8(small, vreinterpretq_u8_u16(places)));
    const uint16x8_t number = vbslq_u16(vcltq_u16(magnitude, vdupq_n_u16(8)), looked_up, normal);
    const uint16x8_t nan = vandq_u16(vceqq_u16(magnitude, vdupq_n_u16(127)), vdupq_n_u16(0x7fff));
    vst1q_u16(to + i, vorrq_u16(vorrq_u16(number, nan), vshlq_n_u16(vshrq_n_u16(bits, 7), 15)));
  }
}

// 4 pairs of bf16 -> their first and second members.
inline uint32x4_t load_pairs(const bf16* p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
inline F first_of_pairs(const bf16* p) { return vreinterpretq_f32_u32(vshlq_n_u32(load_pairs(p), 16)); }
inline F second_of_pairs(const bf16* p) {
  return vreinterpretq_f32_u32(vandq_u32(load_pairs(p), vdupq_n_u32(0xffff0000u)));
}

// Byte r: the nibble of row r of the tile in the low bits, or with another row's above it. S rows share a nibble.
struct NibblePlaces {
  uint8_t byte_of_row[16];
  int8_t shift_of_row[16];  // to the left
};
template <int S>
constexpr NibblePlaces nibble_places() {
  NibblePlaces places{};
  for (int row = 0; row < nm::kTileRows; ++row) {
    places.byte_of_row[row] = static_cast<uint8_t>(nm::bit_of_row(row, S) / 8);
    places.shift_of_row[row] = static_cast<int8_t>(-(nm::bit_of_row(row, S) % 8));
  }
  return places;
}
template <int S>
inline uint8x16_t row_nibbles(const uint8_t* metadata) {
  static constexpr NibblePlaces kPlaces = nibble_places<S>();
  uint64_t bits = 0;
  __builtin_memcpy(&bits, metadata, nm::metadata_bytes(S));
  const uint8x16_t bytes = vreinterpretq_u8_u64(vdupq_n_u64(bits));
  return vshlq_u8(vqtbl1q_u8(bytes, vld1q_u8(kPlaces.byte_of_row)), vld1q_s8(kPlaces.shift_of_row));
}

// Which bytes of a group TBL puts into the four lanes of a half tile: those of the first kept activation of every row,
// and those of the second.
struct I {
  uint8x16_t first, second;
};

// Rows 4 * kHalf .. 4 * kHalf + 3 of offsets o (one byte per row): o, o + 1, o + 2, o + 3 in the bytes of their lane.
template <int kHalf>
inline uint8x16_t bytes_of_lanes(uint8x16_t o) {
  const uint8x16_t o1 = vorrq_u8(o, vdupq_n_u8(1));
  const uint16x8_t low = vreinterpretq_u16_u8(kHalf < 2 ? vzip1q_u8(o, o1) : vzip2q_u8(o, o1));
  const uint16x8_t high = vorrq_u16(low, vdupq_n_u16(0x0202));
  return vreinterpretq_u8_u16(kHalf % 2 == 0 ? vzip1q_u16(low, high) : vzip2q_u16(low, high));
}

template <int kHalf, int S>
inline I nibbles(const uint8_t* metadata) {
  const uint8x16_t n = row_nibbles<S>(metadata), mask = vdupq_n_u8(0b1100);
  return {bytes_of_lanes<kHalf>(vandq_u8(vshlq_n_u8(n, 2), mask)), bytes_of_lanes<kHalf>(vandq_u8(n, mask))};
}
inline I second_index(I nibbles) { return {nibbles.second, nibbles.second}; }

// The four activations of a group; then, per lane, the one that its index names.
inline F group_of(const float* p) { return vld1q_f32(p); }
inline F select(F group, I index) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(group), index.first));
}

// Four neighbouring weights, and one of them as a factor: FMLA takes it by its number, so no lane is copied.
using Quad = F;
inline Quad load_quad(const float* p) { return vld1q_f32(p); }
template <int kIndex>
struct Lane {
  Quad quad;
};
template <int kIndex>
inline Lane<kIndex> splat(Quad quad) {
  return {quad};
}
template <int kIndex>
inline F fma(Lane<kIndex> a, F b, F c) {
  return vfmaq_laneq_f32(c, b, a.quad, kIndex);
}

// Sixteen bytes that are needed later, as two words.
struct Ahead {
  uint64_t words[2];
};
inline Ahead load_ahead(const void* p) {
  Ahead bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return bytes;
}
template <int kWord>
inline uint64_t arrived(Ahead bytes) {
  return bytes.words[kWord];
}

// Per row of the tile: i0 * row_bytes | (i1 * row_bytes) << 16.
template <int S>
inline void row_offsets(const uint8_t* metadata, int row_bytes, uint32_t* offsets) {
  const uint8x16_t n = row_nibbles<S>(metadata), three = vdupq_n_u8(3);
  const uint8x16_t i0 = vandq_u8(n, three), i1 = vandq_u8(vshrq_n_u8(n, 2), three);
  const uint8x16_t rows0 = vzip1q_u8(i0, i1), rows8 = vzip2q_u8(i0, i1);
  const uint16x8_t quarters[4] = {vmovl_u8(vget_low_u8(rows0)), vmovl_high_u8(rows0), vmovl_u8(vget_low_u8(rows8)),
                                  vmovl_high_u8(rows8)};
  unroll<4>([&](auto q) TWOFOUR_INLINE {
    const uint16x8_t scaled = vmulq_n_u16(quarters[q], static_cast<uint16_t>(row_bytes));
    vst1q_u32(offsets + 4 * q, vreinterpretq_u32_u16(scaled));
  });
}

inline void transpose(F (&v)[4]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
  v[0] = vreinterpretq_f32_f64(vzip1q_f64(a, c));
  v[1] = vreinterpretq_f32_f64(vzip1q_f64(b, d));
  v[2] = vreinterpretq_f32_f64(vzip2q_f64(a, c));
  v[3] = vreinterpretq_f32_f64(vzip2q_f64(b, d));
}

// For epilogue.inl.h: one number in all lanes; products, quotients; 1 / v within 2^-13.9; a < b ? yes : no (no for NaN);
// a < b ? a : b; v & mask; and the low nine bits moved into sign and exponent.
inline F all(float value) { return vdupq_n_f32(value); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F divide(F a, F b) { return vdivq_f32(a, b); }
inline F about_one_over(F v) { return divide(all(1), v); }
inline F select_less(F a, F b, F yes, F no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
inline F lesser(F a, F b) { return select_less(a, b, a, b); }
inline F and_bits(F v, uint32_t mask) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(mask)));
}
inline F low_bits_as_exponent(F v) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), 23)); }
