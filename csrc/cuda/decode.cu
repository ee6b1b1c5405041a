// y = x @ W.T for few tokens, W in the CUDA layout: bound by the reading of W, so W is streamed once, 36 bits a group.
//
// W is the left operand of mma.sp, 16 rows at a time; eight tokens are the columns of the right one. A block has kDown *
// kRowTiles tiles of rows and as a rule all columns: what several blocks add up costs microseconds, the reading of a
// layer 20. So its warps split the columns, kAcross chunks side by side, each chunk one warp's (or that of kDown warps, each
// with rows of its own). They meet when all is multiplied: then their sums are added up, in the order of the chunks.
//
// Until then no warp waits for others, but for those that share x. Fragments of W go to registers, past all caches but the
// last, kAhead chunks before they are multiplied: 60 to 110 KB under way for each multiprocessor, of which 64 keep the memory
// of an H200 busy. They are the first thing that a warp asks for. x of its chunks it copies for itself, into a ring of kSlots
// chunks in shared memory. A block reads all of x, so of many tokens kDown warps share a copy: blocks of more rows are fewer.
//
// Layers of few rows, and x of many tokens, need several blocks for the columns of a tile (gridDim.y). Where they are a
// cluster each reads the sums of all from their shared memory, for some of the tokens; else as in epilogue.h.
//
// A kernel started early asks for its first chunks to come to the last cache while the one before it ends.
#include "cuda/epilogue.h"
#include "cuda/products.h"

namespace twofour::cuda {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * kWarp;
constexpr int kStepBytes = 64;  // of a token

struct DecodeArgs {
  const char* values;
  const char* metadata;
  const char* x;  // [tokens, columns], rows `x_stride` bytes apart; address and stride multiples of 16
  int64_t x_stride;
  int64_t tokens, rows, columns;
  int64_t slice;       // chunks of a block
  void* partial;       // of add_slices; null where gridDim.y is 1, or a cluster
  uint32_t* counters;
  int64_t early;       // may the kernel before it still run?
};

TWOFOUR_BOTH constexpr int larger(int a, int b) { return a > b ? a : b; }
TWOFOUR_BOTH constexpr int smaller(int a, int b) { return a < b ? a : b; }

// How a block splits its rows and columns, and its shared memory. kernels/cuda/table.py has the same numbers.
template <class Products_, int kTokenTiles_, int kRowTiles_, int kDown_, int kAhead_, int kSlots_>
struct Split {
  using Products = Products_;
  static constexpr int kTokenTiles = kTokenTiles_, kRowTiles = kRowTiles_, kDown = kDown_;
  static constexpr int kAhead = kAhead_, kSlots = kSlots_;
  static constexpr int kAcross = kDecodeWarps / kDown, kRows = kDown * kRowTiles * kTile;
  static constexpr int kSteps = steps_of(Products::kItemsize), kFragments = steps_of(Products::kWeightItemsize);
  static constexpr int kTokensOfBlock = kTokenTiles * kTokens;

  static constexpr int kChunkBytes = kSteps * kStepBytes;
  static constexpr int kStride = kChunkBytes + 16;  // so that eight tokens lie in eight different groups of banks
  static constexpr int kSlotBytes = kTokensOfBlock * kStride;

  // Sums of a warp in shared memory, of as many tokens as have room: others after them.
  static constexpr int kSumTokens = smaller(kTokensOfBlock, 128 / kRowTiles), kPasses = kTokensOfBlock / kSumTokens;
  static constexpr int kSumStride = SumsOf<kRowTiles * kTile>::kStride, kSums = kSumTokens * kSumStride;
  static constexpr int kBytes = larger(kSlots * kSlotBytes, kDown * kSums * 4);  // of the warps of a chunk

  static_assert(kDecodeWarps % kDown == 0 && kTokenTiles % kDown == 0, "warps that share a chunk copy as many tokens each");
  static_assert(kTokensOfBlock % kSumTokens == 0, "a pass is a whole one");
};

// Waits for the warps that share a chunk.
template <int kDown>
TWOFOUR_DEVICE void sync_sharers(int across) {
  if constexpr (kDown == 1) {
    sync_warp();
  } else {
    sync_threads<kDown * kWarp>(1 + across);
  }
}

template <class S>
TWOFOUR_DEVICE void decode(const DecodeArgs& args, const Epilogue& epilogue) {
  using Products = typename S::Products;
  using Sum = typename Products::Sum;
  constexpr int kSteps = S::kSteps, kRowTiles = S::kRowTiles, kAcross = S::kAcross, kAhead = S::kAhead, kDown = S::kDown;
  constexpr int kBytes = S::kFragments * kFragmentBytes;  // of values, of a tile and a chunk
  TWOFOUR_DYNAMIC_SHARED(memory);
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const int down = warp % kDown, across = warp / kDown;

  const int tiles = static_cast<int>((static_cast<uint32_t>(args.rows) + kTile - 1) / kTile);
  const int chunks = static_cast<int>((static_cast<uint32_t>(args.columns) + kColumns - 1) / kColumns);
  const int slice = static_cast<int>(args.slice), begin = static_cast<int>(blockIdx.y) * slice;
  const int first = begin + across, last = smaller(begin + slice, chunks);
  const int tile = (static_cast<int>(blockIdx.x) * kDown + down) * kRowTiles;
  const char* values = args.values + lane * 16;
  const char* metadata = args.metadata + lane * 4;
  uint32_t at[kRowTiles];  // of the first chunk; behind the last tile it again, which nobody stores: so lanes need not part
  unroll<kRowTiles>([&](auto m) {
    at[m] = opaque(static_cast<uint32_t>(smaller(tile + m, tiles - 1)) * static_cast<uint32_t>(chunks) +
                   static_cast<uint32_t>(first));
  });
  Operand<S::kFragments> ahead[kAhead][kRowTiles];
  const auto load = [&](auto slot, auto turn) {  // of the warp's chunks that of this number, from the pointers on
    unroll<kRowTiles>([&](auto m) {
      const char* const from = values + uint64_t{at[m]} * kBytes + turn * (kAcross * kBytes);
      unroll<S::kFragments>([&](auto i) {
        ahead[slot][m].values[i] = load_written(reinterpret_cast<const uint4*>(from + i * kFragmentBytes));
      });
      const char* const word = metadata + uint64_t{at[m]} * kMetadataBytes + turn * (kAcross * kMetadataBytes);
      ahead[slot][m].metadata = load_written(reinterpret_cast<const uint32_t*>(word));
    });
  };
  if (args.early) {
    // What the block is going to ask for first: of a tile its chunks lie side by side.
    const int wanted = smaller(kAhead * kAcross, last - begin);
    for (int i = warp; i < kDown * kRowTiles; i += kDecodeWarps) {
      const int row_tile = static_cast<int>(blockIdx.x) * kDown * kRowTiles + i;
      if (lane != 0 || row_tile >= tiles || wanted <= 0) continue;
      const int64_t chunk = int64_t{row_tile} * chunks + begin;
      prefetch(args.values + chunk * kBytes, static_cast<uint32_t>(wanted * kBytes));
      prefetch(args.metadata + chunk * kMetadataBytes, static_cast<uint32_t>(wanted * kMetadataBytes));
    }
    wait_for_kernel_before();
  }
  unroll<kAhead>([&](auto slot) {
    if (first + slot * kAcross < last) load(slot, slot);
  });
  if (args.early) let_next_kernel_start();

  // Of x a lane copies 16 bytes of a step, of each eighth token. Tokens that are none stay as they are: theirs are columns
  // of the product that nobody stores. Behind the last column come zeros, as weights there are zeros too.
  char* const ring = memory + across * S::kBytes;
  constexpr int kTogether = kDown * kTokens;  // tokens that those who share a chunk copy at once
  const int token = down * kTokens + lane / 4, tokens = static_cast<int>(args.tokens) - token;
  const int offset_of_lane = lane % 4 * 16;
  const auto row_bytes = static_cast<uint32_t>(args.columns * Products::kItemsize);
  const char* const x = opaque(args.x + token * args.x_stride);
  const int to_slot = opaque(token * S::kStride + offset_of_lane);
  const auto fetch = [&](int chunk, int step, char* slot) {
    if (chunk >= last) return;
    const uint32_t offset = static_cast<uint32_t>(chunk) * S::kChunkBytes + step * kStepBytes + offset_of_lane;
    const uint32_t left = row_bytes > offset ? row_bytes - offset : 0, bytes = left < 16 ? left : 16;
    const char* from = x + (bytes > 0 ? offset : 0);
    char* const to = slot + to_slot + step * kStepBytes;
    unroll<(S::kTokenTiles + kDown - 1) / kDown>([&](auto n) {
      if (n * kTogether < tokens) copy_async(to + n * kTogether * S::kStride, from, static_cast<int>(bytes));
      from += kTogether * args.x_stride;
    });
  };
  constexpr int kRing = S::kSlots * kSteps;  // steps
  static_assert(kRing >= 2, "one is read while another comes");
  unroll<kRing - 1>([&](auto i) {
    fetch(first + i / kSteps * kAcross, i % kSteps, ring + i / kSteps * S::kSlotBytes);
    commit_copies();
  });
  const auto selectors = Products::selectors(lane);
  if (warp == 0) prefetch_of_rows<S::kRows>(epilogue, int64_t{blockIdx.x} * S::kRows, lane);

  Sum sums[S::kTokenTiles * kRowTiles][4] = {};
  // Row of x and 16 bytes of it that this lane names to load_matrices: a token, and a quarter of a step.
  const int own = lane % 8 * S::kStride + Products::piece(lane / 8) * 16;
  char* const end = ring + S::kSlots * S::kSlotBytes;
  char* slot = ring;
  // All loads that a round begins report to one scoreboard of the hardware (ptxas gives them no more): so a warp waits for
  // kAhead chunks, multiplies one after the other and asks anew for each, while other warps wait for theirs.
  TWOFOUR_ROLLED
  for (int round = first; round < last; round += kAhead * kAcross) {
    unroll<kAhead>([&](auto i) {
      constexpr int turn = decltype(i){};
      const int chunk = round + turn * kAcross;
      if (chunk >= last) return;
      Operand<kSteps> a[kRowTiles];
      unroll<kRowTiles>([&](auto m) { a[m] = Products::operand(ahead[turn][m], selectors); });
      unroll<kSteps>([&](auto step) {
        constexpr int selector = decltype(step){};
        wait_for_copies<kRing - 2>();
        sync_sharers<kDown>(across);
        unroll<S::kTokenTiles>([&](auto n) {
          uint32_t b[4];
          load_matrices(slot + own + n * kTokens * S::kStride + step * kStepBytes, b);
          unroll<kRowTiles>([&](auto m) {
            Products::template multiply<selector>(sums[n * kRowTiles + m], a[m].values[step], b, a[m].metadata);
          });
        });
        if constexpr (selector == kSteps - 1) {
          if (chunk + kAhead * kAcross < last) load(Constant<turn>{}, Constant<turn + kAhead>{});
        }
        // All have read the step before this one: its place takes what comes next.
        if constexpr (selector == 0) {
          fetch(chunk + (S::kSlots - 1) * kAcross, kSteps - 1, (slot == ring ? end : slot) - S::kSlotBytes);
        } else {
          fetch(chunk + S::kSlots * kAcross, selector - 1, slot);
        }
        commit_copies();
      });
      slot = slot + S::kSlotBytes == end ? ring : slot + S::kSlotBytes;
    });
    values += kAhead * kAcross * kBytes;
    metadata += kAhead * kAcross * kMetadataBytes;
  }

  // Sums of a warp take the place of its x. A thread adds up those of four rows of a token, or of some.
  constexpr int kFours = S::kRows / 4, kFoursOfWarp = kRowTiles * kTile / 4;
  constexpr int kFoursOfPass = S::kSumTokens * kFours, kHolders = smaller(kDecodeThreads, kFoursOfPass);
  constexpr int kHeld = kFoursOfPass / kHolders;  // by a thread, of a pass
  static_assert(kFoursOfPass % kHolders == 0 && kHolders % kWarp == 0 && kHolders % kFours == 0, "a thread keeps to its rows");
  static_assert(S::kPasses == 1 || kHolders == kDecodeThreads, "finish() takes a sum by the thread that has it");
  sync_sharers<kDown>(across);
  const int thread = thread_again(), four = thread % kFours, g = thread % kWarp / 4, q = thread % 4;
  const auto sums_of = [&](int a, int d) { return reinterpret_cast<Sum*>(memory + a * S::kBytes) + d * S::kSums; };
  Sum* const sums_of_warp = sums_of(thread / (kDown * kWarp), thread / kWarp % kDown);
  Sum whole[S::kPasses * kHeld][4] = {};
  unroll<S::kPasses>([&](auto pass) {
    if constexpr (decltype(pass){} > 0) sync_block();
    unroll<S::kSumTokens / kTokens>([&](auto n) {
      unroll<kRowTiles>([&](auto m) {
        unroll<4>([&](auto i) {
          const int at = n * kTokens + q * 2 + i % 2, row = m * kTile + g + 8 * (i / 2);
          sums_of_warp[at * S::kSumStride + row] = sums[(pass * (S::kSumTokens / kTokens) + n) * kRowTiles + m][i];
        });
      });
    });
    sync_block();
    if (thread >= kHolders) return;
    unroll<kHeld>([&](auto held) {
      const int at = (thread / kFours + held * (kHolders / kFours)) * S::kSumStride + four % kFoursOfWarp * 4;
      unroll<kAcross>([&](auto a) {
        const uint4 part = *reinterpret_cast<const uint4*>(sums_of(a, four / kFoursOfWarp) + at);
        Sum(&to)[4] = whole[pass * kHeld + held];
        to[0] += number_of<Sum>(part.x), to[1] += number_of<Sum>(part.y);
        to[2] += number_of<Sum>(part.z), to[3] += number_of<Sum>(part.w);
      });
    });
  });
  const uint32_t parts = args.partial == nullptr ? gridDim.y : 1;
  if (args.partial != nullptr && !add_slices<kHolders>(whole, args.partial, args.counters)) return;
  static_assert(S::kTokensOfBlock * SumsOf<S::kRows>::kBytes <= kAcross * S::kBytes, "whole sums take their place");
  sync_block();
  Sum* const shared = reinterpret_cast<Sum*>(memory);
  unroll<S::kPasses * kHeld>([&](auto held) {  // to where the same thread of finish reads them
    const int at = thread / kFours + held * (kHolders / kFours);
    if (thread >= kHolders) return;
    *reinterpret_cast<uint4*>(shared + at * SumsOf<S::kRows>::kStride + four * 4) =
        uint4{bits_of(whole[held][0]), bits_of(whole[held][1]), bits_of(whole[held][2]), bits_of(whole[held][3])};
  });
  if (parts > 1) {
    sync_cluster();
  } else {
    sync_warp();  // a thread reads what it wrote itself
  }
  finish<S::kRows, kDecodeThreads>(epilogue, shared, S::kTokensOfBlock, int64_t{blockIdx.x} * S::kRows, 0, blockIdx.y % parts,
                                   parts);
  if (parts > 1) leave_cluster();
}

#define TWOFOUR_DECODE(name, Products, token_tiles, row_tiles, down, ahead, slots, blocks)                                \
  TWOFOUR_KERNEL(kDecodeThreads, blocks)                                                                                  \
  name(const char* values, const char* metadata, const char* x, int64_t x_stride, int64_t tokens, int64_t rows,           \
       int64_t columns, int64_t slice, void* partial, uint32_t* counters, int64_t early, TWOFOUR_EPILOGUE_PARAMETERS) {   \
    decode<Split<Products, token_tiles, row_tiles, down, ahead, slots>>(                                                  \
        DecodeArgs{values, metadata, x, x_stride, tokens, rows, columns, slice, partial, counters, early},                \
        TWOFOUR_EPILOGUE(tokens, rows));                                                                                  \
  }
#if defined(TWOFOUR_NAME)  // one of them: all take seconds to compile
TWOFOUR_DECODE(TWOFOUR_NAME, TWOFOUR_PRODUCTS, TWOFOUR_TOKEN_TILES, TWOFOUR_ROW_TILES, TWOFOUR_DOWN, TWOFOUR_AHEAD,
               TWOFOUR_SLOTS, TWOFOUR_BLOCKS)
#else
TWOFOUR_DECODE(decode_bf16_8, Bf16Products, 1, 4, 1, 3, 4, 1)
TWOFOUR_DECODE(decode_bf16_16, Bf16Products, 2, 4, 2, 3, 4, 1)
TWOFOUR_DECODE(decode_bf16_32, Bf16Products, 4, 4, 4, 3, 4, 1)
TWOFOUR_DECODE(decode_bf16_64, Bf16Products, 8, 4, 4, 2, 4, 1)
TWOFOUR_DECODE(decode_fp16_8, Fp16Products, 1, 4, 1, 3, 4, 1)
TWOFOUR_DECODE(decode_fp16_16, Fp16Products, 2, 4, 2, 3, 4, 1)
TWOFOUR_DECODE(decode_fp16_32, Fp16Products, 4, 4, 4, 3, 4, 1)
TWOFOUR_DECODE(decode_fp16_64, Fp16Products, 8, 4, 4, 2, 4, 1)
TWOFOUR_DECODE(decode_int8_8, Int8Products, 1, 4, 1, 4, 6, 1)
TWOFOUR_DECODE(decode_int8_16, Int8Products, 2, 4, 2, 4, 6, 1)
TWOFOUR_DECODE(decode_int8_32, Int8Products, 4, 4, 2, 4, 4, 1)
TWOFOUR_DECODE(decode_int8_64, Int8Products, 8, 4, 4, 3, 4, 1)
TWOFOUR_DECODE(decode_e4m3_bf16_8, E4m3Bf16Products, 1, 4, 1, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_bf16_16, E4m3Bf16Products, 2, 4, 2, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_bf16_32, E4m3Bf16Products, 4, 4, 4, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_bf16_64, E4m3Bf16Products, 8, 4, 2, 2, 2, 1)
TWOFOUR_DECODE(decode_e4m3_fp16_8, E4m3Fp16Products, 1, 4, 1, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_fp16_16, E4m3Fp16Products, 2, 4, 2, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_fp16_32, E4m3Fp16Products, 4, 4, 4, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_fp16_64, E4m3Fp16Products, 8, 4, 2, 2, 2, 1)
#if defined(TWOFOUR_MULTIPLIES_E4M3)
TWOFOUR_DECODE(decode_e4m3_8, E4m3Products, 1, 4, 1, 4, 6, 1)
TWOFOUR_DECODE(decode_e4m3_16, E4m3Products, 2, 4, 2, 4, 6, 1)
TWOFOUR_DECODE(decode_e4m3_32, E4m3Products, 4, 4, 2, 4, 4, 1)
TWOFOUR_DECODE(decode_e4m3_64, E4m3Products, 8, 4, 4, 3, 4, 1)
#endif
#endif

}  // namespace twofour::cuda
