// AVX-512 F, BW, VL, DQ: 16 rows of W, 64 columns of 2 bytes or 16 of 4, into a tile of W and the tiles of W.T below it.
//
// Four rows at a time, a band. For W a lane is a group: what it keeps is chosen in its lane, and a transpose puts the rows
// of a group side by side. For W.T a lane is a column, whose four rows are the four vectors of the band: no transpose.
#include "cpu/pack_masked.h"

#include <immintrin.h>

#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
#include "cpu/simd_avx512.inl.h"

using nm::nibble_of;

// `yes` where a bit of `mask` is set, `no` elsewhere.
inline I select(uint32_t mask, I yes, I no) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), yes, no, 0xca);
}

// ---- the masks of groups -------------------------------------------------------------------------------------------
//
// Four bits, the first place lowest.

constexpr unsigned kBad = 1u << 7;  // not two are kept; the sign of a byte

struct ByBits {
  uint32_t at[16];
};

template <class Of>
constexpr ByBits table_of_pairs(Of of) {
  ByBits table{};
  for (unsigned bits = 0; bits < 16; ++bits) table.at[bits] = kBad;
  for (unsigned first = 0; first < 4; ++first) {
    for (unsigned second = first + 1; second < 4; ++second) table.at[1u << first | 1u << second] = of(first, second);
  }
  return table;
}

// The nibble of the metadata.
alignas(64) constexpr ByBits kNibbles = table_of_pairs(nibble_of);

// Four bytes of each lane, 0 or 1 -> four bits.
inline I bits_of_bytes(I bytes) {
  return _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, _mm512_set1_epi32(0x08040201)), _mm512_set1_epi16(1));
}

// Bytes, 0 or 1, of four rows -> the nibble of each column, or kBad, in its byte.
inline I nibbles_of_columns(I row0, I row1, I row2, I row3) {
  const I upper = _mm512_or_si512(row0, _mm512_slli_epi16(row1, 1));
  const I lower = _mm512_or_si512(row2, _mm512_slli_epi16(row3, 1));
  const I table = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_load_si512(&kNibbles)));
  return _mm512_shuffle_epi8(table, _mm512_or_si512(upper, _mm512_slli_epi16(lower, 2)));
}

// Nibbles of four columns in the bytes of a lane -> byte 0: of columns 0 and 2; byte 1: of columns 1 and 3.
inline I joined_nibbles(I columns) { return _mm512_or_si512(columns, _mm512_srli_epi32(columns, 12)); }

// ---- 2 bytes: a lane holds both items that a group keeps ------------------------------------------------------------

// Either half of a lane is about one kept item: bits 0 and 5 say which it is of the words of a lane of two vectors, places
// 0 and 1 in the first vector; bits 8 .. 11 and once more 12 .. 15 are the nibble of both.
constexpr uint32_t half_choice(unsigned place, unsigned nibble) {
  return (place % 2) | (place / 2) << 5 | nibble << 8 | nibble << 12;
}
constexpr uint32_t choice_of(unsigned first, unsigned second) {
  const unsigned nibble = nibble_of(first, second);
  return half_choice(first, nibble) | half_choice(second, nibble) << 16;
}
alignas(64) constexpr ByBits kChoices = table_of_pairs(choice_of);

// Of four rows -> byte 1: nibbles of rows 0 and 2; byte 3: of rows 1 and 3.
TWOFOUR_INLINE inline I nibbles_of_rows(const I (&choices)[4]) {
  const I even = select(0x0000f000u, choices[2], choices[0]), odd = select(0xf0000000u, choices[3], choices[1]);
  return select(0xffff0000u, odd, even);
}

// Sixteen rows of 16 groups, from four times nibbles_of_rows.
TWOFOUR_INLINE inline void store_row_nibbles(const I (&bands)[4], uint8_t* metadata) {
  const I upper = select(0xff00ff00u, bands[1], _mm512_srli_epi32(bands[0], 8));  // even rows of both below odd rows
  const I lower = select(0xff00ff00u, bands[3], _mm512_srli_epi32(bands[2], 8));
  const I lanes = _mm512_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
  const I words = _mm512_add_epi16(_mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16)),
                                   _mm512_set1_epi64(0x0021000100200000));  // of upper, lower, upper, lower
  _mm512_storeu_si512(metadata, _mm512_permutex2var_epi16(upper, words, lower));
  _mm512_storeu_si512(metadata + 64,
                      _mm512_permutex2var_epi16(upper, _mm512_add_epi16(words, _mm512_set1_epi16(16)), lower));
}

// Four groups of 64 columns, from four times joined_nibbles; `tile_bytes` from tile to tile of W.T.
TWOFOUR_INLINE inline void store_column_nibbles(const I (&bands)[4], uint8_t* metadata, int64_t tile_bytes) {
  const I bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const I upper = _mm512_shuffle_epi8(select(0xffff0000u, _mm512_slli_epi32(bands[1], 16), bands[0]), bytes);
  const I lower = _mm512_shuffle_epi8(select(0xffff0000u, _mm512_slli_epi32(bands[3], 16), bands[2]), bytes);
  const I tiles01 = _mm512_permutex2var_epi64(upper, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), lower);
  const I tiles23 = _mm512_permutex2var_epi64(upper, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), lower);
  const auto store = [&](int tile, __m256i words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(metadata + tile * tile_bytes), words);
  };
  store(0, _mm512_castsi512_si256(tiles01));
  store(1, _mm512_extracti64x4_epi64(tiles01, 1));
  store(2, _mm512_castsi512_si256(tiles23));
  store(3, _mm512_extracti64x4_epi64(tiles23, 1));
}

// What 32 columns keep of four rows: first and second of 16 columns in the lanes of either vector.
TWOFOUR_INLINE inline void kept_of_columns(const I (&rows)[4], const uint32_t (&kept)[4], I& low, I& high) {
  const I first = _mm512_mask_blend_epi16(kept[0], _mm512_mask_blend_epi16(kept[1], rows[2], rows[1]), rows[0]);
  const I second = _mm512_mask_blend_epi16(kept[3], _mm512_mask_blend_epi16(kept[2], rows[1], rows[2]), rows[3]);
  const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I beside = _mm512_add_epi16(_mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16)), _mm512_set1_epi32(32 << 16));
  low = _mm512_permutex2var_epi16(first, beside, second);
  high = _mm512_permutex2var_epi16(first, _mm512_add_epi16(beside, _mm512_set1_epi16(16)), second);
}

constexpr int kColumns16 = 64;

bool pack_16_bit(const MaskedPackArgs& args, int64_t row, int64_t column) {
  constexpr int64_t kCellBytes = nm::kTileRows * nm::kKeep * 2;
  const int64_t row_bytes = args.stride * 2, turned_tile = nm::groups_of(args.out_features);
  const int64_t turned_cell = column / nm::kTileRows * turned_tile + row / nm::kGroup;
  const char* from = static_cast<const char*>(args.weight) + row * row_bytes + column * 2;
  const uint8_t* mask = args.mask + row * args.in_features + column;
  char* turned_values = static_cast<char*>(args.turned_values) + turned_cell * kCellBytes;
  const bool both = args.turned_values != nullptr;
  const I lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const I words = _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16)), odd_lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(1));
  I bad = _mm512_setzero_si512(), bad_columns = bad, row_nibbles[4], column_nibbles[4];
  F kept[16];
  unroll<4>([&](auto band) {
    I low[4], high[4], bytes[4], choices[4];
    unroll<4>([&](auto r) {
      const char* own = from + (4 * band + r) * row_bytes;
      const uint8_t* own_mask = mask + (4 * band + r) * args.in_features;
      // 48 lines of as many rows are more than the hardware foresees.
      __builtin_prefetch(own + 128);
      __builtin_prefetch(own + 192);
      __builtin_prefetch(own_mask + 64);
      low[r] = _mm512_loadu_si512(own);
      high[r] = _mm512_loadu_si512(own + 64);
      bytes[r] = _mm512_loadu_si512(own_mask);
      choices[r] = _mm512_permutexvar_epi32(bits_of_bytes(bytes[r]), _mm512_load_si512(&kChoices));
      bad = _mm512_or_si512(bad, choices[r]);
      const I former = _mm512_permutex2var_epi32(low[r], lanes, high[r]);
      const I latter = _mm512_permutex2var_epi32(low[r], odd_lanes, high[r]);
      kept[4 * band + r] = _mm512_castsi512_ps(
          _mm512_permutex2var_epi16(former, _mm512_or_si512(choices[r], words), latter));
    });
    row_nibbles[band] = nibbles_of_rows(choices);
    if (!both) return;
    const I nibbles = nibbles_of_columns(bytes[0], bytes[1], bytes[2], bytes[3]);
    bad_columns = _mm512_or_si512(bad_columns, nibbles);
    column_nibbles[band] = joined_nibbles(nibbles);
    uint32_t kept_low[4], kept_high[4];
    unroll<4>([&](auto r) {
      const uint64_t bits = _mm512_test_epi8_mask(bytes[r], bytes[r]);
      kept_low[r] = static_cast<uint32_t>(bits);
      kept_high[r] = static_cast<uint32_t>(bits >> 32);
    });
    I tiles[4];
    kept_of_columns(low, kept_low, tiles[0], tiles[1]);
    kept_of_columns(high, kept_high, tiles[2], tiles[3]);
    unroll<4>([&](auto tile) {
      _mm512_storeu_si512(turned_values + (tile * turned_tile + band) * kCellBytes, tiles[tile]);
    });
  });
  const int64_t cell = row / nm::kTileRows * nm::groups_of(args.in_features) + column / nm::kGroup;
  char* values = static_cast<char*>(args.values) + cell * kCellBytes;
  transpose(kept);
  unroll<16>([&](auto group) { _mm512_storeu_ps(values + group * kCellBytes, kept[group]); });
  store_row_nibbles(row_nibbles, args.metadata + cell * nm::kTileMetadataBytes);
  if (both) {
    store_column_nibbles(column_nibbles, args.turned_metadata + turned_cell * nm::kTileMetadataBytes,
                         turned_tile * nm::kTileMetadataBytes);
  }
  return (_mm512_test_epi32_mask(bad, _mm512_set1_epi32(kBad)) |
          _mm512_test_epi8_mask(bad_columns, _mm512_set1_epi8(static_cast<char>(kBad)))) == 0;
}

// ---- 4 bytes: lane 4 * group + row of a band ------------------------------------------------------------------------

constexpr int kColumns32 = 16;

// v[i] block j -> v[j] block i, blocks of 128 bits.
TWOFOUR_INLINE inline void transpose_blocks(I (&v)[4]) {
  const I a = _mm512_shuffle_i32x4(v[0], v[1], 0x88), b = _mm512_shuffle_i32x4(v[0], v[1], 0xdd);
  const I c = _mm512_shuffle_i32x4(v[2], v[3], 0x88), d = _mm512_shuffle_i32x4(v[2], v[3], 0xdd);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  v[2] = _mm512_shuffle_i32x4(a, c, 0xdd);
  v[1] = _mm512_shuffle_i32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// Four rows -> places 0 .. 3 of their groups, in the lanes above.
TWOFOUR_INLINE inline void places_of_rows(const I (&rows)[4], I (&places)[4]) {
  const I a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const I c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  places[0] = _mm512_unpacklo_epi64(a, c);
  places[1] = _mm512_unpackhi_epi64(a, c);
  places[2] = _mm512_unpacklo_epi64(b, d);
  places[3] = _mm512_unpackhi_epi64(b, d);
}

TWOFOUR_INLINE inline void kept_of_four(const I (&x)[4], const __mmask16 (&kept)[4], I& first, I& second) {
  first = _mm512_mask_blend_epi32(kept[0], _mm512_mask_blend_epi32(kept[1], x[2], x[1]), x[0]);
  second = _mm512_mask_blend_epi32(kept[3], _mm512_mask_blend_epi32(kept[2], x[1], x[2]), x[3]);
}

bool pack_32_bit(const MaskedPackArgs& args, int64_t row, int64_t column) {
  constexpr int64_t kCellBytes = nm::kTileRows * nm::kKeep * 4;
  const int64_t turned_cell = column / nm::kTileRows * nm::groups_of(args.out_features) + row / nm::kGroup;
  const char* from = static_cast<const char*>(args.weight) + (row * args.stride + column) * 4;
  const uint8_t* mask = args.mask + row * args.in_features + column;
  char* turned_values = static_cast<char*>(args.turned_values) + turned_cell * kCellBytes;
  uint8_t* turned_metadata = args.turned_metadata + turned_cell * nm::kTileMetadataBytes;
  const bool both = args.turned_values != nullptr;
  I bad = _mm512_setzero_si512(), nibbles = bad, firsts[4], seconds[4];
  __m128i bad_columns = _mm_setzero_si128();
  unroll<4>([&](auto band) {
    I rows[4], places[4];
    __m128i bytes[4];
    unroll<4>([&](auto r) {
      rows[r] = _mm512_loadu_si512(from + (4 * band + r) * args.stride * 4);
      bytes[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + (4 * band + r) * args.in_features));
    });
    places_of_rows(rows, places);
    I groups = _mm512_castsi128_si512(bytes[0]);
    groups = _mm512_inserti32x4(groups, bytes[1], 1);
    groups = _mm512_inserti32x4(groups, bytes[2], 2);
    groups = _mm512_inserti32x4(groups, bytes[3], 3);
    groups = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), groups);
    __mmask16 kept[4];
    unroll<4>([&](auto place) { kept[place] = _mm512_test_epi32_mask(groups, _mm512_set1_epi32(1 << (8 * place))); });
    kept_of_four(places, kept, firsts[band], seconds[band]);
    const I own = _mm512_permutexvar_epi32(bits_of_bytes(groups), _mm512_load_si512(&kNibbles));
    bad = _mm512_or_si512(bad, own);
    nibbles = _mm512_or_si512(nibbles, _mm512_slli_epi32(own, static_cast<unsigned>(8 * band)));
    if (!both) return;
    unroll<4>([&](auto r) { kept[r] = static_cast<__mmask16>(_mm_movemask_epi8(_mm_slli_epi16(bytes[r], 7))); });
    I first, second;
    kept_of_four(rows, kept, first, second);
    _mm512_storeu_si512(turned_values + band * kCellBytes, first);
    _mm512_storeu_si512(turned_values + band * kCellBytes + 64, second);
    const auto wide = [&](int r) { return _mm512_castsi128_si512(bytes[r]); };
    const I columns = nibbles_of_columns(wide(0), wide(1), wide(2), wide(3));
    bad_columns = _mm_or_si128(bad_columns, _mm512_castsi512_si128(columns));
    const __m128i joined = _mm_shuffle_epi8(_mm512_castsi512_si128(joined_nibbles(columns)),
                                            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(turned_metadata + band * nm::kTileMetadataBytes), joined);
  });
  const int64_t cell = row / nm::kTileRows * nm::groups_of(args.in_features) + column / nm::kGroup;
  char* values = static_cast<char*>(args.values) + cell * kCellBytes;
  transpose_blocks(firsts);
  transpose_blocks(seconds);
  unroll<4>([&](auto group) {
    _mm512_storeu_si512(values + group * kCellBytes, firsts[group]);
    _mm512_storeu_si512(values + group * kCellBytes + 64, seconds[group]);
  });
  // Rows 2 and 3 of each band beside rows 0 and 1.
  nibbles = _mm512_or_si512(nibbles, _mm512_slli_epi32(_mm512_unpackhi_epi64(nibbles, nibbles), 4));
  nibbles = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), nibbles);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.metadata + cell * nm::kTileMetadataBytes),
                      _mm512_castsi512_si256(nibbles));
  return _mm512_test_epi32_mask(bad, _mm512_set1_epi32(kBad)) == 0 && _mm_movemask_epi8(bad_columns) == 0;
}

}  // namespace

const PackMaskedKernels pack_masked_avx512 = {{pack_16_bit, pack_32_bit}, {kColumns16, kColumns32}};

}  // namespace twofour::cpu
