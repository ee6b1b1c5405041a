// What the gradient kernels need besides simd_avx512.inl.h. Included inside an unnamed namespace.

inline F splat_of(const float* p) { return _mm512_set1_ps(*p); }

// The value stays in its register: the compiler would rather load it again for each use, and loads are what is scarce.
#if defined(__AVX512F__)
inline void keep_in_register(F& v) { __asm__("" : "+v"(v)); }
#else  // emulated (tests/native/emulated): there is no such register
inline void keep_in_register(F&) {}
#endif

// Lane k: the sum of the lanes of v[k]. Half the shuffles of a transpose: each step adds what it has brought together.
inline F sums_of(F (&v)[16]) {
  F pairs[8], quads[4], blocks[2];
  unroll<8>([&](auto i) TWOFOUR_INLINE {
    pairs[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  });
  unroll<4>([&](auto i) TWOFOUR_INLINE {  // lane j of each 128-bit block: a part of the sum of v[4i + j]
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  });
  unroll<2>([&](auto i) TWOFOUR_INLINE {
    blocks[i] = add(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                    _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  });
  return add(_mm512_shuffle_f32x4(blocks[0], blocks[1], 0x88), _mm512_shuffle_f32x4(blocks[0], blocks[1], 0xdd));
}

// The bf16 nearest to each float in the upper half of its lane; see store_first.
inline I rounded_bits(F v) {
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const I quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
}

// 16 rows' first and second values as pairs of bf16.
inline void store_pairs(bf16* p, const float* firsts, const float* seconds) {
  const I low = _mm512_srli_epi32(rounded_bits(load(firsts)), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_bits(load(seconds))));
}

inline F first_values(const float* slots) { return load(slots); }
inline F second_values(const float* slots) { return load(slots + nm::kTileRows); }
inline F first_values(const bf16* slots) { return first_of_pairs(slots); }
inline F second_values(const bf16* slots) { return second_of_pairs(slots); }

// The same tile some groups later: there are more streams than the machine's prefetchers follow.
template <class Item>
TWOFOUR_INLINE inline void prefetch_cell(const Item* slots) {
  constexpr int64_t kCellBytes = nm::kTileRows * nm::kKeep * sizeof(Item), kAhead = 8 * kCellBytes;
  for (int64_t b = 0; b < kCellBytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(slots) + kAhead + b);
}

// The two values of each row of `tiles` cells, `groups` cells apart, as fp32.
template <class Item>
TWOFOUR_INLINE inline void gather_values(const Item* values, int64_t groups, int tiles, float* w0, float* w1) {
  for (int tile = 0; tile < tiles; ++tile) {
    const Item* slots = values + tile * groups * nm::kTileRows * nm::kKeep;
    prefetch_cell(slots);
    store(w0 + tile * nm::kTileRows, first_values(slots));
    store(w1 + tile * nm::kTileRows, second_values(slots));
  }
}

// The rows of `tiles` tiles of one group, sorted by kind; tiles are `groups` cells apart. A filler that is not negative
// makes the number of rows of each kind even. Kind by kind, so that what a compressed vector writes too far is
// overwritten by the next; the last one writes up to 16 bytes of the slack behind.
inline void sort_cell(const uint8_t* metadata, int64_t groups, int tiles, int filler, uint16_t* ends, uint8_t* rows) {
  constexpr int kMaxTiles = kMaxChunkRows / nm::kTileRows;
  __mmask16 masks[kMaxTiles][nm::kPairs];
  for (int tile = 0; tile < tiles; ++tile) {
    const uint8_t* of_tile = metadata + tile * groups * nm::kTileMetadataBytes;
    const I kinds = _mm512_and_si512(nibbles<0, 1>(of_tile), _mm512_set1_epi32(15));
    unsigned others = 0;
    for (int kind = 1; kind < nm::kPairs; ++kind) {
      masks[tile][kind] = _mm512_cmpeq_epi32_mask(kinds, _mm512_set1_epi32(static_cast<int>(nm::kPairNibble[kind])));
      others |= masks[tile][kind];
    }
    masks[tile][0] = static_cast<__mmask16>(~others);  // damaged nibbles too: every row has a place
  }
  const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int to = 0;
  for (int kind = 0; kind < nm::kPairs; ++kind) {
    for (int tile = 0; tile < tiles; ++tile) {
      const I numbers = _mm512_add_epi32(lane, _mm512_set1_epi32(tile * nm::kTileRows));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows + to),
                       _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(masks[tile][kind], numbers)));
      to += __builtin_popcount(masks[tile][kind]);
    }
    if (filler >= 0 && to % 2 != 0) rows[to++] = static_cast<uint8_t>(filler);
    ends[kind] = static_cast<uint16_t>(to);
  }
}
