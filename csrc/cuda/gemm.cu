// y = x @ W.T for many tokens, W in the CUDA layout, by mma.sp. Bound by the tensor cores where all goes well.
//
// A block makes a tile of kRows rows of W (the M of mma.sp) and kTokensOfBlock tokens (its N), a warp kWarpRows and
// kWarpTokens of it. A stage is 128 bytes of each token, and what W holds of those columns. kStages of them are under way
// to shared memory or in use there:
//
//   values     [tiles of 16 rows, 1024 bytes]     as they lie in memory, in the order in which lanes want them
//   metadata   [tiles, chunks of a stage, 32]     uint32
//   x          [tokens, 128 bytes]                piece p of 16 bytes of token t at p ^ t % 8, so that eight tokens of
//                                                 ldmatrix lie in different banks
//
// A stage is two steps of mma.sp. Fragments are loaded ahead of their use: of W a step, of x kTurnsAhead tiles of 8 tokens.
// So a stage has been read to its end a little before it is multiplied to its end. There is the one barrier of the stage;
// its place then takes the stage kStages further on, and the fragments of the next one are on their way meanwhile.
//
// Blocks go through 2048 rows for all tokens before the next rows, which keeps both in the second cache. Several may share
// the columns of a tile (gridDim.y, epilogue.h).
#include "cuda/epilogue.h"
#include "cuda/products.h"

namespace twofour::cuda {

constexpr int kStageBytes = 128;  // of a token
constexpr int kStageSteps = 2;
constexpr int kPieces = kStageBytes / 16;
constexpr int kTurnsAhead = 3;
constexpr int kRowsTogether = 2048;

struct GemmArgs {
  const char* values;
  const char* metadata;
  const char* x;  // [tokens, columns], rows `x_stride` bytes apart; address and stride multiples of 16
  int64_t x_stride;
  int64_t tokens, rows, columns;
  int64_t slice;  // stages of a block
  void* partial;  // of add_slices; null where gridDim.y is 1
  uint32_t* counters;
};

template <class ProductsOf, int kBlockRows, int kBlockTokens, int kWarpTokensOf, int kStagesOf>
struct Tile {
  using Products = ProductsOf;
  using Sum = typename Products::Sum;
  static constexpr int kRows = kBlockRows, kTokensOfBlock = kBlockTokens, kStages = kStagesOf;
  static constexpr int kWarpRows = 64, kWarpTokens = kWarpTokensOf;
  static constexpr int kWarpsDown = kRows / kWarpRows, kWarpsAcross = kTokensOfBlock / kWarpTokens;
  static constexpr int kThreads = kWarpsDown * kWarpsAcross * kWarp;
  static constexpr int kRowTiles = kWarpRows / kTile, kTokenTiles = kWarpTokens / kTokens;  // of a warp

  static constexpr int kChunks = kStageBytes / (kColumns * Products::kItemsize);  // of a stage
  static constexpr int kTileBytes = kChunks * chunk_bytes(Products::kItemsize);
  static constexpr int kWordBytes = kChunks * kMetadataBytes;
  static constexpr int kTiles = kRows / kTile;
  static constexpr int kWordsAt = kTiles * kTileBytes, kXAt = kWordsAt + kTiles * kWordBytes;
  static constexpr int kBytes = kXAt + kTokensOfBlock * kStageBytes;  // of a stage

  static_assert(kTokensOfBlock * SumsOf<kRows>::kBytes <= kStages * kBytes, "sums take the place of stages");
  static_assert(kTileBytes == kStageSteps * kFragmentBytes, "a step of mma.sp is a fragment");
};

// The first tile of 16 rows and the first token of a block.
struct Place {
  int tile, token;
};

// Starts the copies of a stage. Where nothing is read zeros arrive, and the address may be any.
template <class T>
TWOFOUR_DEVICE void fetch(const GemmArgs& args, int stage, Place place, char* to) {
  constexpr int kOfTile = T::kTileBytes / 16, kOfWords = T::kWordBytes / 16, kOfChunk = T::kTileBytes / T::kChunks;
  const int thread = thread_again(), chunk0 = stage * T::kChunks, tile0 = place.tile;
  const int tiles = static_cast<int>(tiles_of(args.rows)), chunks = static_cast<int>(chunks_of(args.columns));
  {
    constexpr int kStep = T::kThreads / kOfTile;
    const int tile = thread / kOfTile, offset = thread % kOfTile * 16;
    const int inside = chunk0 + offset / kOfChunk < chunks ? tiles - tile0 - tile : 0;
    const char* from = args.values + (int64_t{tile0 + tile} * chunks + chunk0) * kOfChunk + offset;
    unroll<T::kTiles / kStep>([&](auto k) {
      copy_async(to + (tile + k * kStep) * T::kTileBytes + offset, from, k * kStep < inside ? 16 : 0);
      from += int64_t{chunks} * (kStep * kOfChunk);
    });
  }
  // Metadata behind the last tile or chunk are those of the last one: zeros would be no metadata.
  if (T::kTiles * kOfWords == T::kThreads || thread < T::kTiles * kOfWords) {
    static_assert(T::kTiles * kOfWords <= T::kThreads, "one copy");
    const int wanted = tile0 + thread / kOfWords, tile = wanted < tiles ? wanted : tiles - 1;
    const int offset = thread % kOfWords * 16, chunk = chunk0 + offset / kMetadataBytes;
    const int64_t from = int64_t{tile} * chunks + (chunk < chunks ? chunk : chunks - 1);
    copy_async(to + T::kWordsAt + thread * 16, args.metadata + from * kMetadataBytes + offset % kMetadataBytes, 16);
  }
  {
    constexpr int kStep = T::kThreads / kPieces;
    const int token = thread / kPieces, offset = thread % kPieces * 16;
    const int64_t at = int64_t{stage} * kStageBytes + offset, left = args.columns * T::Products::kItemsize - at;
    const int bytes = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
    const int64_t inside = args.tokens - place.token - token;
    const char* from = args.x + (int64_t{place.token} + token) * args.x_stride + at;
    char* const own = to + T::kXAt + token * kStageBytes + (offset ^ token % 8 * 16);
    static_assert(kStep % 8 == 0, "a thread keeps to its place in eight tokens");
    unroll<T::kTokensOfBlock / kStep>([&](auto k) {
      copy_async(own + k * kStep * kStageBytes, from, k * kStep < inside ? bytes : 0);
      from += kStep * args.x_stride;
    });
  }
}

template <class T>
TWOFOUR_DEVICE Place place_of(int rows, int tokens, int block) {
  constexpr int kTogether = kRowsTogether / T::kRows;
  const int row_blocks = static_cast<int>(ceil_div(rows, T::kRows));
  const int token_blocks = static_cast<int>(ceil_div(tokens, T::kTokensOfBlock));
  const int first = block / (kTogether * token_blocks) * kTogether, left = row_blocks - first;
  const int together = left < kTogether ? left : kTogether, own = block - first * token_blocks;
  return {(first + own % together) * T::kTiles, own / together * T::kTokensOfBlock};
}

// Sums through shared memory to y. Where a thread stands is found anew, for the loop before has no registers left.
template <class T>
TWOFOUR_DEVICE void finish_tile(const Epilogue& epilogue,
                                const typename T::Sum (&sums)[T::kTokenTiles * T::kRowTiles][4], char* memory) {
  const int rows = static_cast<int>(epilogue.rows), tokens = static_cast<int>(epilogue.tokens);
  const Place place = place_of<T>(opaque(rows), opaque(tokens), opaque(static_cast<int>(blockIdx.x)));
  const int64_t row0 = int64_t{place.tile} * kTile;
  const int thread = thread_again(), lane = thread % kWarp, warp = thread / kWarp;
  const int down = warp % T::kWarpsDown, across = warp / T::kWarpsDown;
  auto* const shared = reinterpret_cast<typename T::Sum*>(memory);
  unroll<T::kTokenTiles>([&](auto n) {
    unroll<T::kRowTiles>([&](auto m) {
      unroll<4>([&](auto i) {
        const int token = across * T::kWarpTokens + n * kTokens + lane % 4 * 2 + i % 2;
        const int row = down * T::kWarpRows + m * kTile + lane / 4 + 8 * (i / 2);
        shared[token * SumsOf<T::kRows>::kStride + row] = sums[n * T::kRowTiles + m][i];
      });
    });
  });
  sync_block();
  finish<T::kRows, T::kThreads>(epilogue, shared, T::kTokensOfBlock, row0, place.token);
}

template <class T>
TWOFOUR_DEVICE void gemm(const GemmArgs& args, const Epilogue& epilogue) {
  using Products = typename T::Products;
  using Sum = typename T::Sum;
  TWOFOUR_DYNAMIC_SHARED(memory);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int down = warp % T::kWarpsDown, across = warp / T::kWarpsDown;

  const int rows = static_cast<int>(args.rows), tokens = static_cast<int>(args.tokens);
  const Place place = place_of<T>(rows, tokens, static_cast<int>(blockIdx.x));
  const int stages = static_cast<int>(ceil_div(chunks_of(args.columns), T::kChunks)), slice = static_cast<int>(args.slice);
  const int first = static_cast<int>(blockIdx.y) * slice, last = stages - first < slice ? stages : first + slice;
  unroll<T::kStages>([&](auto ahead) {  // as a loop it takes registers that are not there
    if (first + ahead < last) fetch<T>(args, first + ahead, place, memory + ahead * T::kBytes);
    commit_copies();
  });

  // What this lane loads of a stage: 16 bytes of each fragment of W, a word of metadata, and, of each tile of x, the row
  // and the piece that it names to load_matrices.
  const int of_values = down * T::kRowTiles * T::kTileBytes + lane * 16;
  const int of_words = T::kWordsAt + down * T::kRowTiles * T::kWordBytes + lane * 4;
  const int of_x = T::kXAt + (across * T::kWarpTokens + lane % 8) * kStageBytes;
  uint4 a[2][T::kRowTiles];
  uint32_t words[2][T::kRowTiles], b[kTurnsAhead + 1][4];
  const auto load_a = [&](auto step, auto m, const char* from) {
    a[step][m] = *reinterpret_cast<const uint4*>(from + of_values + m * T::kTileBytes + step * kFragmentBytes);
    words[step][m] = *reinterpret_cast<const uint32_t*>(from + of_words + m * T::kWordBytes +
                                                        (T::kChunks == 2 ? step * kMetadataBytes : 0));
  };
  constexpr int kTurns = kStageSteps * T::kTokenTiles;  // of a stage: a step and a tile of tokens
  static_assert(kTurns % (kTurnsAhead + 1) == 0 && kTurnsAhead < T::kTokenTiles, "registers of x go round");
  const auto load_b = [&](auto turn, const char* from) {
    constexpr int step = decltype(turn){} / T::kTokenTiles, n = decltype(turn){} % T::kTokenTiles;
    const int piece = (step * 4 + lane / 8) ^ lane % 8;
    load_matrices(from + of_x + n * kTokens * kStageBytes + piece * 16, b[turn % (kTurnsAhead + 1)]);
  };

  Sum sums[T::kTokenTiles * T::kRowTiles][4] = {};
  wait_for_copies<T::kStages - 1>();
  sync_block();
  unroll<T::kRowTiles>([&](auto m) { load_a(Constant<0>{}, m, memory); });
  unroll<kTurnsAhead>([&](auto turn) { load_b(turn, memory); });
  int use = 0;
  TWOFOUR_ROLLED
  for (int stage = first; stage < last; ++stage) {
    char* const own = memory + use * T::kBytes;
    use = use + 1 < T::kStages ? use + 1 : 0;
    const char* const next = memory + use * T::kBytes;
    unroll<kTurns>([&](auto turn) {
      constexpr int step = decltype(turn){} / T::kTokenTiles, n = decltype(turn){} % T::kTokenTiles;
      constexpr int ahead = decltype(turn){} + kTurnsAhead, from_end = T::kTokenTiles - n;
      if constexpr (ahead == kTurns) {
        wait_for_copies<T::kStages - 2>();
        sync_block();
        if (stage + T::kStages < last) fetch<T>(args, opaque(stage + T::kStages), place, own);
        commit_copies();
      }
      load_b(Constant<ahead % kTurns>{}, ahead < kTurns ? own : next);
      if constexpr (from_end <= kTurnsAhead) {  // fragments of W for the next step, some in each turn
        constexpr int some = (T::kRowTiles + kTurnsAhead - 1) / kTurnsAhead, m0 = (kTurnsAhead - from_end) * some;
        unroll<some>([&](auto i) {
          if constexpr (m0 + decltype(i){} < T::kRowTiles) {
            load_a(Constant<1 - step>{}, Constant<m0 + decltype(i){}>{}, step == 0 ? own : next);
          }
        });
      }
      unroll<T::kRowTiles>([&](auto m) {
        constexpr int selector = T::kChunks == 1 ? step : 0;
        Products::template multiply<selector>(sums[n * T::kRowTiles + m], a[step][m], b[turn % (kTurnsAhead + 1)],
                                              words[step][m]);
      });
    });
  }

  if (!add_slices<T::kThreads>(sums, args.partial, args.counters)) return;
  // At the last barrier all copies had come, and all fragments that are multiplied had been read. What warps read behind it
  // of a stage that is none goes nowhere, but sums are not to lie there before.
  sync_block();
  finish_tile<T>(epilogue, sums, memory);
}

#define TWOFOUR_GEMM(name, Products, rows_of_block, tokens_of_block, warp_tokens, stages, blocks)                         \
  TWOFOUR_KERNEL((Tile<Products, rows_of_block, tokens_of_block, warp_tokens, stages>::kThreads), blocks)                 \
  name(const char* values, const char* metadata, const char* x, int64_t x_stride, int64_t tokens, int64_t rows,           \
       int64_t columns, int64_t slice, void* partial, uint32_t* counters, TWOFOUR_EPILOGUE_PARAMETERS) {                  \
    gemm<Tile<Products, rows_of_block, tokens_of_block, warp_tokens, stages>>(                                            \
        GemmArgs{values, metadata, x, x_stride, tokens, rows, columns, slice, partial, counters},                         \
        TWOFOUR_EPILOGUE(tokens, rows));                                                                                  \
  }
#if defined(TWOFOUR_NAME)  // one of them: all take seconds to compile
TWOFOUR_GEMM(TWOFOUR_NAME, TWOFOUR_PRODUCTS, TWOFOUR_ROWS, TWOFOUR_TOKENS, TWOFOUR_WARP_TOKENS, TWOFOUR_STAGES,
             TWOFOUR_BLOCKS)
#else
TWOFOUR_GEMM(gemm_bf16_128x64, Bf16Products, 128, 64, 32, 4, 3)
TWOFOUR_GEMM(gemm_bf16_128x128, Bf16Products, 128, 128, 64, 3, 2)
TWOFOUR_GEMM(gemm_bf16_256x128, Bf16Products, 256, 128, 64, 4, 1)
TWOFOUR_GEMM(gemm_fp16_128x64, Fp16Products, 128, 64, 32, 4, 3)
TWOFOUR_GEMM(gemm_fp16_128x128, Fp16Products, 128, 128, 64, 3, 2)
TWOFOUR_GEMM(gemm_fp16_256x128, Fp16Products, 256, 128, 64, 4, 1)
TWOFOUR_GEMM(gemm_int8_128x64, Int8Products, 128, 64, 32, 4, 3)
TWOFOUR_GEMM(gemm_int8_128x128, Int8Products, 128, 128, 64, 3, 2)
TWOFOUR_GEMM(gemm_int8_256x128, Int8Products, 256, 128, 64, 4, 1)
#endif

}  // namespace twofour::cuda
