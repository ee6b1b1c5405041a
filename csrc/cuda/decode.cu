// y = x @ W.T for few tokens, W in the CUDA layout: bound by the reading of W, so W is streamed once, 36 bits a group.
//
// W is the left operand of mma.sp, 16 rows at a time; eight tokens are the columns of the right one. A block has eight warps,
// each with tiles of its own, and shares a slice of the columns: x of a stage of it lies in shared memory, the next
// stage on its way. A warp holds the fragments of kAhead chunks on their way from memory, past all caches but the last.
//
// A chunk of x is read from shared memory for every tile of a warp or for both: 64 tokens of 16 bits are 8 KiB, 64 clocks
// of shared memory, and a tile of e4m3 weights, 640 bytes, comes in 31 where 132 multiprocessors get 4.8 TB/s.
//
// Several blocks may share the columns of a tile (gridDim.y, epilogue.h).
#include "cuda/epilogue.h"
#include "cuda/products.h"

namespace twofour::cuda {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * kWarp;
constexpr int kAhead = 4;

struct DecodeArgs {
  const uint4* values;
  const uint32_t* metadata;
  const char* x;  // [tokens, columns], rows `x_stride` bytes apart; address and stride multiples of 16
  int64_t x_stride;
  int64_t tokens, rows, columns;
  int64_t slice;       // chunks of a block
  void* partial;       // of add_slices; null where gridDim.y is 1
  uint32_t* counters;
};

template <class Products, int kTokenTiles>
struct Stage {
  static constexpr int kChunks = kTokenTiles > 4 ? kAhead : 2 * kAhead;
  static constexpr int kChunkBytes = kColumns * Products::kItemsize;  // of a token
  static constexpr int kRowBytes = kChunks * kChunkBytes;
  static constexpr int kStride = kRowBytes + 16;  // so that eight tokens lie in eight different groups of banks
  static constexpr int kBytes = kTokenTiles * kTokens * kStride;

  // Starts the copies of the stage from chunk `first` on.
  TWOFOUR_DEVICE static void fetch(const DecodeArgs& args, int64_t first, char* to) {
    constexpr int kPieces = kRowBytes / 16;
    for (int piece = static_cast<int>(threadIdx.x); piece < kTokenTiles * kTokens * kPieces; piece += kDecodeThreads) {
      const int token = piece / kPieces, offset = piece % kPieces * 16;
      const int64_t from = first * kChunkBytes + offset, left = args.columns * Products::kItemsize - from;
      const bool inside = token < args.tokens && left > 0;
      copy_async(to + token * kStride + offset, inside ? args.x + token * args.x_stride + from : args.x,
                 inside ? static_cast<int>(left < 16 ? left : 16) : 0);
    }
  }
};

template <class Products, int kTokenTiles, int kRowTiles>
TWOFOUR_DEVICE void decode(const DecodeArgs& args, const Epilogue& epilogue) {
  using Sum = typename Products::Sum;
  using Stages = Stage<Products, kTokenTiles>;
  constexpr int kSteps = steps_of(Products::kItemsize), kFragments = steps_of(Products::kWeightItemsize);
  TWOFOUR_DYNAMIC_SHARED(memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int tile = (static_cast<int>(blockIdx.x) * kDecodeWarps + warp) * kRowTiles;
  const int tiles = static_cast<int>(tiles_of(args.rows)), chunks = static_cast<int>(chunks_of(args.columns));
  const int slice = static_cast<int>(args.slice), first = static_cast<int>(blockIdx.y) * slice;
  const int last = chunks - first < slice ? chunks : first + slice;

  Stages::fetch(args, first, memory);
  commit_copies();
  Operand<kFragments> ahead[kAhead][kRowTiles];
  const auto load = [&](auto slot, int chunk) {
    if (chunk >= last) return;
    unroll<kRowTiles>([&](auto m) {  // behind the last tile it again, which nobody stores: so lanes need not part
      const int64_t at = int64_t{tile + m < tiles ? tile + m : tiles - 1} * chunks + chunk;
      unroll<kFragments>([&](auto i) {
        ahead[slot][m].values[i] = load_stream(args.values + (at * kFragments + i) * kWarp + lane);
      });
      ahead[slot][m].metadata = load_stream(args.metadata + at * kWarp + lane);
    });
  };
  unroll<kAhead>([&](auto slot) { load(slot, first + slot); });
  const auto selectors = Products::selectors(lane);

  Sum sums[kTokenTiles * kRowTiles][4] = {};
  int use = 0;
  for (int begin = first; begin < last; begin += Stages::kChunks, use ^= 1) {
    if (begin + Stages::kChunks < last) Stages::fetch(args, begin + Stages::kChunks, memory + (use ^ 1) * Stages::kBytes);
    commit_copies();
    wait_for_copies<1>();
    sync_block();
    // Row of x and 16 bytes of it that this lane names to load_matrices: a token, and a quarter of a step.
    const char* const own =
        memory + use * Stages::kBytes + lane % 8 * Stages::kStride + Products::piece(lane / 8) * 16;
    unroll<Stages::kChunks>([&](auto c) {
      if (begin + c >= last) return;
      constexpr int slot = decltype(c){} % kAhead;
      Operand<kSteps> a[kRowTiles];
      unroll<kRowTiles>([&](auto m) { a[m] = Products::operand(ahead[slot][m], selectors); });
      load(Constant<slot>{}, begin + c + kAhead);
      unroll<kSteps>([&](auto step) {
        constexpr int selector = decltype(step){};
        unroll<kTokenTiles>([&](auto n) {
          uint32_t b[4];
          load_matrices(own + n * kTokens * Stages::kStride + c * Stages::kChunkBytes + step * 64, b);
          unroll<kRowTiles>([&](auto m) {
            Products::template multiply<selector>(sums[n * kRowTiles + m], a[m].values[step], b, a[m].metadata);
          });
        });
      });
    });
    sync_block();
  }

  if (!add_slices<kDecodeThreads>(sums, args.partial, args.counters)) return;
  constexpr int kWarpRows = kRowTiles * kTile, kRows = kDecodeWarps * kWarpRows;
  static_assert(kTokenTiles * kTokens * SumsOf<kRows>::kBytes <= 2 * Stages::kBytes, "sums take the place of x");
  Sum* const shared = reinterpret_cast<Sum*>(memory);
  unroll<kTokenTiles>([&](auto n) {
    unroll<kRowTiles>([&](auto m) {
      unroll<4>([&](auto i) {
        const int token = n * kTokens + lane % 4 * 2 + i % 2;
        const int row = warp * kWarpRows + m * kTile + lane / 4 + 8 * (i / 2);
        shared[token * SumsOf<kRows>::kStride + row] = sums[n * kRowTiles + m][i];
      });
    });
  });
  sync_block();
  finish<kRows, kDecodeThreads>(epilogue, shared, kTokenTiles * kTokens, int64_t{blockIdx.x} * kRows, 0);
}

#define TWOFOUR_DECODE(name, Products, token_tiles, row_tiles, blocks)                                                    \
  TWOFOUR_KERNEL(kDecodeThreads, blocks)                                                                                  \
  name(const uint4* values, const uint32_t* metadata, const char* x, int64_t x_stride, int64_t tokens, int64_t rows,      \
       int64_t columns, int64_t slice, void* partial, uint32_t* counters, TWOFOUR_EPILOGUE_PARAMETERS) {                  \
    decode<Products, token_tiles, row_tiles>(                                                                             \
        DecodeArgs{values, metadata, x, x_stride, tokens, rows, columns, slice, partial, counters},                       \
        TWOFOUR_EPILOGUE(tokens, rows));                                                                                  \
  }
#if defined(TWOFOUR_NAME)  // one of them: all take seconds to compile
TWOFOUR_DECODE(TWOFOUR_NAME, TWOFOUR_PRODUCTS, TWOFOUR_TOKEN_TILES, TWOFOUR_ROW_TILES, TWOFOUR_BLOCKS)
#else
TWOFOUR_DECODE(decode_bf16_8, Bf16Products, 1, 1, 2)
TWOFOUR_DECODE(decode_bf16_16, Bf16Products, 2, 1, 2)
TWOFOUR_DECODE(decode_bf16_32, Bf16Products, 4, 1, 2)
TWOFOUR_DECODE(decode_bf16_64, Bf16Products, 8, 1, 1)
TWOFOUR_DECODE(decode_fp16_8, Fp16Products, 1, 1, 2)
TWOFOUR_DECODE(decode_fp16_16, Fp16Products, 2, 1, 2)
TWOFOUR_DECODE(decode_fp16_32, Fp16Products, 4, 1, 2)
TWOFOUR_DECODE(decode_fp16_64, Fp16Products, 8, 1, 1)
TWOFOUR_DECODE(decode_int8_8, Int8Products, 1, 1, 2)
TWOFOUR_DECODE(decode_int8_16, Int8Products, 2, 1, 2)
TWOFOUR_DECODE(decode_int8_32, Int8Products, 4, 1, 2)
TWOFOUR_DECODE(decode_int8_64, Int8Products, 8, 1, 1)
TWOFOUR_DECODE(decode_e4m3_bf16_8, E4m3Bf16Products, 1, 1, 2)
TWOFOUR_DECODE(decode_e4m3_bf16_16, E4m3Bf16Products, 2, 1, 2)
TWOFOUR_DECODE(decode_e4m3_bf16_32, E4m3Bf16Products, 4, 2, 2)
TWOFOUR_DECODE(decode_e4m3_bf16_64, E4m3Bf16Products, 8, 2, 1)
TWOFOUR_DECODE(decode_e4m3_fp16_8, E4m3Fp16Products, 1, 1, 2)
TWOFOUR_DECODE(decode_e4m3_fp16_16, E4m3Fp16Products, 2, 1, 2)
TWOFOUR_DECODE(decode_e4m3_fp16_32, E4m3Fp16Products, 4, 2, 2)
TWOFOUR_DECODE(decode_e4m3_fp16_64, E4m3Fp16Products, 8, 2, 1)
#if defined(TWOFOUR_MULTIPLIES_E4M3)
TWOFOUR_DECODE(decode_e4m3_8, E4m3Products, 1, 1, 2)
TWOFOUR_DECODE(decode_e4m3_16, E4m3Products, 2, 1, 2)
TWOFOUR_DECODE(decode_e4m3_32, E4m3Products, 4, 1, 2)
TWOFOUR_DECODE(decode_e4m3_64, E4m3Products, 8, 1, 1)
#endif
#endif

}  // namespace twofour::cuda
