// The CUDA layout of a 2:4 matrix: what a lane of mma.sp holds, in the order in which it holds it. A warp loads a fragment of
// values with one 16-byte load a lane, and multiplies: no shared memory, no ldmatrix. wgmma takes the same registers.
//
// Rows come in tiles of 16, columns in steps: 32 columns of 2-byte items, 64 of 1-byte items. Lane 4 * g + q, its register r:
//
//   row      g + 8 * (r % 2)
//   groups   2 bytes: q + 4 * (r / 2); the register is both kept items, the first below
//            1 byte:  2 * q + 8 * (r / 2), and the one after it above it
//
//   values     [tiles, steps, 32 lanes, 4 registers]  uint32: 512 bytes a step
//   metadata   2 bytes: [tiles, steps / 2, 32 lanes]  uint32, each 64 columns; the number of steps is even
//                       lane 4 * g + q: step q / 2 of the two, its groups 4 * (q % 2) + 0 .. 3;
//                       of row g from bit 0, of row g + 8 from bit 16; a nibble a group. Selector: the step.
//              1 byte:  [tiles, steps, 32 lanes]      uint32
//                       lane 4 * g + q: row g + 8 * (q % 2), groups 8 * (q / 2) + 0 .. 7. Selector: 0.
//
// So both are padded to 16 rows and 64 columns: values 0, nibbles of (0, 1). The canonical nibbles (nm/layout.h) are those
// of mma.sp::ordered_metadata. PTX ISA, "Matrix fragments for sparse mma.m16n8k32" and ".m16n8k64".
#pragma once

#include "cuda/device.h"

namespace twofour::cuda {

constexpr int kTile = 16;        // rows
constexpr int kColumns = 64;     // of a chunk: a word of metadata a lane
constexpr int kGroups = kColumns / 4;
constexpr int kWarp = 32;
constexpr int kFragmentBytes = 512;
constexpr int kMetadataBytes = 128;  // of a tile and a chunk
constexpr uint32_t kPaddingNibble = 0b0100;  // (0, 1)

// Steps of a chunk, and bytes of its values in a tile.
TWOFOUR_BOTH constexpr int steps_of(int itemsize) { return itemsize == 2 ? 2 : 1; }
TWOFOUR_BOTH constexpr int chunk_bytes(int itemsize) { return kFragmentBytes * steps_of(itemsize); }

TWOFOUR_BOTH int64_t tiles_of(int64_t rows) { return ceil_div(rows, kTile); }
TWOFOUR_BOTH int64_t chunks_of(int64_t columns) { return ceil_div(columns, kColumns); }

// Row in its tile, and first group in its chunk, of a register of values.
TWOFOUR_BOTH constexpr int row_of(int lane, int r) { return lane / 4 + 8 * (r % 2); }
TWOFOUR_BOTH constexpr int group_of(int itemsize, int lane, int step, int r) {
  return itemsize == 2 ? 8 * step + lane % 4 + 4 * (r / 2) : 2 * (lane % 4) + 8 * (r / 2);
}

// Row in its tile, and group in its chunk, of nibble i = 0 .. 7 of a word of metadata.
TWOFOUR_BOTH constexpr int nibble_row(int itemsize, int lane, int i) {
  return itemsize == 2 ? lane / 4 + 8 * (i / 4) : lane / 4 + 8 * (lane % 2);
}
TWOFOUR_BOTH constexpr int nibble_group(int itemsize, int lane, int i) {
  return itemsize == 2 ? 4 * (lane % 4) + i % 4 : 8 * (lane % 4 / 2) + i;
}

static_assert(nibble_group(2, 3, 7) == 15 && nibble_row(2, 3, 7) == 8, "step q / 2, half q % 2");
static_assert(group_of(2, 31, 1, 3) == 15 && row_of(31, 3) == 15, "the last register of the last lane");

}  // namespace twofour::cuda
