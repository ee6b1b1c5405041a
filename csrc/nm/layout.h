// How a 2:4 matrix is stored: the metadata bits of the canonical format and the tiles of the CPU layout.
//
// W is [out_features, in_features]. Four neighbours along in_features form a group; two of them are kept.
//
//   group     w0  w1  w2  w3        kept: w1 and w3
//   values    [ w1, w3 ]
//   nibble    i0 | i1 << 2          i0 = 1, i1 = 3, i0 < i1  ->  0b1101
//
// Canonical: values [out, in / 2] row-major; metadata uint8 [out, ceil(in / 8)], two groups per byte, low nibble first.
//
// CPU layout: the same bytes, in tiles of 16 rows, so that one vector holds one column of a tile and every kernel
// (weights in lanes, or tokens in lanes) reads one contiguous stream. `tiles = ceil(out / 16)`, `groups = in / 4`.
//
//   fp32 values   [tiles, groups, 2, 16]     | r0.v0 r1.v0 .. r15.v0 | r0.v1 r1.v1 .. r15.v1 |
//   bf16 values   [tiles, groups, 16, 2]     | r0.v0 r0.v1 | r1.v0 r1.v1 | .. | r15.v0 r15.v1 |, float8 likewise
//   metadata      [tiles, groups, 8] uint8   two little-endian 32-bit words:
//
//                   bit   31..28 27..24  ..  7..4   3..0
//                 word 0     r14    r12  ..    r2     r0
//                 word 1     r15    r13  ..    r3     r1
//
// Where each S = 2 or 4 neighbouring rows have one mask (2:4x2, 2:4x4), their nibble is stored once:
//
//   metadata      [tiles, groups, 8 / S] uint8, little-endian: the nibble of rows r .. r + S - 1 from bit 4 * r / S on
//
// Rows that share a mask need not be neighbours: an order says which row lies where, and then S neighbours in the tiles have
// one mask. Rows stay inside their window, the rows 0 .. 63, 64 .. 127, ..:
//
//   order         [tiles, 16] uint8: row 64 * (place / 64) + order[place] lies at `place`; behind the metadata
//
// Kernels that hold the sums of a whole window write its outputs in their natural order from wherever the sums lie, which
// costs nothing; wider windows would keep little more of a weight (of a score 0.768 with 64 rows, 0.770 with 128), and leave
// fewer pieces for threads. Places beyond out_features hold themselves. Without an order every place does.
//
// With S = 1, one 64-bit broadcast puts word 0 into the even and word 1 into the odd 32-bit lanes; one shift by the constants
// {0, 0, 4, 4, .., 28, 28} then leaves the nibble of row r in the low bits of lane r. The bits above are those of
// other rows: select instructions ignore them.
//
// Rows beyond out_features hold the value 0 and the nibble of (0, 1). They are computed and never written.
#pragma once

#include <cstdint>

namespace twofour::nm {

constexpr int kGroup = 4;
constexpr int kKeep = 2;
constexpr int kTileRows = 16;
constexpr int kWindowRows = 64;
constexpr int kWindowTiles = kWindowRows / kTileRows;
constexpr int kTileMetadataBytes = 8;  // of one (tile, group) where every row has its own nibble

// Internal linkage on purpose: files compiled for different instruction sets must not share these functions.
static constexpr unsigned nibble_of(unsigned i0, unsigned i1) { return i0 | i1 << 2; }
static constexpr unsigned first_of(unsigned nibble) { return nibble & 3u; }
static constexpr unsigned second_of(unsigned nibble) { return (nibble >> 2) & 3u; }

// Where the nibble of `row` (0..15) of a tile sits in its two metadata words.
static constexpr int word_of_row(int row) { return row % 2; }
static constexpr int shift_of_row(int row) { return 4 * (row / 2); }

// The same for any `shared`, the number of neighbouring rows that have one mask: bytes per (tile, group), and the bit at
// which the nibble of a row starts in them.
static constexpr int metadata_bytes(int shared) { return kTileMetadataBytes / shared; }
static constexpr int bit_of_row(int row, int shared) {
  return shared == 1 ? 32 * word_of_row(row) + shift_of_row(row) : 4 * (row / shared);
}

// The row at `place` of the tiles; `order` may be null.
static constexpr int64_t row_of(const uint8_t* order, int64_t place) {
  return order == nullptr ? place : place / kWindowRows * kWindowRows + order[place];
}

static constexpr int64_t tiles_of(int64_t out_features) { return (out_features + kTileRows - 1) / kTileRows; }
static constexpr int64_t groups_of(int64_t in_features) { return in_features / kGroup; }
static constexpr int64_t metadata_row_bytes(int64_t in_features) { return (groups_of(in_features) + 1) / 2; }

// The six pairs (i0, i1) in lexicographic order, as nibbles.
constexpr int kPairs = 6;
constexpr unsigned kPairNibble[kPairs] = {nibble_of(0, 1), nibble_of(0, 2), nibble_of(0, 3),
                                          nibble_of(1, 2), nibble_of(1, 3), nibble_of(2, 3)};

// Number (0..5) of the pair with this nibble; 0 for the ten nibbles that no valid matrix holds, so that even damaged
// metadata never leads outside a buffer.
static constexpr int pair_of(unsigned nibble) {
  for (int pair = 0; pair < kPairs; ++pair) {
    if (kPairNibble[pair] == nibble) return pair;
  }
  return 0;
}

constexpr unsigned kPaddingNibble = nibble_of(0, 1);

static_assert(kPairNibble[0] == 0b0100 && kPairNibble[1] == 0b1000 && kPairNibble[2] == 0b1100, "format table");
static_assert(kPairNibble[3] == 0b1001 && kPairNibble[4] == 0b1101 && kPairNibble[5] == 0b1110, "format table");
static_assert(first_of(nibble_of(1, 3)) == 1 && second_of(nibble_of(1, 3)) == 3, "nibble halves");
static_assert(pair_of(nibble_of(2, 3)) == 5 && pair_of(nibble_of(0, 1)) == 0 && pair_of(0) == 0, "pair numbers");
static_assert(word_of_row(15) == 1 && shift_of_row(15) == 28 && word_of_row(14) == 0, "metadata words");
static_assert(bit_of_row(15, 1) == 60 && bit_of_row(14, 1) == 28 && bit_of_row(15, 4) == 12, "metadata bits");
static_assert(kTileRows * 4 == kTileMetadataBytes * 8, "one nibble per row");

}  // namespace twofour::nm
