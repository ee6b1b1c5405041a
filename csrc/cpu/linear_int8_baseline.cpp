// Plain C++ for any machine: the int8 kernel read without vectors. One row at a time, each weight for all tokens of a
// block, whose sums are neighbours so that compilers can vectorise them.
#include "cpu/linear_int8.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
namespace floats {
#include "cpu/simd_baseline.inl.h"
#include "cpu/epilogue.inl.h"
}  // namespace floats

constexpr int kBlockTokens = 16;

int64_t steps_of(const LinearInt8Args& args) { return (args.in_features + kInt8Step - 1) / kInt8Step; }

float as_float(float item) { return item; }
float as_float(bf16 item) {
  const uint32_t bits = static_cast<uint32_t>(item) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Nearest even: adding 1.5 * 2^23 leaves no bits for the fraction. |value| <= 128.
int8_t nearest(float value) {
  const float shifted = value + 12582912.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return static_cast<int8_t>(bits - 0x4B400000);
}

template <class Item>
float quantize_token(const Item* x, int64_t in_features, int64_t width, int8_t* q) {
  uint32_t most = 0;
  for (int64_t k = 0; k < in_features; ++k) {
    const float value = as_float(x[k]);
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    bits &= 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  float largest;
  __builtin_memcpy(&largest, &most, sizeof largest);
  const bool finite = most < 0x7F800000u;
  const bool zero = !finite || largest < kInt8Smallest;
  const float factor = zero ? 0.0f : 127.0f / largest;
  for (int64_t k = 0; k < (in_features + kInt8Step - 1) / kInt8Step * kInt8Step; ++k) {
    q[(k / kInt8Step * width) * kInt8Step + k % kInt8Step] =
        zero || k >= in_features ? int8_t{0} : nearest(as_float(x[k]) * factor);
  }
  return !finite ? __builtin_nanf("") : zero ? 0.0f : largest / 127.0f;
}

void quantize(const LinearInt8Args& args, int64_t first, int64_t width, uint8_t* block, float* x_scales) {
  for (int64_t t = 0; t < width; ++t) {
    auto* q = reinterpret_cast<int8_t*>(block) + t * kInt8Step;
    const int64_t token = first + t;
    if (token >= args.tokens) {
      for (int64_t step = 0; step < steps_of(args); ++step) __builtin_memset(q + step * width * kInt8Step, 0, kInt8Step);
    } else if (args.dtype == DType::kFp32) {
      x_scales[token] = quantize_token(static_cast<const float*>(args.x) + token * args.x_stride, args.in_features,
                                       width, q);
    } else {
      x_scales[token] = quantize_token(static_cast<const bf16*>(args.x) + token * args.x_stride, args.in_features,
                                       width, q);
    }
  }
}

void write(const LinearInt8Args& args, int32_t sum, float x_scale, int64_t token, int64_t row) {
  float value = static_cast<float>(sum) * x_scale;
  value = value * args.scales[row];
  if (args.bias != nullptr) value = value + args.bias[row];
  if (args.activation != Activation::kNone) {
    value = floats::activated(floats::all(value), args.activation, args.dtype)[0];
  }
  const int64_t at = token * args.y_stride + row;
  if (args.dtype == DType::kFp32) {
    static_cast<float*>(args.y)[at] = value;
    return;
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits + 0x7FFFu + (bits >> 16 & 1u);
  static_cast<bf16*>(args.y)[at] = static_cast<bf16>(rounded >> 16);
}

void block(const LinearInt8Args& args, const int8_t* q, int64_t width, const float* x_scales, int64_t token0,
           int64_t row) {
  const int64_t steps = steps_of(args), quads = (steps + kInt8Quad - 1) / kInt8Quad, r = row % nm::kTileRows;
  int32_t sums[kBlockTokens] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t cell = (row / nm::kTileRows * steps + step) * nm::kTileRows + r;
    const int64_t quad = row / nm::kTileRows * quads + step / kInt8Quad;
    const uint8_t* places = args.metadata + (quad * nm::kTileRows + r) * 4;
    const int8_t* x = q + step * width * kInt8Step;
    for (int kept = 0; kept < 4; ++kept) {
      const int32_t weight = args.values[cell * 4 + kept];
      const unsigned place = (places[kept] >> (2 * (step % kInt8Quad)) & 3u) + (kept < nm::kKeep ? 0 : nm::kGroup);
      for (int64_t t = 0; t < width; ++t) sums[t] += weight * x[t * kInt8Step + place];
    }
  }
  for (int64_t t = 0; t < width && token0 + t < args.tokens; ++t) {
    write(args, sums[t], x_scales[token0 + t], token0 + t, row);
  }
}

void few(const LinearInt8Args& args, const uint8_t* quantized, const float* x_scales, int64_t tile0, int64_t tile1) {
  const int64_t end = smaller(tile1 * nm::kTileRows, args.out_features);
  for (int64_t row = tile0 * nm::kTileRows; row < end; ++row) {
    block(args, reinterpret_cast<const int8_t*>(quantized), args.tokens, x_scales, 0, row);
  }
}

size_t many_scratch_bytes(int64_t) { return 0; }

void many(const LinearInt8Args& args, void*, const uint8_t* quantized, const float* x_scales, int64_t token0,
          int64_t token1, int64_t tile0, int64_t tile1) {
  const int64_t end = smaller(tile1 * nm::kTileRows, args.out_features);
  for (int64_t row = tile0 * nm::kTileRows; row < end; ++row) {
    for (int64_t token = token0; token < token1;) {
      const int64_t width = int8_block_width(token1 - token, kBlockTokens, 1);
      const auto* q = reinterpret_cast<const int8_t*>(quantized) + token * steps_of(args) * kInt8Step;
      block(args, q, width, x_scales, token, row);
      token += width;
    }
  }
}

}  // namespace

const LinearInt8Kernel linear_int8_baseline = {kInt8Step, 8, kBlockTokens, 1, quantize, few, many_scratch_bytes, many};

}  // namespace twofour::cpu
