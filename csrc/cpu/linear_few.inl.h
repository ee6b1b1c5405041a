// Few tokens: y = x @ W.T + bias with 16 output rows in lanes. Included inside an unnamed namespace.
//
// Per (tile, group) the kernel reads 16 rows' kept values and nibbles once, and for each of T tokens picks the kept
// activations out of the group with one select per kept value:
//
//   group of token t   x0 x1 x2 x3 | x0 x1 x2 x3 | ..        broadcast
//   select             x1 x3 x0 x2 | x0 x0 x1 x3 | ..        lane r takes what the nibble of row r names
//   accumulator t     += select * values                      16 outputs of token t
//
// One token runs at the speed of memory: what counts is that the compressed bytes are read once, in order.

constexpr int kHalves = nm::kTileRows / kLanes;  // vectors per tile

// x is arranged as [block][group][token of the block][4], a block being the tokens of one pass over a tile. That makes
// one stream of the T rows of x, which otherwise lie in the same cache set when in_features is a power of two.
struct FewBlocks {
  int64_t tokens, count;

  explicit FewBlocks(int64_t tokens) : tokens(tokens), count((tokens + kFewTokens - 1) / kFewTokens) {}
  int64_t begin(int64_t block) const { return block * tokens / count; }
};

// Weights and tokens of fp32 or bf16, activations and sums in fp32.
template <class Item, class Token = Item>
struct FewWide {
  using WeightItem = Item;
  using Activation = float;
  using Output = Token;

  static float widened(float value) { return value; }
  static float widened(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  static void prepare_group(const Token* x, float* prepared) {
    for (int i = 0; i < nm::kGroup; ++i) {
      Token item;
      __builtin_memcpy(&item, x + i, sizeof item);
      prepared[i] = widened(item);
    }
  }

  template <int kHalf>
  static F first(const float* slots) { return load(slots + kHalf * kLanes); }
  template <int kHalf>
  static F second(const float* slots) { return load(slots + nm::kTileRows + kHalf * kLanes); }
  template <int kHalf>
  static F first(const bf16* slots) { return first_of_pairs(slots + nm::kKeep * kHalf * kLanes); }
  template <int kHalf>
  static F second(const bf16* slots) { return second_of_pairs(slots + nm::kKeep * kHalf * kLanes); }

  // Groups per step: as many as hide the latency of two dependent FMAs behind independent accumulators.
  template <int T>
  static constexpr int unrolled() { return T * kHalves <= 2 ? 4 : T * kHalves <= 4 ? 2 : 1; }

  template <int T, int S>
  TWOFOUR_INLINE static void group(const Item* slots, const uint8_t* metadata, const float* x, F (&sums)[kHalves][T]) {
    unroll<kHalves>([&](auto half) TWOFOUR_INLINE {
      const I index = nibbles<half, S>(metadata), index2 = second_index(index);
      const F w0 = first<half>(slots), w1 = second<half>(slots);
      unroll<T>([&](auto t) TWOFOUR_INLINE {
        const auto x4 = group_of(x + nm::kGroup * t);
        sums[half][t] = fma(select(x4, index), w0, sums[half][t]);
        sums[half][t] = fma(select(x4, index2), w1, sums[half][t]);
      });
    });
  }
};

// The outputs of one tile for the T tokens of a block. The order of every sum is fixed by the groups alone.
template <class Core, int S, int T>
void few_tile(const LinearArgs& args, const void* prepared, int64_t tile, int64_t token0) {
  using Item = typename Core::WeightItem;
  constexpr int kUnrolled = Core::template unrolled<T>();
  constexpr int64_t kSlots = nm::kTileRows * nm::kKeep, kMetadata = nm::metadata_bytes(S);
  constexpr int64_t kAhead = 8192;  // bytes: two pages; at 1 KiB four tokens took 850 us where 8 KiB takes 620
  const int64_t groups = nm::groups_of(args.in_features);
  const Item* slots = static_cast<const Item*>(args.values) + tile * groups * kSlots;
  const uint8_t* metadata = args.metadata + tile * groups * kMetadata;
  const auto* x = static_cast<const typename Core::Activation*>(prepared);

  F sums[kUnrolled][kHalves][T];
  unroll<kUnrolled>([&](auto u) TWOFOUR_INLINE {
    unroll<kHalves>([&](auto half) TWOFOUR_INLINE {
      unroll<T>([&](auto t) TWOFOUR_INLINE { sums[u][half][t] = zero(); });
    });
  });
  int64_t group = 0;
  for (; group + kUnrolled <= groups; group += kUnrolled) {
    unroll<kUnrolled>([&](auto u) TWOFOUR_INLINE {
      __builtin_prefetch(reinterpret_cast<const char*>(slots + u * kSlots) + kAhead);
      if (sizeof(Item) == 4) __builtin_prefetch(reinterpret_cast<const char*>(slots + u * kSlots) + kAhead + 64);
      Core::template group<T, S>(slots + u * kSlots, metadata + u * kMetadata, x + u * T * nm::kGroup, sums[u]);
    });
    slots += kUnrolled * kSlots;
    metadata += kUnrolled * kMetadata;
    x += kUnrolled * T * nm::kGroup;
  }
  for (; group < groups; ++group) {
    Core::template group<T, S>(slots, metadata, x, sums[0]);
    slots += kSlots;
    metadata += kMetadata;
    x += T * nm::kGroup;
  }

  auto* y = static_cast<typename Core::Output*>(args.y);
  unroll<kHalves>([&](auto half) TWOFOUR_INLINE {
    const int64_t row = tile * nm::kTileRows + half * kLanes;
    const int rows = static_cast<int>(smaller(kLanes, args.out_features - row));
    if (rows > 0) {
      const F bias = args.bias != nullptr ? load_first(args.bias + row, rows) : zero();
      const F scale = args.scales != nullptr ? load_first(args.scales + row, rows) : all(1);
      const auto sum_of = [&](auto t) TWOFOUR_INLINE {
        F sum = sums[0][half][t];
        unroll<kUnrolled - 1>([&](auto u) TWOFOUR_INLINE { sum = add(sum, sums[u + 1][half][t]); });
        return mul(sum, scale);
      };
      if (args.order != nullptr || has_epilogue(args)) {
        F ends[T];
        unroll<T>([&](auto t) TWOFOUR_INLINE { ends[t] = sum_of(t); });
        if (args.order != nullptr) {
          finish_scattered<typename Core::Output, T>(args, ends, bias, token0, row, rows);
        } else {
          finish<typename Core::Output, 1>(args, ends, &bias, token0, T, row, rows);
        }
      } else {
        unroll<T>([&](auto t) TWOFOUR_INLINE {
          store_first(y + (token0 + t) * args.y_stride + row, add(sum_of(t), bias), rows);
        });
      }
    }
  });
}

template <class Core>
struct Few {
  using TileFunction = void (*)(const LinearArgs&, const void*, int64_t, int64_t);

  template <int... kIndices>
  static TileFunction tile_function(int shared, int64_t tokens, Indices<kIndices...>) {
    static constexpr TileFunction kFunctions[][kFewTokens] = {
        {few_tile<Core, 1, kIndices + 1>...}, {few_tile<Core, 2, kIndices + 1>...}, {few_tile<Core, 4, kIndices + 1>...}};
    return kFunctions[shared / 2][tokens - 1];
  }

  static size_t scratch_bytes(const LinearArgs& args) {
    return static_cast<size_t>(args.tokens * args.in_features) * sizeof(typename Core::Activation);
  }

  static void prepare(const LinearArgs& args, void* scratch) {
    const FewBlocks blocks(args.tokens);
    auto* prepared = static_cast<typename Core::Activation*>(scratch);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t token0 = blocks.begin(block), tokens = blocks.begin(block + 1) - token0;
      for (int64_t t = 0; t < tokens; ++t) {
        const auto* x = static_cast<const typename Core::Output*>(args.x) + (token0 + t) * args.x_stride;
        auto* out = prepared + token0 * args.in_features + t * nm::kGroup;
        for (int64_t group = 0; group < nm::groups_of(args.in_features); ++group) {
          Core::prepare_group(x + group * nm::kGroup, out + group * tokens * nm::kGroup);
        }
      }
    }
  }

  static void run(const LinearArgs& args, const void* scratch, int64_t tile0, int64_t tile1) {
    const FewBlocks blocks(args.tokens);
    const auto* prepared = static_cast<const typename Core::Activation*>(scratch);
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t token0 = blocks.begin(block), tokens = blocks.begin(block + 1) - token0;
        const TileFunction function = tile_function(args.shared, tokens, typename IndicesUpTo<kFewTokens>::Type{});
        function(args, prepared + token0 * args.in_features, tile, token0);
      }
    }
  }
};
