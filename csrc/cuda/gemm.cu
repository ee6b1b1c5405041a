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
// So a stage has been read to its end a little before it is multiplied to its end. There is the one barrier of the stage.
// During the next stage its place takes the stage kStages further on, a copy after each few products: eight warps are too
// few for anything to be hidden that stands by itself.
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

template <class T>
TWOFOUR_DEVICE Place place_of(int rows, int tokens, int block) {
  constexpr int kTogether = kRowsTogether / T::kRows;
  const int row_blocks = static_cast<int>(ceil_div(rows, T::kRows));
  const int token_blocks = static_cast<int>(ceil_div(tokens, T::kTokensOfBlock));
  const int first = block / (kTogether * token_blocks) * kTogether, left = row_blocks - first;
  const int together = left < kTogether ? left : kTogether, own = block - first * token_blocks;
  return {(first + own % together) * T::kTiles, own / together * T::kTokensOfBlock};
}

// Copies of the stages of a block, one after the other: pieces of 16 bytes, the same ones of each stage for a thread. Where
// they come from only moves on from stage to stage, so that between the products a copy costs few instructions.
//
// Behind the last tile and the last token nothing is copied: whatever lies there meets only sums that nobody stores. Behind
// the last column x is zeros, and W, which may lie there for the other half of a stage, any numbers: integers.
template <class T>
struct Copies {
  static constexpr int kOfTile = T::kTileBytes / 16, kOfWords = T::kWordBytes / 16, kOfChunk = T::kTileBytes / T::kChunks;
  static constexpr int kTileStep = T::kThreads / kOfTile, kTokenStep = T::kThreads / kPieces;
  static constexpr int kOfValues = T::kTiles / kTileStep, kOfX = T::kTokensOfBlock / kTokenStep;
  static constexpr int kCount = kOfValues + 1 + kOfX;
  static_assert(T::kTiles * kOfWords <= T::kThreads, "one copy of metadata");
  using Sum = typename T::Sum;
  static_assert(T::kChunks == 1 || Sum(0.5f) == Sum(0), "numbers of half a stage that is none are integers");
  static_assert(kTokenStep % 8 == 0, "a thread keeps to its place in eight tokens");

  const char *values, *metadata, *x;  // of the next stage
  int64_t tile_step, token_step;      // bytes from copy to copy
  int own, own_x;                     // places in a stage
  int tiles, tokens;                  // left in the block from the thread's first ones on
  int chunks, chunks_of_words, bytes;  // of columns, left for the thread in the next stage and behind it

  TWOFOUR_DEVICE Copies(const GemmArgs& args, Place place, int stage) {
    const int thread = static_cast<int>(threadIdx.x), all_chunks = static_cast<int>(chunks_of(args.columns));
    const int all_tiles = static_cast<int>(tiles_of(args.rows)), chunk0 = stage * T::kChunks;
    own = thread * 16;
    const int tile = place.tile + thread / kOfTile, offset = thread % kOfTile * 16;
    values = args.values + (int64_t{tile} * all_chunks + chunk0) * kOfChunk + offset;
    tile_step = int64_t{all_chunks} * (kTileStep * kOfChunk);
    tiles = all_tiles - tile;
    chunks = all_chunks - chunk0 - offset / kOfChunk;
    // Metadata behind the last tile or chunk are those of the last one: zeros would be no metadata.
    const int wanted = place.tile + thread / kOfWords, offset_of_words = thread % kOfWords * 16;
    const int words_tile = wanted < all_tiles ? wanted : all_tiles - 1, chunk = chunk0 + offset_of_words / kMetadataBytes;
    metadata = args.metadata + (int64_t{words_tile} * all_chunks + chunk) * kMetadataBytes + offset_of_words % kMetadataBytes;
    chunks_of_words = all_chunks - chunk;
    const int token = thread / kPieces, offset_of_x = thread % kPieces * 16;
    own_x = T::kXAt + token * kStageBytes + (offset_of_x ^ token % 8 * 16);
    x = args.x + (int64_t{place.token} + token) * args.x_stride + int64_t{stage} * kStageBytes + offset_of_x;
    token_step = kTokenStep * args.x_stride;
    tokens = static_cast<int>(args.tokens) - place.token - token;
    bytes = static_cast<int>(args.columns) * T::Products::kItemsize - stage * kStageBytes - offset_of_x;
  }

  // Starts a copy of the next stage, where it is wanted.
  template <int kWhich>
  TWOFOUR_DEVICE void start(char* to, bool wanted) const {
    if constexpr (kWhich < kOfValues) {
      const bool inside = kWhich * kTileStep < tiles && (T::kChunks == 1 || chunks > 0);
      copy_async_if(wanted && inside, to + own + kWhich * T::kThreads * 16, values + kWhich * tile_step);
    } else if constexpr (kWhich == kOfValues) {
      const bool mine = T::kTiles * kOfWords == T::kThreads || threadIdx.x < T::kTiles * kOfWords;
      copy_async_if(wanted && mine, to + T::kWordsAt + own, T::kChunks == 1 || chunks_of_words > 0 ? metadata : metadata - kMetadataBytes);
    } else {
      constexpr int k = kWhich - kOfValues - 1;
      const int some = bytes >= 16 ? 16 : bytes > 0 ? bytes : 0;
      copy_async_if(wanted && k * kTokenStep < tokens, to + own_x + k * kTokenStep * kStageBytes, x + k * token_step, some);
    }
  }

  TWOFOUR_DEVICE void move_on() {
    values += T::kChunks * kOfChunk;
    metadata += T::kChunks * kMetadataBytes;
    x += kStageBytes;
    chunks -= T::kChunks;
    chunks_of_words -= T::kChunks;
    bytes -= kStageBytes;
  }
};

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
  Copies<T> copies(args, place, first);
  unroll<T::kStages>([&](auto ahead) {  // as a loop it takes registers that are not there
    unroll<Copies<T>::kCount>([&](auto k) {
      copies.template start<decltype(k){}>(memory + ahead * T::kBytes, first + ahead < last);
    });
    copies.move_on();
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
  constexpr int kTurnsBefore = kTurns - kTurnsAhead, kCopies = Copies<T>::kCount;  // the barrier
  constexpr int kCopiesOfTurn = (kCopies + kTurnsBefore - 1) / kTurnsBefore;
  char* free = memory;  // the place of the stage before
  char* own = memory;
  TWOFOUR_ROLLED
  for (int stage = first; stage < last; ++stage) {
    char* const next = own + T::kBytes < memory + T::kStages * T::kBytes ? own + T::kBytes : memory;
    const bool wanted = stage > first && stage + (T::kStages - 1) < last;
    unroll<kTurns>([&](auto turn) {
      constexpr int step = decltype(turn){} / T::kTokenTiles, n = decltype(turn){} % T::kTokenTiles;
      constexpr int ahead = decltype(turn){} + kTurnsAhead, from_end = T::kTokenTiles - n;
      if constexpr (decltype(turn){} < kTurnsBefore) {  // what goes where the stage before has been, some in each turn
        constexpr int from = decltype(turn){} * kCopiesOfTurn, some = kCopies - from < kCopiesOfTurn ? kCopies - from : kCopiesOfTurn;
        if constexpr (some > 0) {
          unroll<some>([&](auto k) { copies.template start<from + decltype(k){}>(free, wanted); });
        }
      }
      if constexpr (ahead == kTurns) {
        if (stage > first) {
          copies.move_on();
          commit_copies();
        }
        wait_for_copies<T::kStages - 2>();
        sync_block();
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
    free = own;
    own = next;
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
