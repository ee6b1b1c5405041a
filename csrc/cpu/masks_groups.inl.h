// The best of each group along the rows: kVectorBytes / sizeof(Key) groups at a time, each in a lane of its own.
//
// Scores become integers of the same order, among which both zeros are one number and NaN is below all. How many of its
// group beat a score is its rank, counted by comparing each pair: group * (group - 1) / 2 comparisons for a vector of
// whole groups need no branch and no sorting. Equal keys: the lower index wins.

template <class Key>
struct Lanes;
template <>
struct Lanes<int32_t> {
  static constexpr int kCount = 2 * kLanes;
  using Vector = int32_t __attribute__((vector_size(8 * kLanes)));
};
template <>
struct Lanes<int64_t> {
  static constexpr int kCount = kLanes;
  using Vector = int64_t __attribute__((vector_size(8 * kLanes)));
};

template <class Score>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = int32_t;
};
template <>
struct KeyOf<double> {
  using Type = int64_t;
};

inline int smaller_int(int a, int b) { return a < b ? a : b; }

constexpr int kMostGroup = 32;
constexpr int kChunk = 2048;  // keys at a time: they, their marks and the scores stay in an L1 cache

template <class Key>
constexpr Key kLowest = sizeof(Key) == 4 ? static_cast<Key>(INT32_MIN) : static_cast<Key>(INT64_MIN);
template <class Key>
constexpr Key kInfinity = sizeof(Key) == 4 ? static_cast<Key>(0x7F800000) : static_cast<Key>(0x7FF0000000000000);

// On the bits alone, so that it does not matter whether the processor flushes subnormal numbers.
template <bool kMagnitude, class Key, class Number>
TWOFOUR_INLINE inline Key key_of(Number number) {
  static_assert(sizeof(Key) == sizeof(Number), "bits of a number");
  Key bits;
  __builtin_memcpy(&bits, &number, sizeof bits);
  const Key size = bits & ~kLowest<Key>, sign = kMagnitude ? 0 : bits >> (8 * sizeof(Key) - 1);
  return size > kInfinity<Key> ? kLowest<Key> : (size ^ sign) - sign;
}

// Scores of one row, or sums of rows that share a mask, as keys.
template <bool kMagnitude, class Score>
void keys_of_row(const Score* scores, int64_t count, typename KeyOf<Score>::Type* keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of<kMagnitude, typename KeyOf<Score>::Type>(scores[i]);
}
template <bool kMagnitude, class Score>
void keys_of_rows(const Score* scores, int64_t stride, int64_t rows, int64_t count, int64_t* keys) {
  double sums[kChunk];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) {
      const double score = static_cast<double>(scores[row * stride + i]);
      const double own = kMagnitude ? __builtin_fabs(score) : score;
      sums[i] = row == 0 ? own : sums[i] + own;
    }
  }
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of<false, int64_t>(sums[i]);
}

// marks[i] = 1 where keys[i] is among the `keep` best of its group. Reads and writes up to a whole vector of groups.
template <int kGroup, class Key>
TWOFOUR_INLINE inline void mark_groups(const Key* keys, int keep, int any_group, uint8_t* marks) {
  using V = typename Lanes<Key>::Vector;
  constexpr int kCount = Lanes<Key>::kCount;
  const int group = kGroup != 0 ? kGroup : any_group, words = (group + 3) / 4;
  V key[kGroup != 0 ? kGroup : kMostGroup], word[(kGroup != 0 ? kGroup + 3 : kMostGroup) / 4];
  for (int i = 0; i < group; ++i) {
    V lanes{};
    TWOFOUR_UNROLL
    for (int lane = 0; lane < kCount; ++lane) lanes[lane] = keys[lane * group + i];
    key[i] = lanes;
  }
  for (int w = 0; w < words; ++w) {
    V bytes{};
    for (int i = 4 * w; i < smaller_int(4 * w + 4, group); ++i) {
      V rank = V{} + static_cast<Key>(i);  // as if all before it beat it, and none after; a true comparison is -1
      for (int other = 0; other < i; ++other) rank += key[i] > key[other];
      for (int other = i + 1; other < group; ++other) rank -= key[other] > key[i];
      bytes |= (rank < static_cast<Key>(keep)) & static_cast<Key>(Key{1} << (8 * (i % 4)));
    }
    word[w] = bytes;
  }
  // Four bytes at a time, left to right: what a word writes beyond its group is written again by the next.
  TWOFOUR_UNROLL
  for (int lane = 0; lane < kCount; ++lane) {
    for (int w = 0; w < words; ++w) {
      const uint32_t four = static_cast<uint32_t>(word[w][lane]);
      __builtin_memcpy(marks + lane * group + 4 * w, &four, sizeof four);
    }
  }
}

template <int kGroup, class Key>
void mark_chunk(const Key* keys, int64_t count, int keep, int group, uint8_t* marks) {
  const int64_t step = Lanes<Key>::kCount * group;
  for (int64_t i = 0; i < count; i += step) mark_groups<kGroup>(keys + i, keep, group, marks + i);
}

template <class Score>
TWOFOUR_INLINE inline void keep_marked(const Score* scores, const uint8_t* marks, int64_t count, Score* kept) {
  using Bits = typename KeyOf<Score>::Type;
  for (int64_t i = 0; i < count; ++i) {  // whole numbers: SSE2 has no selection, and `?:` on floats took 3 times as long
    Bits bits;
    __builtin_memcpy(&bits, scores + i, sizeof bits);
    bits &= -static_cast<Bits>(marks[i]);
    __builtin_memcpy(kept + i, &bits, sizeof bits);
  }
}

template <bool kMagnitude, class Score, class Key>
void best_of_band(const GroupArgs& args, int64_t band) {
  constexpr int kPad = kMostGroup * Lanes<Key>::kCount;
  Key keys[kChunk + kPad];
  uint8_t marks[kChunk + kPad + 4];
  const int64_t chunk = kChunk / args.group * args.group, row0 = band * args.shared;
  for (int i = 0; i < kPad; ++i) keys[kChunk + i] = 0;
  for (int64_t column = 0; column < args.columns; column += chunk) {
    const int64_t count = smaller(chunk, args.columns - column);
    const Score* scores = static_cast<const Score*>(args.scores) + row0 * args.stride + column;
    if constexpr (sizeof(Key) == sizeof(Score)) {
      if (args.shared == 1) {
        keys_of_row<kMagnitude>(scores, count, keys);
      } else if constexpr (sizeof(Key) == 8) {
        keys_of_rows<kMagnitude>(scores, args.stride, args.shared, count, keys);
      }
    } else {
      keys_of_rows<kMagnitude>(scores, args.stride, args.shared, count, keys);
    }
    // Keys beyond the last group are of no account, but nothing that was never written is read.
    for (int64_t i = count; column == 0 && i < smaller(count + kPad, kChunk); ++i) keys[i] = 0;
    if (args.group == 4) {
      mark_chunk<4>(keys, count, args.keep, 4, marks);
    } else {
      mark_chunk<0>(keys, count, args.keep, args.group, marks);
    }
    for (int64_t row = row0; row < row0 + args.shared; ++row) {
      if (args.mask != nullptr) __builtin_memcpy(args.mask + row * args.columns + column, marks, count);
      if (args.kept != nullptr) {
        keep_marked(static_cast<const Score*>(args.scores) + row * args.stride + column, marks, count,
                    static_cast<Score*>(args.kept) + row * args.kept_stride + column);
      }
    }
  }
}

template <class Score>
void best_of_groups(const GroupArgs& args, int64_t band0, int64_t band1) {
  using Key = typename KeyOf<Score>::Type;
  const auto run = args.shared > 1 ? (args.magnitude ? best_of_band<true, Score, int64_t> : best_of_band<false, Score, int64_t>)
                                   : (args.magnitude ? best_of_band<true, Score, Key> : best_of_band<false, Score, Key>);
  for (int64_t band = band0; band < band1; ++band) run(args, band);
}
