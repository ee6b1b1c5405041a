// What follows the sums of a product: y = activation(sum * token_scale * row_scale + bias) + residual, in float32, rounded
// once to the items of y. kernels/epilogue.py is the specification.
//
// Sums go through shared memory, so that a thread holds four rows of a token side by side: y and the residual are read and
// written four items at once, and the functions stand in the code once and not for every register of sums.
#pragma once

#include "cuda/layout.h"
#include "cuda/ptx.h"

namespace twofour::cuda {

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };  // in the order of kernels/epilogue.py
enum class Item : int32_t { kBf16, kFp16, kFp32 };

struct Epilogue {
  const void* bias;          // [rows] items, or null
  const float* row_scale;    // [rows], or null
  const float* token_scale;  // [tokens], or null
  const void* residual;      // [tokens, rows] items, rows `residual_stride` items apart; or null
  int64_t residual_stride;
  Activation activation;
  void* y;  // [tokens, rows] items, rows `y_stride` items apart
  int64_t y_stride;
  Item item;  // of y, the bias and the residual
  int64_t tokens, rows;
};

// Shared memory for the sums of a token: four tokens apart, rows of eight lie in different banks.
template <int kRows>
struct SumsOf {
  static constexpr int kStride = kRows + 4;
  static constexpr int kBytes = 4 * kStride;  // of a token
};

// Four items from place `at` on, the first `count` of them; zeros follow.
TWOFOUR_DEVICE void load_items(const void* items, int64_t at, int64_t count, Item item, float (&to)[4]) {
  if (item == Item::kFp32) {
    const float* const from = static_cast<const float*>(items) + at;
    if (count >= 4 && reinterpret_cast<uint64_t>(from) % sizeof(uint4) == 0) {
      const uint4 four = load_written(reinterpret_cast<const uint4*>(from));
      to[0] = float_of_bits(four.x), to[1] = float_of_bits(four.y);
      to[2] = float_of_bits(four.z), to[3] = float_of_bits(four.w);
      return;
    }
    unroll<4>([&](auto i) { to[i] = i < count ? from[i] : 0.0f; });
    return;
  }
  const uint16_t* const from = static_cast<const uint16_t*>(items) + at;
  uint32_t bits[4];
  if (count >= 4 && reinterpret_cast<uint64_t>(from) % sizeof(uint2) == 0) {
    const uint2 four = load_written(reinterpret_cast<const uint2*>(from));
    bits[0] = four.x & 0xffffu, bits[1] = four.x >> 16, bits[2] = four.y & 0xffffu, bits[3] = four.y >> 16;
  } else {
    unroll<4>([&](auto i) { bits[i] = i < count ? from[i] : 0; });
  }
  unroll<4>([&](auto i) {
    const auto half = static_cast<uint16_t>(bits[i]);
    to[i] = item == Item::kBf16 ? float_of_bf16(half) : float_of_fp16(half);
  });
}

TWOFOUR_DEVICE void store_items(void* items, int64_t at, int64_t count, Item item, const float (&from)[4]) {
  if (item == Item::kFp32) {
    float* const to = static_cast<float*>(items) + at;
    if (count >= 4 && reinterpret_cast<uint64_t>(to) % sizeof(uint4) == 0) {
      store_wide(reinterpret_cast<uint4*>(to),
                 uint4{bits_of_float(from[0]), bits_of_float(from[1]), bits_of_float(from[2]), bits_of_float(from[3])});
      return;
    }
    unroll<4>([&](auto i) {
      if (i < count) to[i] = from[i];
    });
    return;
  }
  uint32_t bits[4];
  unroll<4>([&](auto i) { bits[i] = item == Item::kBf16 ? bf16_of(from[i]) : fp16_of(from[i]); });
  uint16_t* const to = static_cast<uint16_t*>(items) + at;
  if (count >= 4) {
    store_four(to, uint2{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16});
    return;
  }
  unroll<4>([&](auto i) {
    if (i < count) to[i] = static_cast<uint16_t>(bits[i]);
  });
}

// x / (1 + e^-z) for z of x's sign; -inf gives NaN as in torch, -inf * 0.
TWOFOUR_DEVICE float times_sigmoid(float x, float z) { return x / (1.0f + expf(-z)); }

// GELU is x Phi(x) by erfc, as 1 + erf(x) loses all digits where it decays to 0. By tanh(z) it is x / (1 + e^-2z).
TWOFOUR_DEVICE void activate(Activation activation, float (&y)[4]) {
  constexpr float kRootOfHalf = 0.707106781f, kTwoRootsOfTwoOverPi = 1.59576912f, kCubic = 0.044715f;
  switch (activation) {
    case Activation::kNone: return;
    case Activation::kRelu: unroll<4>([&](auto i) { y[i] = y[i] < 0.0f ? 0.0f : y[i]; }); return;
    case Activation::kGelu: unroll<4>([&](auto i) { y[i] *= 0.5f * erfcf(-kRootOfHalf * y[i]); }); return;
    case Activation::kGeluTanh:
      unroll<4>([&](auto i) {
        y[i] = times_sigmoid(y[i], kTwoRootsOfTwoOverPi * (y[i] + kCubic * y[i] * y[i] * y[i]));
      });
      return;
    case Activation::kSilu: unroll<4>([&](auto i) { y[i] = times_sigmoid(y[i], y[i]); }); return;
  }
}

// A lane asks for what finish() wants of kRows rows from `row0` on, bias and scales of eight: they come meanwhile.
template <int kRows>
TWOFOUR_DEVICE void prefetch_of_rows(const Epilogue& epilogue, int64_t row0, int lane) {
  constexpr int kTogether = 8;
  static_assert(kRows <= kWarp * kTogether, "a warp asks for all");
  const int64_t row = row0 + lane * kTogether;
  if (lane * kTogether >= kRows || row >= epilogue.rows) return;
  if (epilogue.row_scale != nullptr) prefetch_line(epilogue.row_scale + row);
  if (epilogue.bias != nullptr) {
    prefetch_line(static_cast<const char*>(epilogue.bias) + row * (epilogue.item == Item::kFp32 ? 4 : 2));
  }
}

// What the blocks of a cluster have at a place, added up in their order. One block alone reads its own.
template <class Sum>
TWOFOUR_DEVICE void sum_of_parts(const uint4* own, uint32_t parts, Sum (&sums)[4]) {
  constexpr uint32_t kTogether = 4;  // they are far away
  const uint4 first = parts == 1 ? *own : load_of_peer(own, 0);
  sums[0] = number_of<Sum>(first.x), sums[1] = number_of<Sum>(first.y);
  sums[2] = number_of<Sum>(first.z), sums[3] = number_of<Sum>(first.w);
  TWOFOUR_ROLLED
  for (uint32_t part = 1; part < parts; part += kTogether) {
    uint4 fours[kTogether];
    unroll<kTogether>([&](auto k) {  // behind the last one zeros
      fours[k] = part + k < parts ? load_of_peer(own, part + k) : uint4{};
    });
    unroll<kTogether>([&](auto k) {
      sums[0] += number_of<Sum>(fours[k].x), sums[1] += number_of<Sum>(fours[k].y);
      sums[2] += number_of<Sum>(fours[k].z), sums[3] += number_of<Sum>(fours[k].w);
    });
  }
}

// Finishes `count` tokens from `token0` on, kRows rows of each from `row0` on. Their sums lie in shared memory, and all
// threads may read them: of blocks that share the columns `parts`, in that of each of the cluster. `part` is this one's; the
// blocks take turns, a few tokens each.
template <int kRows, int kThreads, class Sum>
TWOFOUR_DEVICE void finish(const Epilogue& epilogue, const Sum* sums, int count, int64_t row0, int64_t token0,
                           uint32_t part = 0, uint32_t parts = 1) {
  constexpr int kFours = kRows / 4;
  static_assert(kThreads % kFours == 0, "a thread keeps to its rows");
  const int thread = thread_again(), four = thread % kFours * 4;
  const int64_t row = row0 + four, left = epilogue.rows - row;
  if (left <= 0) return;
  float bias[4] = {}, scale[4] = {1, 1, 1, 1};
  if (epilogue.bias != nullptr) load_items(epilogue.bias, row, left, epilogue.item, bias);
  if (epilogue.row_scale != nullptr) load_items(epilogue.row_scale, row, left, Item::kFp32, scale);
  constexpr int kTogether = kThreads / kFours;
  TWOFOUR_ROLLED
  for (int i = static_cast<int>(part) * kTogether + thread / kFours; i < count; i += static_cast<int>(parts) * kTogether) {
    const int64_t token = token0 + i;
    if (token >= epilogue.tokens) return;
    const float of_token = epilogue.token_scale != nullptr ? epilogue.token_scale[token] : 1.0f;
    Sum whole[4];
    sum_of_parts(reinterpret_cast<const uint4*>(sums + i * SumsOf<kRows>::kStride + four), parts, whole);
    float y[4];
    unroll<4>([&](auto j) {
      const float sum = static_cast<float>(whole[j]);
      y[j] = rounded_product(rounded_product(sum, of_token), scale[j]) + bias[j];  // as reference.linear_int8
    });
    activate(epilogue.activation, y);
    if (epilogue.residual != nullptr) {
      float residual[4];
      load_items(epilogue.residual, token * epilogue.residual_stride + row, left, epilogue.item, residual);
      unroll<4>([&](auto j) { y[j] += residual[j]; });
    }
    store_items(epilogue.y, token * epilogue.y_stride + row, left, epilogue.item, y);
  }
}

// Where several blocks (gridDim.y) share the columns of a tile and are no cluster, each leaves its sums in `partial`, and the
// last one to come adds them up in the order of the slices, so that results do not depend on who came last. Every thread
// calls it, the first kHolders of a block with sums of their own; true where they are whole now. `counters` [gridDim.x] begin
// and end as zeros; `partial` holds 16 bytes for each four sums of each holder of the grid.
template <int kHolders, int kCount, class Sum>
TWOFOUR_DEVICE bool add_slices(Sum (&sums)[kCount][4], void* partial, uint32_t* counters) {
  constexpr int kTogether = kCount < 8 ? 8 / kCount : 1;  // slices that are read at once
  TWOFOUR_SHARED uint32_t came_before;
  if (gridDim.y == 1) return true;
  const int thread = static_cast<int>(thread_again());
  const int64_t block = int64_t{blockIdx.x} * kCount, of_slice = int64_t{gridDim.x} * kCount;
  uint4* const own = static_cast<uint4*>(partial) + block * kHolders + thread;
  if (thread < kHolders) {
    unroll<kCount>([&](auto n) {
      store_wide(own + (blockIdx.y * of_slice + n) * kHolders,
                 uint4{bits_of(sums[n][0]), bits_of(sums[n][1]), bits_of(sums[n][2]), bits_of(sums[n][3])});
    });
  }
  // One thread speaks for all: barriers carry what was written before to it, and from it what it sees (PTX ISA, "Causality
  // order").
  sync_block();
  if (thread == 0) came_before = count_up(counters + blockIdx.x);
  sync_block();
  if (came_before != gridDim.y - 1) return false;
  if (thread == 0) counters[blockIdx.x] = 0;
  unroll<kCount>([&](auto n) { unroll<4>([&](auto i) { sums[n][i] = 0; }); });
  if (thread >= kHolders) return true;
  TWOFOUR_ROLLED
  for (uint32_t slice = 0; slice < gridDim.y; slice += kTogether) {
    uint4 fours[kTogether][kCount];
    unroll<kTogether>([&](auto s) {  // behind the last slice zeros
      unroll<kCount>([&](auto n) {
        fours[s][n] = kTogether == 1 || slice + s < gridDim.y ? load_latest(own + ((slice + s) * of_slice + n) * kHolders)
                                                              : uint4{};
      });
    });
    unroll<kTogether>([&](auto s) {
      unroll<kCount>([&](auto n) {
        sums[n][0] += number_of<Sum>(fours[s][n].x), sums[n][1] += number_of<Sum>(fours[s][n].y);
        sums[n][2] += number_of<Sum>(fours[s][n].z), sums[n][3] += number_of<Sum>(fours[s][n].w);
      });
    });
  }
  return true;
}

// The parameters of kernels behind those of the product, and what they make.
#define TWOFOUR_EPILOGUE_PARAMETERS                                                                                       \
  const void *bias, const float *row_scale, const float *token_scale, const void *residual, int64_t residual_stride,      \
      int64_t activation, void *y, int64_t y_stride, int64_t item
#define TWOFOUR_EPILOGUE(tokens, rows)                                                                                    \
  Epilogue {                                                                                                              \
    bias, row_scale, token_scale, residual, residual_stride, static_cast<Activation>(activation), y, y_stride,            \
        static_cast<Item>(item), tokens, rows                                                                             \
  }

}  // namespace twofour::cuda
