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
// Neighbouring blocks of a row of bf16: the places 0 and 1 of each in its lane of words[0], 2 and 3 in that of words[1].
template <class V>
TWOFOUR_INLINE inline void load_words(const bf16* row, V (&words)[2]) {
  constexpr int kAll = sizeof(V) / sizeof(V{}[0]);
  unroll<2 * kAll>([&](auto i) {
    int32_t word;
    __builtin_memcpy(&word, row + 2 * i, sizeof word);
    words[i % 2][i / 2] = word;
  });
}
// Whether a bit of any lane is set.
template <class V>
TWOFOUR_INLINE inline bool any_lane(V v) {
  uint64_t words[sizeof(V) / 8], found = 0;
  __builtin_memcpy(words, &v, sizeof v);
  for (const uint64_t word : words) found |= word;
  return found != 0;
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
