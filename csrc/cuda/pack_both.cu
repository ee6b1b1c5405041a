// A weight and its transpose at once, under one mask that keeps two of four along both axes. Bound by memory, as pack.cu.
//
//   prune_both_*   |W| -> the best transposable mask -> W and W.T packed, and the mask if asked for: one reading of W
//   keep_both_*    W under a given mask -> W and W.T packed, and W masked in place if asked for: a training step
//   mask_both_*    |W| -> the best transposable mask alone, of 4-byte items too
//
// A thread has a 4x4 block: it chooses what is kept of it, and takes it from its registers for both. A warp has the 16 x 32
// places of a step of W, which its lanes exchange among each other; eight of them have a square, of whose columns W.T has
// its chunks. Sizes are multiples of 4, rows `stride` items apart.
#include "cuda/best_mask.h"
#include "cuda/layout.h"
#include "cuda/ptx.h"
#include "cuda/two_of_four.h"

namespace twofour::cuda {

constexpr uint32_t kSquare = 64;  // a block packs squares of W
constexpr uint32_t kBothThreads = (kSquare / 4) * (kSquare / 4);
constexpr uint32_t kBlocksOfTile = kTile / 4, kBlocksOfStep = 8, kTilesOfSquare = kSquare / kTile;
constexpr uint32_t kFragmentWords = kWarp * 4;
constexpr uint32_t kTurnedStride = kFragmentWords + 8;  // of words, so that those of neighbouring tiles lie in other banks
constexpr uint32_t kSquareFragments = kTilesOfSquare * 2;

// Where a thread stands in the square: its 4x4 block is number i of the rows and j of the columns.
struct BlockPlace {
  uint32_t lane, fragment, i, j;

  TWOFOUR_DEVICE explicit BlockPlace(uint32_t thread)
      : lane(thread % kWarp),
        fragment(thread / kWarp),
        i(fragment / 2 * kBlocksOfTile + lane / kBlocksOfStep),
        j(fragment % 2 * kBlocksOfStep + lane % kBlocksOfStep) {}
};

// What a mask keeps of a block.
struct Choice {
  uint32_t nibbles;  // as in MaskTable
  uint4 selectors;
};

// Four times two words -> of each the items that its selector keeps; selectors lie two in a word.
TWOFOUR_DEVICE void keep_four(const uint2 (&fours)[4], uint32_t first, uint32_t last, char* to) {
  unroll<4>([&](auto k) {
    const uint32_t two = k < 2 ? first : last;
    const uint32_t kept = byte_permute(fours[k].x, fours[k].y, k % 2 == 0 ? two : two >> 16);
    *reinterpret_cast<uint32_t*>(to + 64 * k) = kept;  // the next row is four lanes on
  });
}

// Where in a Square what is kept of a block goes, of W in the lower half and of W.T in the upper one, in bytes: the word of
// its first row or column; and the nibbles that its lane has after those with neighbouring blocks have exchanged theirs, of
// a row of four blocks side by side or of a column.
struct SquarePlaces {
  uint32_t words, nibbles;

  TWOFOUR_DEVICE void find(const BlockPlace& at) {
    const uint32_t i = at.i, j = at.j, row = 4 * (i % 4) + j % 4, column = 4 * (j % 4) + i % 4;
    const uint32_t own = at.fragment * kFragmentWords + i % 2 * 64 + j % 4 * 4 + i % 4 / 2 + j % 8 / 4 * 2;
    // Lanes 16 and above have their words two and two the other way around: in other banks than those of the lanes below.
    const uint32_t turned =
        (j / 4 * 2 + i / 8) * kTurnedStride + j % 2 * 64 + i % 4 * 4 + ((j % 4 / 2 + i % 8 / 4 * 2) ^ j % 2 * 2);
    words = 4 * (own | turned << 16);
    nibbles = 2 * ((i / 4 * kWarp + row % 8 * 4 + j / 4) * 2 + row / 8) |
              2 * ((j / 4 * kWarp + column % 8 * 4 + i / 4) * 2 + column / 8) << 16;
  }
};

// The packed square, as lanes tell each other of it.
struct Square {
  alignas(16) char own[kSquareFragments * kFragmentWords * 4];  // of each warp
  alignas(16) char turned[kSquareFragments * kTurnedStride * 4];
  uint2 items[2][4][kBothThreads];    // rows of the block of each thread; of the next square too
  SquarePlaces places[kBothThreads];  // of each thread
  alignas(4) char metadata[2][kTilesOfSquare * kWarp * 4];  // of W and W.T

  // What is kept of the block of a thread; every lane of a warp does so.
  TWOFOUR_DEVICE void put(const SquarePlaces& to, const BlockPlace& at, const uint2 (&block)[4], const Choice& choice) {
    keep_four(block, choice.selectors.x, choice.selectors.y, own + (to.words & 0xffffu));
    uint2 columns[4];
    unroll<4>([&](auto c) {  // two items of a word of each row
      constexpr uint32_t selector = decltype(c){} % 2 == 0 ? 0x5410 : 0x7632;
      const auto word = [&](auto r) { return decltype(c){} < 2 ? block[r].x : block[r].y; };
      columns[c] = {byte_permute(word(Constant<0>{}), word(Constant<1>{}), selector),
                    byte_permute(word(Constant<2>{}), word(Constant<3>{}), selector)};
    });
    keep_four(columns, choice.selectors.z, choice.selectors.w, turned + (to.words >> 16));
    put_half(metadata[0] + (to.nibbles & 0xffffu), turn_nibbles<1>(choice.nibbles, at.j % 4));
    put_half(metadata[1] + (to.nibbles >> 16), turn_nibbles<kBlocksOfStep>(choice.nibbles >> 16, at.i % 4));
  }
  TWOFOUR_DEVICE static void put_half(char* to, uint32_t word) {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word);
  }

  TWOFOUR_DEVICE uint4 own_fragment(const BlockPlace& at) const {
    return reinterpret_cast<const uint4*>(own)[at.fragment * kWarp + at.lane];
  }
  TWOFOUR_DEVICE uint4 turned_fragment(const BlockPlace& at) const {
    const char* const from = turned + (at.fragment * kTurnedStride + at.lane * 4) * 4;
    const uint32_t first_half = at.lane / 16 * 8;
    const uint2 first = *reinterpret_cast<const uint2*>(from + first_half);
    const uint2 last = *reinterpret_cast<const uint2*>(from + (8 - first_half));
    return {first.x, first.y, last.x, last.y};
  }
  TWOFOUR_DEVICE uint32_t word(int of_turned, uint32_t at) const {
    return reinterpret_cast<const uint32_t*>(metadata[of_turned])[at];
  }
};

TWOFOUR_DEVICE bool keeps_two(uint32_t bits) { return (0x1668u >> bits & 1u) != 0; }

// Of a pair of places by its four bits, 6 for the first and 1 for the last.
TWOFOUR_DEVICE uint32_t number_of_pair(uint32_t bits) {
  constexpr uint64_t table = uint64_t{6} << 48 | uint64_t{5} << 40 | uint64_t{4} << 36 | 3 << 24 | 2 << 20 | 1 << 12;
  return static_cast<uint32_t>(table >> (4 * bits)) & 15u;
}

// The nibbles of the rows of a block as bytes of 0 and 1, at its first place in a mask.
TWOFOUR_DEVICE void write_mask(uint32_t nibbles, uint8_t* to, int64_t columns) {
  unroll<4>([&](auto r) {
    const uint32_t nibble = nibbles >> (4 * r) & 15u;
    store_four(to + r * columns, 1u << (8 * (nibble & 3u)) | 1u << (8 * (nibble >> 2)));
  });
}

// What masks keep, by their numbers, in shared memory.
using Table = MaskTable;

TWOFOUR_DEVICE void prepare(Table& table) {
  static_assert(kMasks == kBothThreads, "a thread brings one");
  table.nibbles[threadIdx.x] = kMaskTable.nibbles[threadIdx.x];
  table.selectors[threadIdx.x] = kMaskTable.selectors[threadIdx.x];
}

TWOFOUR_DEVICE Choice choice_of(const Table& table, uint32_t number) {
  const uint32_t at = number % kMasks;
  return {table.nibbles[at], table.selectors[at]};
}

// |weights| decide.
template <class Format>
struct BestMask {
  static constexpr bool kInPlace = false;
  uint8_t* mask;  // [rows, columns] where it is written, or null

  TWOFOUR_DEVICE Choice choose(const Table& table, const uint2 (&rows)[4], uint64_t row, uint32_t column,
                               int64_t columns) const {
    const Choice choice = choice_of(table, best_mask<Format>(rows));
    if (mask != nullptr) write_mask(choice.nibbles, mask + row * columns + column, columns);
    return choice;
  }
};

struct GivenMask {
  static constexpr bool kInPlace = true;  // may be: the weight is not constant
  const uint8_t* mask;  // [rows, columns] of 0 and 1
  uint16_t* masked;     // the weight itself, where dropped places are to become zeros, or null
  int64_t stride;
  uint32_t* status;     // 1 is set where four places of a row or column do not keep two; or null

  TWOFOUR_DEVICE Choice choose(const Table& table, const uint2 (&rows)[4], uint64_t row, uint32_t column,
                               int64_t columns) const {
    uint32_t number = 0, kept = 0, wrong = 0, mask_rows[4];  // kept of each column, a byte each
    unroll<4>([&](auto k) { mask_rows[k] = load_four(mask + (row + k) * columns + column); });  // before what is stored
    unroll<4>([&](auto k) {
      const uint32_t bytes = mask_rows[k];
      const uint32_t four = bytes * 0x08040201u >> 24 & 15u;  // the first place the highest
      kept += bytes;
      wrong |= !keeps_two(four);
      if constexpr (decltype(k){} < 3) number = 6 * number + number_of_pair(four);
      if (masked == nullptr) return;
      const uint32_t low = (bytes & 1u) * 0xffffu | (bytes >> 8 & 1u) * 0xffff0000u;
      const uint32_t high = (bytes >> 16 & 1u) * 0xffffu | (bytes >> 24 & 1u) * 0xffff0000u;
      store_four(masked + (row + k) * stride + column, uint2{rows[k].x & low, rows[k].y & high});
    });
    wrong |= kept != 0x02020202u;
    if (wrong != 0 && status != nullptr) or_into(status, 1u);
    return choice_of(table, number);
  }
};

// Starts the copies of what a thread has of square x, zeros outside of the matrix; or has copied it, where rows do not begin
// at multiples of 8 bytes.
template <bool kInPlace>
TWOFOUR_DEVICE void fetch_block(const uint16_t* weight, int64_t stride, uint32_t height, uint32_t width, uint32_t x,
                                uint2 (&items)[4][kBothThreads]) {
  const uint32_t thread = thread_again();
  const BlockPlace at(thread);
  const uint32_t row = blockIdx.y * kSquare + 4 * at.i, column = x * kSquare + 4 * at.j;
  const bool inside = row < height && column < width;
  const uint16_t* const from = inside ? weight + (row * stride + column) : weight;
  if ((reinterpret_cast<uint64_t>(weight) | static_cast<uint64_t>(stride) * sizeof *weight) % sizeof(uint2) == 0) {
    unroll<4>([&](auto r) {
      copy_async(&items[r][thread], reinterpret_cast<const uint2*>(inside ? from + r * stride : from), inside ? 8 : 0);
    });
  } else {
    unroll<4>([&](auto r) {
      items[r][thread] = !inside ? uint2{0, 0} : kInPlace ? load_four_of_own(from + r * stride) : load_four(from + r * stride);
    });
  }
  commit_copies();
}

template <class Mask>
TWOFOUR_DEVICE void pack_both(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values,
                              uint32_t* metadata, uint4* turned_values, uint32_t* turned_metadata, const Mask& mask) {
  TWOFOUR_SHARED Square square;
  TWOFOUR_SHARED Table table;
  prepare(table);
  square.places[threadIdx.x].find(BlockPlace(threadIdx.x));
  const uint32_t height = static_cast<uint32_t>(rows), width = static_cast<uint32_t>(columns), y = blockIdx.y;
  const uint32_t squares = (width + kSquare - 1) / kSquare;
  uint32_t use = 0;
  if (blockIdx.x < squares) fetch_block<Mask::kInPlace>(weight, stride, height, width, blockIdx.x, square.items[0]);
  sync_block();
  TWOFOUR_ROLLED
  for (uint32_t x = blockIdx.x; x < squares; x += gridDim.x, use ^= 1) {
    if (x + gridDim.x < squares) {
      fetch_block<Mask::kInPlace>(weight, stride, height, width, x + gridDim.x, square.items[use ^ 1]);
    } else {
      commit_copies();
    }
    wait_for_copies<1>();
    Choice choice{kPaddingNibble * 0x11111111u, {}};
    uint2 block[4];
    {
      const uint32_t thread = thread_again();
      const BlockPlace at(thread);
      const uint32_t row = y * kSquare + 4 * at.i, column = x * kSquare + 4 * at.j;
      unroll<4>([&](auto r) { block[r] = square.items[use][r][thread]; });
      if (row < height && column < width) choice = mask.choose(table, block, row, column, columns);
    }
    sync_warp();
    // Where the thread stands and what it has of the block are asked for anew: registers that hold them, or what follows
    // from them, would be in the way of the choice.
    const uint32_t thread = thread_again();
    const BlockPlace at(thread);
    unroll<4>([&](auto r) { block[r] = square.items[use][r][thread]; });
    square.put(square.places[thread], at, block, choice);
    sync_block();

    const uint32_t tile = at.fragment / 2, step = at.fragment % 2;
    const uint32_t own_tile = y * kTilesOfSquare + tile, turned_tile = x * kTilesOfSquare + tile;
    if (own_tile * kTile < height) {
      const uint64_t chunk = own_tile * squares + x;
      values[chunk * (2 * kWarp) + thread % (2 * kWarp)] = square.own_fragment(at);
      if (step == 0) metadata[chunk * kWarp + at.lane] = square.word(0, tile * kWarp + at.lane);
    }
    if (turned_tile * kTile < width) {
      const uint64_t chunk = turned_tile * ((height + kSquare - 1) / kSquare) + y;
      turned_values[chunk * (2 * kWarp) + thread % (2 * kWarp)] = square.turned_fragment(at);
      if (step == 1) turned_metadata[chunk * kWarp + at.lane] = square.word(1, tile * kWarp + at.lane);
    }
    sync_block();
  }
}

#define TWOFOUR_PRUNE_BOTH(name, Format)                                                                               \
  TWOFOUR_KERNEL(kBothThreads, 4)                                                                                      \
  name(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,        \
       uint4* turned_values, uint32_t* turned_metadata, uint8_t* mask) {                                                \
    pack_both(weight, stride, rows, columns, values, metadata, turned_values, turned_metadata, BestMask<Format>{mask}); \
  }
TWOFOUR_PRUNE_BOTH(prune_both_bf16, Bfloat16)
TWOFOUR_PRUNE_BOTH(prune_both_fp16, Float16)

TWOFOUR_KERNEL(kBothThreads, 4)
keep_both_half(const uint16_t* weight, int64_t stride, int64_t rows, int64_t columns, uint4* values, uint32_t* metadata,
               uint4* turned_values, uint32_t* turned_metadata, const uint8_t* mask, uint16_t* masked, uint32_t* status) {
  pack_both(weight, stride, rows, columns, values, metadata, turned_values, turned_metadata,
            GivenMask{mask, masked, stride, status});
}

// ---- the mask alone: a thread chooses for a 4x4 block ----------------------------------------------------------------

template <class Format, class Item>
TWOFOUR_DEVICE void mask_both(const Item* weight, int64_t stride, int64_t rows, int64_t columns, uint8_t* mask) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = int64_t{blockIdx.y} * kSquare + 4 * (thread / (kSquare / 4));
  const int64_t column = int64_t{blockIdx.x} * kSquare + 4 * (thread % (kSquare / 4));
  if (row >= rows || column >= columns) return;
  decltype(load_four(weight)) block[4];
  unroll<4>([&](auto r) { block[r] = load_four(weight + (row + r) * stride + column); });
  const uint32_t number = best_mask<Format>(block) % kMasks;
  write_mask(kMaskTable.nibbles[number], mask + row * columns + column, columns);
}

#define TWOFOUR_MASK_BOTH(name, Format, Item)                                                                         \
  TWOFOUR_KERNEL(kBothThreads, 4)                                                                                     \
  name(const Item* weight, int64_t stride, int64_t rows, int64_t columns, uint8_t* mask) {                            \
    mask_both<Format>(weight, stride, rows, columns, mask);                                                           \
  }
TWOFOUR_MASK_BOTH(mask_both_bf16, Bfloat16, uint16_t)
TWOFOUR_MASK_BOTH(mask_both_fp16, Float16, uint16_t)
TWOFOUR_MASK_BOTH(mask_both_fp32, Float32, float)

}  // namespace twofour::cuda
