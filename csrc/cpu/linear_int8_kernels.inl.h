// The int8 kernels in terms of one vector (simd_int8_*.inl.h): `kRows` rows in its 32-bit lanes. Included inside an
// unnamed namespace, after linear_support.inl.h and a simd file.

constexpr int kTileVectors = nm::kTileRows / kRows;
constexpr int kStepValueBytes = nm::kTileRows * 4;  // of one step of a tile
constexpr int kQuadMetadataBytes = nm::kTileRows * 4;
constexpr int kDecodedBytes = 2 * 4 * kRows;  // one decoded step of a vector
constexpr int kChunkSteps = 128;              // decoded at once: 32 KiB for two vectors of 16 rows
static_assert(kChunkSteps % kInt8Quad == 0, "chunks are whole quads");

int64_t steps_of(const LinearInt8Args& args) { return (args.in_features + kInt8Step - 1) / kInt8Step; }
int64_t quads_of(const LinearInt8Args& args) { return (steps_of(args) + kInt8Quad - 1) / kInt8Quad; }

// Where the values, or the metadata, of a vector of rows (counted over all tiles) start.
const int8_t* values_of(const LinearInt8Args& args, int64_t vector) {
  return args.values + vector / kTileVectors * steps_of(args) * kStepValueBytes + vector % kTileVectors * kRows * 4;
}
const uint8_t* metadata_of(const LinearInt8Args& args, int64_t vector) {
  return args.metadata + vector / kTileVectors * quads_of(args) * kQuadMetadataBytes + vector % kTileVectors * kRows * 4;
}

// ---- quantization ----------------------------------------------------------------------------------------------------

// One token into its place in a block of `width` tokens; returns its scale.
template <class Item>
float quantize_token(const Item* x, int64_t in_features, int64_t width, uint8_t* q) {
  Ints most[4];
  unroll<4>([&](auto i) { most[i] = zero_ints(); });
  int64_t k = 0;
  for (; k + 4 * kFloats <= in_features; k += 4 * kFloats) {
    unroll<4>([&](auto i) { most[i] = larger(most[i], load_floats(x + k + i * kFloats, kFloats)); });
  }
  for (; k < in_features; k += kFloats) most[0] = larger(most[0], load_floats(x + k, in_features - k));
  uint32_t bits = 0;
  unroll<4>([&](auto i) {
    const uint32_t one = largest_of(most[i]);
    bits = one > bits ? one : bits;
  });
  float largest, scale = 0.0f, factor = 0.0f;
  __builtin_memcpy(&largest, &bits, sizeof largest);
  const bool finite = bits < 0x7F800000u;
  if (finite && largest >= kInt8Smallest) {
    scale = largest / 127.0f;
    factor = 127.0f / largest;
  }
  if (factor == 0.0f) {
    for (int64_t step = 0; step < (in_features + kInt8Step - 1) / kInt8Step; ++step) {
      __builtin_memset(q + step * width * kInputBytes, kZeroInput, kInputBytes);
    }
    return finite ? 0.0f : __builtin_nanf("");
  }
  const int64_t stride = width * kInputBytes;
  for (k = 0; k + kFloats <= in_features; k += kFloats) {
    store_quantized(q + k / kInt8Step * stride, stride, load_floats(x + k, kFloats), factor, true);
  }
  if (k < in_features) {
    const int64_t left = in_features - k;
    store_quantized(q + k / kInt8Step * stride, stride, load_floats(x + k, left), factor, left > kInt8Step);
  }
  return scale;
}

void quantize(const LinearInt8Args& args, int64_t first, int64_t width, uint8_t* block, float* x_scales) {
  for (int64_t t = 0; t < width; ++t) {
    uint8_t* q = block + t * kInputBytes;
    const int64_t token = first + t;
    if (token >= args.tokens) {  // computed with the others, never written
      for (int64_t step = 0; step < steps_of(args); ++step) {
        __builtin_memset(q + step * width * kInputBytes, kZeroInput, kInputBytes);
      }
    } else if (args.dtype == DType::kFp32) {
      const float* x = static_cast<const float*>(args.x) + token * args.x_stride;
      x_scales[token] = quantize_token(x, args.in_features, width, q);
    } else {
      const bf16* x = static_cast<const bf16*>(args.x) + token * args.x_stride;
      x_scales[token] = quantize_token(x, args.in_features, width, q);
    }
  }
}

// ---- outputs ---------------------------------------------------------------------------------------------------------

TWOFOUR_INLINE inline void* y_at(const LinearInt8Args& args, int64_t token, int64_t row) {
  const int64_t at = token * args.y_stride + row;
  return args.dtype == DType::kFp32 ? static_cast<void*>(static_cast<float*>(args.y) + at)
                                    : static_cast<void*>(static_cast<bf16*>(args.y) + at);
}

// Writes one token of the `kRows` rows of vector `vector` (counted over all tiles).
TWOFOUR_INLINE inline void write(const LinearInt8Args& args, Ints sum, Ints offsets, const float* x_scales,
                                 int64_t token, int64_t vector) {
  const int64_t row = vector * kRows;
  const int64_t left = args.out_features - row;
  if (left <= 0) return;
  const float* bias = args.bias == nullptr ? nullptr : args.bias + row;
  store_outputs(sum, offsets, x_scales[token], args.scales + row, bias, args.activation, y_at(args, token, row),
                args.dtype, static_cast<int>(smaller(left, kRows)));
}

// ---- few tokens --------------------------------------------------------------------------------------------------------

// kVectors vectors of rows side by side: more streams of memory for the processor to fetch ahead.
template <int kTokens, int kVectors>
void few_rows(const LinearInt8Args& args, const uint8_t* quantized, const float* x_scales, int64_t vector) {
  constexpr int kChains = kTokens * kVectors <= 4 ? 2 : 1;  // a dot product takes four cycles
  const int64_t steps = steps_of(args);
  const int8_t* values[kVectors];
  const uint8_t* metadata[kVectors];
  const uint8_t* x = quantized;
  Ints sums[kChains][kVectors][kTokens], offsets[kChains][kVectors];
  unroll<kVectors>([&](auto v) {
    values[v] = values_of(args, vector + v);
    metadata[v] = metadata_of(args, vector + v);
    unroll<kChains>([&](auto c) {
      offsets[c][v] = zero_ints();
      unroll<kTokens>([&](auto t) { sums[c][v][t] = zero_ints(); });
    });
  });
  Places places[kVectors];
  const auto load_quad = [&]() TWOFOUR_INLINE {
    unroll<kVectors>([&](auto v) {
      places[v] = load_places(metadata[v]);
      metadata[v] += kQuadMetadataBytes;
    });
  };
  const auto one_step = [&](auto chain) TWOFOUR_INLINE {
    unroll<kVectors>([&](auto v) TWOFOUR_INLINE {
      const Weights w = weights_at(values[v], places[v]);
      places[v] = of_next_step(places[v]);
      offsets[chain][v] = add_offsets(offsets[chain][v], w);
      unroll<kTokens>([&](auto t) TWOFOUR_INLINE {
        sums[chain][v][t] = dot(sums[chain][v][t], w, load_inputs(x + t * kInputBytes));
      });
      values[v] += kStepValueBytes;
    });
    x += kTokens * kInputBytes;
  };
  int64_t step = 0;
  for (; step + kInt8Quad <= steps; step += kInt8Quad) {
    // Reading ahead past the end of the tensors is harmless.
    constexpr int64_t kAhead = kFewAhead / kVectors;
    unroll<kVectors>([&](auto v) { __builtin_prefetch(metadata[v] + kAhead / kInt8Quad * kQuadMetadataBytes); });
    load_quad();
    unroll<kInt8Quad>([&](auto u) TWOFOUR_INLINE {
      unroll<kVectors>([&](auto v) { __builtin_prefetch(values[v] + kAhead * kStepValueBytes); });
      one_step(Constant<u % kChains>{});
    });
  }
  if (step < steps) load_quad();
  for (; step < steps; ++step) one_step(Constant<0>{});
  unroll<kVectors>([&](auto v) {
    if (kChains == 2) {
      offsets[0][v] = add_ints(offsets[0][v], offsets[kChains - 1][v]);
      unroll<kTokens>([&](auto t) { sums[0][v][t] = add_ints(sums[0][v][t], sums[kChains - 1][v][t]); });
    }
    unroll<kTokens>([&](auto t) { write(args, sums[0][v][t], offsets[0][v], x_scales, t, vector + v); });
  });
}

template <int kTokens>
void few_of(const LinearInt8Args& args, const uint8_t* quantized, const float* x_scales, int64_t vector0,
            int64_t vector1) {
  constexpr int kVectors = few_vectors(kTokens);
  int64_t vector = vector0;
  for (; vector + kVectors <= vector1; vector += kVectors) {
    few_rows<kTokens, kVectors>(args, quantized, x_scales, vector);
  }
  for (; vector < vector1; ++vector) few_rows<kTokens, 1>(args, quantized, x_scales, vector);
}

void few(const LinearInt8Args& args, const uint8_t* quantized, const float* x_scales, int64_t tile0, int64_t tile1) {
  using Run = void (*)(const LinearInt8Args&, const uint8_t*, const float*, int64_t, int64_t);
  static constexpr Run runs[kFewTokens] = {few_of<1>, few_of<2>, few_of<3>, few_of<4>,
                                           few_of<5>, few_of<6>, few_of<7>, few_of<8>};
  runs[args.tokens - 1](args, quantized, x_scales, tile0 * kTileVectors, tile1 * kTileVectors);
}

// ---- many tokens -------------------------------------------------------------------------------------------------------

// Scratch: the decoded weights of a chunk of steps, then the sums of one group of vectors for all tokens.
size_t many_scratch_bytes(int64_t tokens) {
  return static_cast<size_t>(kChunkSteps) * kGroupVectors * kDecodedBytes +
         static_cast<size_t>(tokens + kBlockTokens) * kGroupVectors * kRows * sizeof(int32_t);
}

// One block: kTokens tokens, kVectors vectors of rows, one chunk of steps. Fetches one line of `ahead` a step.
template <int kVectors, int kTokens>
TWOFOUR_OWN_REGISTERS void block(const uint8_t* decoded, const uint8_t* x, int64_t steps, int32_t* saved, bool first,
                                 const uint8_t* ahead) {
  Ints sums[kVectors * kTokens];
  if (first) {
    unroll<kVectors * kTokens>([&](auto i) { sums[i] = zero_ints(); });
  } else {
    unroll<kVectors * kTokens>([&](auto i) { sums[i] = load_ints(saved + i * kRows); });
  }
  for (int64_t step = 0; step < steps; ++step) {
    Weights w[kVectors];
    unroll<kVectors>([&](auto v) { w[v] = load_weights(decoded + v * kDecodedBytes); });
    unroll<kTokens>([&](auto t) {
      const Inputs inputs = load_inputs(x + t * kInputBytes);
      unroll<kVectors>([&](auto v) { sums[t * kVectors + v] = dot(sums[t * kVectors + v], w[v], inputs); });
    });
    __builtin_prefetch(ahead, 0, 2);
    ahead += 64;
    decoded += kVectors * kDecodedBytes;
    x += kTokens * kInputBytes;
  }
  unroll<kVectors * kTokens>([&](auto i) { store_ints(saved + i * kRows, sums[i]); });
}

using Block = void (*)(const uint8_t*, const uint8_t*, int64_t, int32_t*, bool, const uint8_t*);

template <int kVectors, int... kIndices>
Block block_of(int64_t width, Indices<kIndices...>) {
  static constexpr Block blocks[] = {block<kVectors, (kIndices + 1) * kBlockStep>...};
  return blocks[width / kBlockStep - 1];
}

template <int kVectors>
void many_of(const LinearInt8Args& args, uint8_t* scratch, const uint8_t* quantized, const float* x_scales,
             int64_t token0, int64_t token1, int64_t vector0) {
  using Widths = typename IndicesUpTo<kBlockTokens / kBlockStep>::Type;
  const int64_t steps = steps_of(args);
  uint8_t* decoded = scratch;
  auto* saved = reinterpret_cast<int32_t*>(scratch + kChunkSteps * kGroupVectors * kDecodedBytes);
  const bool alone = token1 - token0 <= 3 * kBlockTokens;
  Ints offsets[kVectors];
  unroll<kVectors>([&](auto v) { offsets[v] = zero_ints(); });
  for (int64_t step0 = 0; step0 < steps; step0 += kChunkSteps) {
    const int64_t chunk = smaller(kChunkSteps, steps - step0);
    unroll<kVectors>([&](auto v) {
      const int8_t* values = values_of(args, vector0 + v) + step0 * kStepValueBytes;
      const uint8_t* metadata = metadata_of(args, vector0 + v) + step0 / kInt8Quad * kQuadMetadataBytes;
      Places places = load_places(metadata);
      for (int64_t step = 0; step < chunk; ++step) {
        const uint8_t* quad = metadata + step / kInt8Quad * kQuadMetadataBytes;
        if (alone) {  // one block or two do not get round to all of the next chunk
          __builtin_prefetch(values + (step + kChunkSteps) * kStepValueBytes);
          if (step % kInt8Quad == 0) __builtin_prefetch(quad + kChunkSteps / kInt8Quad * kQuadMetadataBytes);
        }
        places = step % kInt8Quad == 0 ? load_places(quad) : of_next_step(places);
        const Weights w = weights_at(values + step * kStepValueBytes, places);
        offsets[v] = add_offsets(offsets[v], w);
        store_weights(decoded + (step * kVectors + v) * kDecodedBytes, w);
      }
    });
    // The first blocks fetch the weights of the next chunk: 64 steps of values are 64 lines, of metadata 16.
    const bool last = step0 + kChunkSteps >= steps;
    const int64_t next_vector = last ? vector0 + kVectors : vector0, next_step = last ? 0 : step0 + kChunkSteps;
    const int8_t* values[] = {values_of(args, next_vector), values_of(args, next_vector + kVectors - 1)};
    const uint8_t* metadata[] = {metadata_of(args, next_vector), metadata_of(args, next_vector + kVectors - 1)};
    const int64_t next_quad = next_step / kInt8Quad;
    const uint8_t* ahead[] = {reinterpret_cast<const uint8_t*>(values[0] + next_step * kStepValueBytes),
                              reinterpret_cast<const uint8_t*>(values[1] + next_step * kStepValueBytes),
                              metadata[0] + next_quad * kQuadMetadataBytes, metadata[1] + next_quad * kQuadMetadataBytes};
    int number = 0;
    for (int64_t token = token0; token < token1; ++number) {
      const int64_t width = int8_block_width(token1 - token, kBlockTokens, kBlockStep);
      int32_t* sums = saved + (token - token0) * kVectors * kRows;
      const int64_t end = smaller(token + width, args.tokens);
      if (last) {  // rows of y lie in pages far apart: without this they cost 5 % of a layer
        for (int64_t t = token; t < end; ++t) __builtin_prefetch(y_at(args, t, vector0 * kRows), 1);
        if (kVectors > 1) {
          for (int64_t t = token; t < end; ++t) __builtin_prefetch(y_at(args, t, (vector0 + 1) * kRows), 1);
        }
      }
      block_of<kVectors>(width, Widths{})(decoded, quantized + (token * steps + step0 * width) * kInputBytes, chunk, sums,
                                          step0 == 0, number < 4 ? ahead[number] : decoded);
      if (last) {
        for (int64_t t = token; t < end; ++t) {
          unroll<kVectors>([&](auto v) {
            write(args, load_ints(sums + ((t - token) * kVectors + v) * kRows), offsets[v], x_scales, t, vector0 + v);
          });
        }
      }
      token += width;
    }
  }
}

void many(const LinearInt8Args& args, void* scratch, const uint8_t* quantized, const float* x_scales, int64_t token0,
          int64_t token1, int64_t tile0, int64_t tile1) {
  auto* bytes = static_cast<uint8_t*>(scratch);
  int64_t vector = tile0 * kTileVectors;
  const int64_t end = tile1 * kTileVectors;
  for (; vector + kGroupVectors <= end; vector += kGroupVectors) {
    many_of<kGroupVectors>(args, bytes, quantized, x_scales, token0, token1, vector);
  }
  for (; vector < end; ++vector) many_of<1>(args, bytes, quantized, x_scales, token0, token1, vector);
}

constexpr LinearInt8Kernel kKernel = {kInputBytes, kFewTokens, kBlockTokens, kBlockStep,
                                      quantize,    few,        many_scratch_bytes, many};
