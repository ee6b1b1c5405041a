// What the gradient kernels need besides simd_<isa>.inl.h, without AVX-512. Included inside an unnamed namespace.

inline F splat_of(const float* p) { return splat<0>(p); }

// The value stays in its register: the compiler would rather load it again for each use, and loads are what is scarce.
inline void keep_in_register([[maybe_unused]] F& v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#endif
}

// Lane k: the sum of the lanes of v[k].
inline F sums_of(F (&v)[kLanes]) {
  transpose(v);
  F sum = v[0];
  unroll<kLanes - 1>([&](auto k) TWOFOUR_INLINE { sum = add(sum, v[k + 1]); });
  return sum;
}

// 16 rows' first and second values as pairs of bf16, rounded as store_first rounds.
inline void store_pairs(bf16* p, const float* firsts, const float* seconds) {
  bf16 halves[2][nm::kTileRows];
  for (int r = 0; r < nm::kTileRows; r += kLanes) {
    store_first(halves[0] + r, load(firsts + r), kLanes);
    store_first(halves[1] + r, load(seconds + r), kLanes);
  }
  for (int r = 0; r < nm::kTileRows; ++r) {
    p[2 * r] = halves[0][r];
    p[2 * r + 1] = halves[1][r];
  }
}

inline float widened(float value) { return value; }
inline float widened(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

struct PairNumbers {
  uint8_t of[16];
};
constexpr PairNumbers pair_numbers() {
  PairNumbers numbers{};
  for (unsigned nibble = 0; nibble < 16; ++nibble) numbers.of[nibble] = static_cast<uint8_t>(nm::pair_of(nibble));
  return numbers;
}
constexpr PairNumbers kPairNumbers = pair_numbers();

// The two values of each row of `tiles` cells, `groups` cells apart, as fp32.
template <class Item>
inline void gather_values(const Item* values, int64_t groups, int tiles, float* w0, float* w1) {
  for (int tile = 0; tile < tiles; ++tile) {
    const Item* slots = values + tile * groups * nm::kTileRows * nm::kKeep;
    for (int r = 0; r < nm::kTileRows; ++r) {
      constexpr bool kWide = sizeof(Item) == 4;
      Item kept[nm::kKeep];
      __builtin_memcpy(&kept[0], slots + (kWide ? r : 2 * r), sizeof(Item));
      __builtin_memcpy(&kept[1], slots + (kWide ? nm::kTileRows + r : 2 * r + 1), sizeof(Item));
      w0[tile * nm::kTileRows + r] = widened(kept[0]);
      w1[tile * nm::kTileRows + r] = widened(kept[1]);
    }
  }
}

// The rows of `tiles` tiles of one group, sorted by kind; tiles are `groups` cells apart.
inline void sort_cell(const uint8_t* metadata, int64_t groups, int tiles, int, uint16_t* ends, uint8_t* rows) {
  uint8_t kinds[kMaxChunkRows];
  int place[nm::kPairs] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const uint8_t* bytes = metadata + tile * groups * nm::kTileMetadataBytes;
    for (int r = 0; r < nm::kTileRows; ++r) {
      const unsigned byte = bytes[4 * nm::word_of_row(r) + nm::shift_of_row(r) / 8];
      const uint8_t kind = kPairNumbers.of[byte >> (nm::shift_of_row(r) % 8) & 15u];
      kinds[tile * nm::kTileRows + r] = kind;
      ++place[kind];
    }
  }
  int end = 0;
  for (int kind = 0; kind < nm::kPairs; ++kind) {
    end += place[kind];
    ends[kind] = static_cast<uint16_t>(end);
    place[kind] = end - place[kind];
  }
  for (int row = 0; row < tiles * nm::kTileRows; ++row) rows[place[kinds[row]]++] = static_cast<uint8_t>(row);
}
