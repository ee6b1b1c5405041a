// Many tokens: y = x @ W.T + bias with tokens in lanes. Included inside an unnamed namespace.
//
// The tokens of a panel (NV vectors) run along the lanes, M = output rows, K = in_features. For each K-chunk the
// activations are packed so that they fill most of the L1 cache; then every row of the block adds its kept values:
//
//   panel of a chunk     k0:    [ token 0 .. token NV * lanes - 1 ]
//                        k1:    [ ..                              ]
//                        ..
//   row r, kept (k, w):  sums[r][v] += w * panel[k][v]      for v in 0 .. NV - 1
//
// Where k comes from the metadata, decoded once per (tile, chunk) into offsets. R rows by NV vectors stay in
// registers; the sums of the whole block of rows stay in the L2 cache between chunks; after the last chunk each tile is
// transposed to [tokens, out]. The load of the activation is the limit: one per FMA, whereas a dense kernel shares it
// between rows.

constexpr int kMaxChunkGroups = 64;
constexpr int kCacheLine = 64, kL1Way = 4096;  // bytes
constexpr int kChunkStep = 4;  // groups; so that packing works on whole vectors of K

// The offsets of R rows, group after group, each loaded two groups ahead of its turn.
template <class Offset, int R>
struct OffsetsAhead {
  static constexpr int kPerWord = sizeof(uint64_t) / sizeof(Offset);
  static constexpr int kPieces = (R + 2 * kPerWord - 1) / (2 * kPerWord);  // of two words

  uint64_t words[kPieces][2];
  Ahead next[kPieces];
  const Offset* offsets;

  TWOFOUR_INLINE explicit OffsetsAhead(const Offset* first) : offsets(first + nm::kTileRows) {
    unroll<kPieces>([&](auto p) TWOFOUR_INLINE { next[p] = load_ahead(first + 2 * kPerWord * p); });
    advance();
  }

  TWOFOUR_INLINE void advance() {
    unroll<kPieces>([&](auto p) TWOFOUR_INLINE {
      words[p][0] = arrived<0>(next[p]);
      if (2 * kPerWord * p + kPerWord < R) words[p][1] = arrived<1>(next[p]);
      next[p] = load_ahead(offsets + 2 * kPerWord * p);
    });
    offsets += nm::kTileRows;
  }
};

// Rows per step: R * NV accumulators, enough to hide the latency of the FMA, few enough for the registers.
constexpr int rows_for_registers(int vectors) {
  return kVectorRegisters == 32 ? (vectors == 1 ? 16 : vectors <= 3 ? 8 : 4)
                                : (vectors == 1 ? 8 : vectors <= 3 ? 4 : 2);
}

// Activations as fp32 rows; weights and tokens of fp32 or bf16.
template <class Item, class Token = Item>
struct ManyWide {
  using Output = Token;
  using WeightItem = Item;
  using Weight = float;     // as the inner loop reads it
  using Offset = uint32_t;  // i0's byte offset in the low half, i1's in the high half
  static constexpr int kPanelRows = nm::kGroup;  // rows of tokens per group
  static constexpr int kPanelVectors = 6;        // of tokens; with 3, weights and offsets load the loads too much
  static constexpr int kPanelPercent = 65;       // of the L1 cache; more, and the weights passing through evict it
  static constexpr int rows_per_step(int vectors) { return rows_for_registers(vectors); }

  template <int NV>
  static void pack(const LinearArgs& args, int64_t token0, int tokens, int64_t group0, int groups, char* panel) {
    const Token* x = static_cast<const Token*>(args.x) + token0 * args.x_stride + group0 * nm::kGroup;
    const int columns = groups * nm::kGroup;
    float* rows = reinterpret_cast<float*>(panel);
    for (int v = 0; v < NV; ++v) {
      for (int k = 0; k < columns; k += kLanes) {
        const int count = columns - k < kLanes ? columns - k : kLanes;
        F block[kLanes];
        for (int t = 0; t < kLanes; ++t) {
          const int token = v * kLanes + t;
          const Token* from = x + token * args.x_stride + k;
          block[t] = token >= tokens ? zero() : count == kLanes ? load(from) : load_first(from, count);
        }
        transpose(block);
        for (int j = 0; j < count; ++j) store(rows + ((k + j) * NV + v) * kLanes, block[j]);
      }
    }
  }

  template <int NV, int S>
  static void offsets(const uint8_t* metadata, int groups, Offset* offsets) {
    constexpr int kRowBytes = NV * kLanes * static_cast<int>(sizeof(float));
    for (int g = 0; g < groups; ++g) {
      row_offsets<S>(metadata + g * nm::metadata_bytes(S), kRowBytes, offsets + g * nm::kTileRows);
    }
  }

  // [groups, 2, 16] fp32 weights of a tile's chunk: the packed ones, or converted ones.
  static const float* weights(const float* values, int, float*) { return values; }
  static const float* weights(const bf16* values, int groups, float* converted) {
    constexpr int kSlots = nm::kTileRows * nm::kKeep;
    for (int g = 0; g < groups; ++g) {
      for (int r = 0; r < nm::kTileRows; r += kLanes) {
        store(converted + g * kSlots + r, first_of_pairs(values + g * kSlots + r * nm::kKeep));
        store(converted + g * kSlots + nm::kTileRows + r, second_of_pairs(values + g * kSlots + r * nm::kKeep));
      }
    }
    return converted;
  }

  // sums[row + i] += weight first + i of the quad * x, for the `kSame` rows that read the same x.
  template <int kRow, int kFirst, int kSame, int R, int NV>
  TWOFOUR_INLINE static void add_products(Quad quad, const float* x, F (&sums)[R][NV]) {
    unroll<NV>([&](auto v) TWOFOUR_INLINE {
      const F x_v = load(x + v * kLanes);
      unroll<kSame>([&](auto i) TWOFOUR_INLINE {
        sums[kRow + i][v] = fma(splat<kFirst + i>(quad), x_v, sums[kRow + i][v]);
      });
    });
  }

  template <int R, int NV, int S>
  TWOFOUR_INLINE static void step(const char* panel, const Offset* offsets, const float* weights, int row, int groups,
                                  const char* next_weights, F (&sums)[R][NV]) {
    constexpr int kQuads = R < 4 ? R : 4;            // rows per quad of weights
    constexpr int kSame = S < kQuads ? S : kQuads;  // rows per load of an activation
    weights += row;
    OffsetsAhead<Offset, R> ahead(offsets + row);
    for (int g = 0; g < groups; ++g) {
      __builtin_prefetch(next_weights);
      next_weights += R * nm::kKeep * sizeof(Item);
      const OffsetsAhead<Offset, R> now = ahead;
      ahead.advance();
      unroll<R / kQuads>([&](auto q) TWOFOUR_INLINE {
        const Quad w0 = load_quad(weights + q * kQuads), w1 = load_quad(weights + nm::kTileRows + q * kQuads);
        unroll<kQuads / kSame>([&](auto s) TWOFOUR_INLINE {
          constexpr int first = s * kSame, row_of_step = q * kQuads + first;
          const uint64_t two_rows = now.words[row_of_step / 4][row_of_step / 2 % 2];
          const auto* x0 = reinterpret_cast<const float*>(panel + (two_rows >> (32 * (first % 2)) & 0xffff));
          const auto* x1 = reinterpret_cast<const float*>(panel + (two_rows >> (32 * (first % 2) + 16) & 0xffff));
          add_products<row_of_step, first, kSame>(w0, x0, sums);
          add_products<row_of_step, first, kSame>(w1, x1, sums);
        });
      });
      panel += kPanelRows * NV * sizeof(F);
      weights += nm::kTileRows * nm::kKeep;
    }
  }
};

// Adds the chunk's part of R rows to the sums in memory. The part is summed from zero: that starts without waiting for
// memory, and shorter chains of additions round less.
template <class Core, int R, int NV, int S>
TWOFOUR_OWN_REGISTERS void many_step(const char* panel, const typename Core::Offset* offsets,
                                     const typename Core::Weight* weights, int row, int groups,
                                     const char* next_weights, float* tile_sums, bool first) {
  F sums[R][NV];
  float* memory = tile_sums + row * NV * kLanes;
  unroll<R>([&](auto r) TWOFOUR_INLINE { unroll<NV>([&](auto v) TWOFOUR_INLINE { sums[r][v] = zero(); }); });
  Core::template step<R, NV, S>(panel, offsets, weights, row, groups, next_weights, sums);
  if (!first) {
    unroll<R>([&](auto r) TWOFOUR_INLINE {
      unroll<NV>([&](auto v) TWOFOUR_INLINE { sums[r][v] = add(sums[r][v], load(memory + (r * NV + v) * kLanes)); });
    });
  }
  unroll<R>([&](auto r) TWOFOUR_INLINE {
    unroll<NV>([&](auto v) TWOFOUR_INLINE { store(memory + (r * NV + v) * kLanes, sums[r][v]); });
  });
}

// Rows of y from `row` on for a vector of tokens: W vectors side by side, `rows` of each (all of them, if W > 1). `sums` of a
// block that begins at row0, NV vectors for each row.
template <class Output, int NV, int W>
TWOFOUR_INLINE inline void write_rows(const LinearArgs& args, const float* sums, const uint8_t* places, int64_t row0,
                                      int64_t token, int tokens, int64_t row, int rows) {
  constexpr int64_t kRow = NV * kLanes;
  F block[W][kLanes], bias[W];
  unroll<W>([&](auto w) TWOFOUR_INLINE {
    const int64_t first = row + w * kLanes, of_block = first - row0;
    bias[w] = args.bias != nullptr ? load_first(args.bias + first, rows) : zero();
    if (places == nullptr) {
      unroll<kLanes>([&](auto i) TWOFOUR_INLINE { block[w][i] = load(sums + (of_block + i) * kRow); });
    } else {
      const float* window = sums + of_block / nm::kWindowRows * nm::kWindowRows * kRow;
      unroll<kLanes>([&](auto i) TWOFOUR_INLINE { block[w][i] = load(window + places[of_block + i] * kRow); });
    }
    transpose(block[w]);
    if (args.scales != nullptr) {
      const F scale = load_first(args.scales + first, rows);
      unroll<kLanes>([&](auto i) TWOFOUR_INLINE { block[w][i] = mul(block[w][i], scale); });
    }
  });
  if (has_epilogue(args)) return finish<Output, W>(args, block[0], bias, token, tokens, row, rows);
  Output* y = static_cast<Output*>(args.y) + token * args.y_stride + row;
  const auto write = [&](int t, int count) TWOFOUR_INLINE {
    unroll<W>([&](auto w) TWOFOUR_INLINE {
      store_first(y + t * args.y_stride + w * kLanes, add(block[w][t], bias[w]), count);
    });
  };
  if (tokens == kLanes && rows == kLanes) {
    unroll<kLanes>([&](auto t) TWOFOUR_INLINE { write(t, kLanes); });  // from registers
  } else {
    for (int t = 0; t < tokens; ++t) write(t, rows);
  }
}

// The sums of all tiles, [tile][place][NV * lanes] -> y, + bias and epilogue. Along the rows of y, one vector of tokens at a
// time: tile by tile, between the chunks, every store would open another page. Where 16 rows of y are multiples of 4 KiB
// apart, they share a set of the L1 cache, which has too few ways for all of them: then whole lines at once. (Elsewhere that
// is a little slower: two blocks are more than the registers hold.) `places` has the place of each row in its window; null:
// its own. Blocks begin where windows do, so that the sums of all rows of a window are here.
template <class Output, int NV>
void many_epilogue(const LinearArgs& args, const float* sums, const uint8_t* places, int64_t token0, int tokens,
                   int64_t tile0, int64_t tile1) {
  constexpr int64_t kSize = sizeof(Output);
  constexpr int kLine = kLanes == 16 ? kCacheLine / (kLanes * static_cast<int>(kSize)) : 1;  // vectors of y; fewer rows fit
  const bool whole_lines = kLine > 1 && args.y_stride * kSize % kL1Way == 0;
  const int64_t row0 = tile0 * nm::kTileRows, end = smaller(tile1 * nm::kTileRows, args.out_features);
  for (int v = 0; v < NV; ++v, sums += kLanes) {
    const int64_t token = token0 + v * kLanes;
    const int count = static_cast<int>(smaller(kLanes, tokens - v * kLanes));
    for (int64_t row = row0; row < end;) {
      if (whole_lines && row * kSize % kCacheLine == 0 && row + kLine * kLanes <= end) {
        write_rows<Output, NV, kLine>(args, sums, places, row0, token, count, row, kLanes);
        row += kLine * kLanes;
      } else {
        const int rows = static_cast<int>(smaller(kLanes, end - row));
        write_rows<Output, NV, 1>(args, sums, places, row0, token, count, row, rows);
        row += kLanes;
      }
    }
  }
}

template <class Core>
struct Many {
  static constexpr int64_t kSize = sizeof(typename Core::Output);
  static constexpr int kPanelVectors = Core::kPanelVectors;
  static constexpr int64_t kSlots = nm::kTileRows * nm::kKeep;
  static constexpr size_t kOffsetBytes = (kMaxChunkGroups + 3) * nm::kTileRows * sizeof(uint32_t);  // 3: loads ahead
  static constexpr size_t kWeightBytes = kMaxChunkGroups * kSlots * sizeof(float);

  static size_t scratch_bytes(int panel_bytes, int64_t tiles) {
    const size_t sums = static_cast<size_t>(tiles) * nm::kTileRows * kPanelVectors * sizeof(F);
    const size_t places = static_cast<size_t>(tiles) * nm::kTileRows;
    return static_cast<size_t>(panel_bytes) + kOffsetBytes + kWeightBytes + sums + places;
  }

  // The order the other way round: of each row of tiles [tile0, tile1) its place in its window.
  static void invert(const uint8_t* order, int64_t tile0, int64_t tile1, uint8_t* places) {
    const int64_t place0 = tile0 * nm::kTileRows;
    for (int64_t place = place0; place < tile1 * nm::kTileRows; ++place) {
      places[nm::row_of(order, place) - place0] = static_cast<uint8_t>(place % nm::kWindowRows);
    }
  }

  // A part of a row of x that is packed next into the L2 cache: rows are far apart, and packing would wait for each of them.
  static void prefetch_x(const LinearArgs& args, int64_t token, int64_t group0, int64_t groups) {
    const char* x = static_cast<const char*>(args.x) + (token * args.x_stride + group0 * nm::kGroup) * kSize;
    for (int64_t b = 0; b < groups * nm::kGroup * kSize; b += kCacheLine) __builtin_prefetch(x + b, 0, 2);
  }

  // Where y of a tile will be written. A row of a bf16 tile is half a line, and a line that is written in halves must be
  // there before; with short rows nothing of the machine fetches it.
  static void prefetch_y(const LinearArgs& args, int64_t token0, int tokens, int64_t tile) {
    const char* y = static_cast<const char*>(args.y) + (token0 * args.y_stride + tile * nm::kTileRows) * kSize;
    for (int t = 0; t < tokens; ++t) __builtin_prefetch(y + t * args.y_stride * kSize, 0, 2);
  }

  template <int NV, int S>
  static void panel(const LinearArgs& args, char* scratch, int panel_bytes, int64_t token0, int tokens, int64_t tile0,
                    int64_t tile1, int64_t next_token) {
    using Item = typename Core::WeightItem;
    constexpr int R = Core::rows_per_step(NV), kSteps = nm::kTileRows / R;
    constexpr int64_t kMetadata = nm::metadata_bytes(S);
    constexpr int kGroupBytes = Core::kPanelRows * NV * static_cast<int>(sizeof(F));
    const int64_t groups = nm::groups_of(args.in_features);
    const int64_t fitting = smaller(panel_bytes / kGroupBytes / kChunkStep * kChunkStep, kMaxChunkGroups);

    char* const packed = scratch;
    auto* const offsets = reinterpret_cast<typename Core::Offset*>(scratch + panel_bytes);
    auto* const converted = reinterpret_cast<float*>(scratch + panel_bytes + kOffsetBytes);
    auto* const sums = reinterpret_cast<float*>(scratch + panel_bytes + kOffsetBytes + kWeightBytes);

    // Of the next panel the first part of x, and y of this one: with both in memory, 384 rows of 384 at 4096 tokens took 10 %
    // less time. What is small lies in a cache of the core already, and the requests would cost 3 %.
    constexpr int64_t kFar = 1 << 20;
    const bool next_x = args.tokens * args.x_stride * kSize > kFar && next_token < args.tokens;
    const bool half_lines = nm::kTileRows * kSize < kCacheLine && args.tokens * args.y_stride * kSize > kFar;
    for (int64_t group0 = 0; group0 < groups; group0 += fitting) {
      const int chunk = static_cast<int>(smaller(fitting, groups - group0));
      const bool last = group0 + chunk == groups;
      const int64_t x_token = last ? next_token : token0, x_group = last ? 0 : group0 + chunk;
      const int64_t x_tokens = !last ? tokens : next_x ? smaller(tokens, args.tokens - next_token) : 0;
      const int64_t x_groups = smaller(fitting, groups - x_group);
      Core::template pack<NV>(args, token0, tokens, group0, chunk, packed);
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        const int64_t cell = tile * groups + group0;
        const Item* values = static_cast<const Item*>(args.values) + cell * kSlots;
        const uint8_t* metadata = args.metadata + cell * kMetadata;
        for (int b = 0; b < chunk * kMetadata; b += 64) __builtin_prefetch(metadata + groups * kMetadata + b);
        const int64_t share0 = (tile - tile0) * x_tokens / (tile1 - tile0);
        const int64_t share1 = (tile - tile0 + 1) * x_tokens / (tile1 - tile0);
        for (int64_t t = share0; t < share1; ++t) prefetch_x(args, x_token + t, x_group, x_groups);
        if (last && half_lines) prefetch_y(args, token0, tokens, tile);
        Core::template offsets<NV, S>(metadata, chunk, offsets);
        const typename Core::Weight* weights = Core::weights(values, chunk, converted);
        float* tile_sums = sums + (tile - tile0) * nm::kTileRows * NV * kLanes;
        for (int row = 0; row < nm::kTileRows; row += R) {
          // The next tile is pages away, where no prefetcher of the machine looks. Each step fetches a share of it, a
          // line per group at most: in one burst the requests stand in front of the loads of the step itself (fp32:
          // 270 instead of 340 GFLOP/s). The share after its own, for every step reads lines of all shares.
          const int ahead = row / R + 1;
          const Item* next_weights =
              values + (1 + ahead / kSteps) * groups * kSlots + ahead % kSteps * R * chunk * nm::kKeep;
          many_step<Core, R, NV, S>(packed, offsets, weights, row, chunk, reinterpret_cast<const char*>(next_weights),
                                 tile_sums, group0 == 0);
        }
      }
    }
    uint8_t* places = nullptr;
    if (args.order != nullptr) {
      places = reinterpret_cast<uint8_t*>(sums + (tile1 - tile0) * nm::kTileRows * NV * kLanes);
      invert(args.order, tile0, tile1, places);
    }
    many_epilogue<typename Core::Output, NV>(args, sums, places, token0, tokens, tile0, tile1);
  }

  static void run(const LinearArgs& args, void* scratch, int panel_bytes, int64_t token0, int tokens, int64_t tile0,
                  int64_t tile1, int64_t next_token) {
    char* const memory = static_cast<char*>(scratch);
    const int vectors = (tokens + kLanes - 1) / kLanes;
    unroll<kPanelVectors>([&](auto v) TWOFOUR_INLINE {
      constexpr int NV = v + 1;
      if (vectors != NV) return;
      if (args.shared == 4) {
        panel<NV, 4>(args, memory, panel_bytes, token0, tokens, tile0, tile1, next_token);
      } else if (args.shared == 2) {
        panel<NV, 2>(args, memory, panel_bytes, token0, tokens, tile0, tile1, next_token);
      } else {
        panel<NV, 1>(args, memory, panel_bytes, token0, tokens, tile0, tile1, next_token);
      }
    });
  }
};
