// How rows of blocks come into vectors, and masks out of them, where the instruction set has no better way.
TWOFOUR_INLINE inline float widened(bf16 score) {
  const uint32_t bits = static_cast<uint32_t>(score) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
TWOFOUR_INLINE inline float widened(float score) { return score; }
TWOFOUR_INLINE inline double widened(double score) { return score; }

// Four places of a row, in neighbouring blocks: x[c] has the place c of each.
template <class V, class Score>
TWOFOUR_INLINE inline void load_rows(const Score* row, V* x) {
  constexpr int kAll = sizeof(V) / sizeof(V{}[0]);
  unroll<4>([&](auto c) {
    unroll<kAll>([&](auto lane) { x[c][int{lane}] = widened(row[4 * lane + c]); });
  });
}
template <class V>
TWOFOUR_INLINE inline bool store_rows(V, uint8_t*, int64_t) {
  return false;
}
// The way back of load_rows, rounded to float.
template <class V>
TWOFOUR_INLINE inline void store_soft(const V* x, float* row) {
  constexpr int kAll = sizeof(V) / sizeof(V{}[0]);
  unroll<4>([&](auto c) {
    unroll<kAll>([&](auto lane) { row[4 * lane + c] = static_cast<float>(x[c][int{lane}]); });
  });
}
