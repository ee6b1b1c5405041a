// grad_x = grad @ W with tokens in lanes. Included inside an unnamed namespace.
//
// A group of W has four columns, and each row of W keeps two of them: six kinds of row. With the rows of a chunk sorted
// by kind, the four columns' sums stay in registers and every load of the gradient serves two multiplications:
//
//   panel of a chunk     row r0:  [ grad[token 0, r0] .. grad[token NV * lanes - 1, r0] ]
//   rows of kind (i, j)  sums[i][v] += w0 * panel[r][v];  sums[j][v] += w1 * panel[r][v]
//
// The multiplications are the limit here, where the forward kernels are limited by loads. Only the rows' order is kept,
// a byte each: values sorted with it were 40 MiB more to write and read for 4096 x 4096 (68 ms with them, 54 without).
// One sort serves all panels of a call.
//
//   sorted   [chunks][groups] cells:   ends of the six kinds, uint16 [8] | rows of the chunk in order, uint8 [rows]

// Where kind p = 0..5 sits: the columns of kPairNibble[p].
template <int kPair>
constexpr int first_column() {
  return static_cast<int>(nm::first_of(nm::kPairNibble[kPair]));
}
template <int kPair>
constexpr int second_column() {
  return static_cast<int>(nm::second_of(nm::kPairNibble[kPair]));
}

// Where vector v of row k begins, with rows one by one or kTogether of them vector by vector.
template <int kTogether>
inline char* vector_of(char* rows, int64_t pitch, int64_t k, int64_t v) {
  return rows + k / kTogether * kTogether * pitch + (v * kTogether + k % kTogether) * static_cast<int64_t>(sizeof(F));
}

// [tokens, columns] at `from` -> rows of tokens, pitch bytes apart, `vectors` vectors long; zeros behind the last token.
template <int kTogether, class Item>
void transpose_wide(const Item* from, int64_t stride, int64_t tokens, int64_t columns, char* to, int64_t pitch,
                    int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t k = 0; k < columns; k += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, columns - k));
      F block[kLanes];
      for (int t = 0; t < kLanes; ++t) {
        const int64_t token = v * kLanes + t;
        const Item* source = from + token * stride + k;
        block[t] = token >= tokens ? zero() : count == kLanes ? load(source) : load_first(source, count);
      }
      transpose(block);
      for (int j = 0; j < count; ++j) {
        store(reinterpret_cast<float*>(vector_of<kTogether>(to, pitch, k + j, v)), block[j]);
      }
    }
  }
}

// Adds the chunk's part of one group's four columns to the sums in memory.
template <int NV>
TWOFOUR_OWN_REGISTERS void grad_cell(const char* panel, const char* cell, const float* w0s, const float* w1s, float* sums,
                                     bool first) {
  constexpr int kCopies = NV == 1 ? 4 : NV <= kGradPassVectors / 2 ? 2 : 1;  // to hide the latency of the FMA
  const auto* const ends = reinterpret_cast<const uint16_t*>(cell);
  const auto* const rows = reinterpret_cast<const uint8_t*>(cell + kCellHead);
  F acc[kCopies][nm::kGroup][NV];
  unroll<kCopies>([&](auto u) TWOFOUR_INLINE {
    unroll<nm::kGroup>([&](auto j) TWOFOUR_INLINE {
      unroll<NV>([&](auto v) TWOFOUR_INLINE { acc[u][j][v] = zero(); });
    });
  });
  int entry = 0;
  unroll<nm::kPairs>([&](auto pair) TWOFOUR_INLINE {
    constexpr int i = first_column<pair>(), j = second_column<pair>();
    const int end = ends[pair];
    const auto add_row = [&](int at, F(&to)[nm::kGroup][NV]) TWOFOUR_INLINE {
      const uint64_t row = rows[at];
      const float* grad = reinterpret_cast<const float*>(panel + row * kGradRowBytes);
      const F w0 = splat_of(w0s + row), w1 = splat_of(w1s + row);
      unroll<NV>([&](auto v) TWOFOUR_INLINE {
        F g = load(grad + v * kLanes);
        keep_in_register(g);
        to[i][v] = fma(w0, g, to[i][v]);
        to[j][v] = fma(w1, g, to[j][v]);
      });
    };
    for (; entry + kCopies <= end; entry += kCopies) {
      unroll<kCopies>([&](auto u) TWOFOUR_INLINE { add_row(entry + u, acc[u]); });
    }
    if (kCopies > 1) {
      for (; entry < end; ++entry) add_row(entry, acc[0]);
    }
  });
  unroll<nm::kGroup>([&](auto j) TWOFOUR_INLINE {
    unroll<NV>([&](auto v) TWOFOUR_INLINE {
      float* place = sums + (j * kGradPanelVectors + v) * kLanes;
      F sum = acc[0][j][v];
      unroll<kCopies - 1>([&](auto u) TWOFOUR_INLINE { sum = add(sum, acc[u + 1][j][v]); });
      store(place, first ? sum : add(sum, load(place)));
    });
  });
}

using GradCell = void (*)(const char*, const char*, const float*, const float*, float*, bool);
template <int... kIndices>
GradCell grad_cell_of(int vectors, Indices<kIndices...>) {
  static constexpr GradCell kFunctions[] = {grad_cell<kIndices + 1>...};
  return kFunctions[vectors - 1];
}

// fp32 arithmetic; gradients and weights of fp32 or bf16.
template <class Item>
struct GradInputWide {
  using Element = Item;
  static constexpr int kStepVectors = 1;  // vectors of tokens that are packed together
  static constexpr int kRowBytes = kGradRowBytes;
  static constexpr int kSpareRows = 0;  // of the panel

  struct Weights {
    float w0[kMaxChunkRows], w1[kMaxChunkRows];
  };
  static void gather(const Item* values, int64_t groups, int tiles, int, Weights& weights) {
    gather_values(values, groups, tiles, weights.w0, weights.w1);
  }

  static void pack(const Item* grad, int64_t stride, int tokens, int64_t rows, int, int vectors, char* panel) {
    transpose_wide<1>(grad, stride, tokens, rows, panel, kRowBytes, vectors);
  }

  static int filler(int) { return -1; }

  TWOFOUR_INLINE static void add_cell(const char* panel, const char* cell, const Weights& weights, int vectors,
                                      float* sums, bool first) {
    for (int v = 0; v < vectors; v += kGradPassVectors) {
      const int pass = vectors - v < kGradPassVectors ? vectors - v : kGradPassVectors;
      grad_cell_of(pass, typename IndicesUpTo<kGradPassVectors>::Type{})(
          panel + v * static_cast<int>(sizeof(F)), cell, weights.w0, weights.w1, sums + v * kLanes, first);
    }
  }
};

template <class Core>
struct GradInput {
  using Item = typename Core::Element;
  static constexpr int64_t kSlots = nm::kTileRows * nm::kKeep;
  static constexpr int kRowBytes = Core::kRowBytes;
  static constexpr int kStepTokens = Core::kStepVectors * kLanes;

  static size_t cell_bytes(int chunk_rows) { return kCellHead + static_cast<size_t>(chunk_rows) + kCellSlack; }

  static size_t panel_bytes(int chunk_rows) {
    return (static_cast<size_t>(chunk_rows + Core::kSpareRows) * Core::kRowBytes + 63) / 64 * 64;
  }

  static size_t scratch_bytes(int chunk_rows, int64_t groups) {
    return panel_bytes(chunk_rows) + static_cast<size_t>((groups + kLanes) * nm::kGroup) * kGradRowBytes;
  }

  static void sort(const GradInputArgs& args, int chunk_rows, void* sorted, int64_t group0, int64_t group1) {
    const int64_t groups = nm::groups_of(args.in_features), tiles = nm::tiles_of(args.out_features);
    const int64_t chunk_tiles = chunk_rows / nm::kTileRows;
    const int64_t bytes = static_cast<int64_t>(cell_bytes(chunk_rows));
    for (int64_t tile = 0, chunk = 0; tile < tiles; tile += chunk_tiles, ++chunk) {
      const int count = static_cast<int>(smaller(chunk_tiles, tiles - tile));
      for (int64_t group = group0; group < group1; ++group) {
        char* cell = static_cast<char*>(sorted) + (chunk * groups + group) * bytes;
        sort_cell(args.metadata + (tile * groups + group) * nm::kTileMetadataBytes, groups, count,
                  Core::filler(chunk_rows), reinterpret_cast<uint16_t*>(cell),
                  reinterpret_cast<uint8_t*>(cell + kCellHead));
      }
    }
  }

  static void input(const GradInputArgs& args, int chunk_rows, const void* sorted, void* scratch, int64_t token0,
                    int tokens, int64_t group0, int64_t group1) {
    const int64_t groups = nm::groups_of(args.in_features);
    const int64_t bytes = static_cast<int64_t>(cell_bytes(chunk_rows));
    const int vectors = (tokens + kStepTokens - 1) / kStepTokens * Core::kStepVectors;
    char* const panel = static_cast<char*>(scratch);
    auto* const sums = reinterpret_cast<float*>(panel + panel_bytes(chunk_rows));
    const Item* grad = static_cast<const Item*>(args.grad) + token0 * args.grad_stride;

    for (int64_t row = 0, chunk = 0; row < args.out_features; row += chunk_rows, ++chunk) {
      const int64_t rows = smaller(chunk_rows, args.out_features - row);
      const int chunk_tiles = static_cast<int>(nm::tiles_of(rows));
      Core::pack(grad + row, args.grad_stride, tokens, rows, chunk_rows, vectors, panel);
      // Rows that fill the last tile weigh 0; what they meet must be finite.
      __builtin_memset(panel + rows * Core::kRowBytes, 0,
                       static_cast<size_t>(chunk_tiles * nm::kTileRows - rows) * Core::kRowBytes);
      const char* cell = static_cast<const char*>(sorted) + (chunk * groups + group0) * bytes;
      const Item* values = static_cast<const Item*>(args.values) + (row / nm::kTileRows * groups + group0) * kSlots;
      for (int64_t group = group0; group < group1; ++group, cell += bytes, values += kSlots) {
        typename Core::Weights weights;
        Core::gather(values, groups, chunk_tiles, chunk_rows, weights);
        float* to = sums + (group - group0) * nm::kGroup * kGradPanelVectors * kLanes;
        Core::add_cell(panel, cell, weights, vectors, to, row == 0);
      }
    }

    const int64_t columns = (group1 - group0) * nm::kGroup;
    Item* grad_x = static_cast<Item*>(args.grad_x) + token0 * args.x_stride + group0 * nm::kGroup;
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, columns - column));
      for (int v = 0; v < vectors; ++v) {
        F block[kLanes];
        for (int c = 0; c < kLanes; ++c) {
          block[c] = c < count ? load(sums + ((column + c) * kGradPanelVectors + v) * kLanes) : zero();
        }
        transpose(block);
        for (int t = 0; t < kLanes && v * kLanes + t < tokens; ++t) {
          store_first(grad_x + (v * kLanes + t) * args.x_stride + column, block[t], count);
        }
      }
    }
  }
};
