// Vectors of 4 floats in the vector extension of gcc and clang: any architecture, no intrinsics. Included inside an
// unnamed namespace: see linear_baseline.cpp.

typedef float F __attribute__((vector_size(16)));     // 4 floats
typedef uint32_t I __attribute__((vector_size(16)));  // 4 32-bit integers
constexpr int kLanes = 4;
constexpr int kVectorRegisters = 16;
constexpr int kFewTokens = 2;  // tokens per pass of the few-token kernel

inline F zero() { return F{0, 0, 0, 0}; }
inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline F add(F a, F b) { return a + b; }
inline F fma(F a, F b, F c) { return a * b + c; }  // fused where the machine has it

// The first n (0..4) elements; the other lanes are 0 and their memory is not touched.
inline F load_first(const float* p, int n) {
  if (n >= kLanes) return load(p);
  F v = zero();
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, F v, int n) {
  if (n >= kLanes) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline F load(const bf16* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline F load_first(const bf16* p, int n) {
  F v = zero();
  for (int i = 0; i < n && i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
}

// Rounds to nearest even, keeps subnormals and NaN.
inline void store_first(bf16* p, F v, int n) {
  for (int i = 0; i < n && i < kLanes; ++i) {
    const float value = v[i];
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t kept = nan ? bits | 0x400000u : bits + (0x7fffu + ((bits >> 16) & 1u));
    p[i] = static_cast<bf16>(kept >> 16);
  }
}

// 32 float8 as bf16, exactly; NaN stays NaN.
inline void widen_cell(const E4m3* from, bf16* to) {
  static constexpr E4m3Table kTable = e4m3_table();
  for (int i = 0; i < 32; ++i) to[i] = kTable.widened(static_cast<uint8_t>(from[i]));
}

// 4 pairs of bf16 -> their first and second members.
inline F first_of_pairs(const bf16* p) { return F{widen(p[0]), widen(p[2]), widen(p[4]), widen(p[6])}; }
inline F second_of_pairs(const bf16* p) { return F{widen(p[1]), widen(p[3]), widen(p[5]), widen(p[7])}; }

// The metadata of one (tile, group), read as bytes: the format is little-endian, the machine may not be.
template <int S>
inline uint64_t metadata_bits(const uint8_t* metadata) {
  uint64_t bits = 0;
  for (int b = 0; b < nm::metadata_bytes(S); ++b) bits |= static_cast<uint64_t>(metadata[b]) << (8 * b);
  return bits;
}

// Lane r: the nibble of row 4 * kHalf + r of the tile in the low bits, the nibbles of other rows above it. S rows share a
// nibble.
template <int kHalf, int S>
inline I nibbles(const uint8_t* metadata) {
  const uint64_t bits = metadata_bits<S>(metadata);
  I lanes;
  for (int r = 0; r < kLanes; ++r) lanes[r] = static_cast<uint32_t>(bits >> nm::bit_of_row(kLanes * kHalf + r, S));
  return lanes;
}
inline I second_index(I nibbles) { return nibbles >> 2; }

// The four activations of a group; then, per lane, the one that its index names.
using Group = const float*;
inline Group group_of(const float* p) { return p; }
inline F select(Group group, I index) {
  return F{group[index[0] & 3u], group[index[1] & 3u], group[index[2] & 3u], group[index[3] & 3u]};
}

// Four neighbouring weights, and one of them in all lanes.
using Quad = const float*;
inline Quad load_quad(const float* p) { return p; }
template <int kIndex>
inline F splat(Quad quad) {
  const float w = quad[kIndex];
  return F{w, w, w, w};
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
  const uint64_t bits = metadata_bits<S>(metadata);
  for (int row = 0; row < nm::kTileRows; ++row) {
    const unsigned nibble = bits >> nm::bit_of_row(row, S) & 15u;
    offsets[row] = (nm::first_of(nibble) | nm::second_of(nibble) << 16) * static_cast<uint32_t>(row_bytes);
  }
}

inline void transpose(F (&v)[4]) {
  const F a = v[0], b = v[1], c = v[2], d = v[3];
  v[0] = F{a[0], b[0], c[0], d[0]};
  v[1] = F{a[1], b[1], c[1], d[1]};
  v[2] = F{a[2], b[2], c[2], d[2]};
  v[3] = F{a[3], b[3], c[3], d[3]};
}

// For epilogue.inl.h: one number in all lanes; products, quotients; 1 / v within 2^-13.9; a < b ? yes : no (no for NaN);
// a < b ? a : b; v & mask; and the low nine bits moved into sign and exponent.
inline F all(float value) { return F{value, value, value, value}; }
inline F mul(F a, F b) { return a * b; }
inline F divide(F a, F b) { return a / b; }
inline F about_one_over(F v) { return divide(all(1), v); }
inline F select_less(F a, F b, F yes, F no) {
  const I less = (I)(a < b);
  return (F)(((I)yes & less) | ((I)no & ~less));
}
inline F lesser(F a, F b) { return select_less(a, b, a, b); }
inline F and_bits(F v, uint32_t mask) { return (F)((I)v & mask); }
inline F low_bits_as_exponent(F v) { return (F)((I)v << 23); }
