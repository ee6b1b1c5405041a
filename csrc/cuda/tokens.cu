// Inputs as int8 with a scale for each token: twofour/kernels/reference.py, quantize_tokens, bit for bit. A block takes a
// token, and reads it twice.
#include "cuda/device.h"
#include "cuda/ptx.h"

namespace twofour::cuda {

constexpr int kTokenThreads = 256;
constexpr float kLargestInt8 = 127.0f;
constexpr float kSmallestToken = 1.5046327690525280e-36f;  // 2^-119: the scale of smaller ones would be no normal number

struct Float32Items {
  using Item = float;
  TWOFOUR_DEVICE static float number(float item) { return item; }
};
struct Bf16Items {
  using Item = uint16_t;
  TWOFOUR_DEVICE static float number(uint16_t item) { return float_of_bf16(item); }
};
struct Fp16Items {
  using Item = uint16_t;
  TWOFOUR_DEVICE static float number(uint16_t item) { return float_of_fp16(item); }
};

template <class Items>
TWOFOUR_DEVICE void quantize_token(const typename Items::Item* x, int64_t x_stride, int64_t columns, int8_t* q,
                                   int64_t q_stride, float* scales) {
  TWOFOUR_SHARED uint32_t largest;
  const int64_t token = blockIdx.x;
  const typename Items::Item* const own = x + token * x_stride;
  if (threadIdx.x == 0) largest = 0;
  sync_block();
  uint32_t most = 0;  // bits of magnitudes: NaN lies above infinity, infinity above numbers
  for (int64_t i = threadIdx.x; i < columns; i += kTokenThreads) {
    const uint32_t magnitude = bits_of_float(Items::number(own[i])) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  max_into(&largest, most);
  sync_block();
  const uint32_t found = largest;
  const float size = float_of_bits(found);
  const bool finite = found < 0x7f800000u, used = finite && size >= kSmallestToken;
  const float factor = used ? kLargestInt8 / size : 0.0f;
  for (int64_t i = threadIdx.x; i < columns; i += kTokenThreads) {
    q[token * q_stride + i] = used ? static_cast<int8_t>(nearest_integer(Items::number(own[i]) * factor)) : int8_t{0};
  }
  if (threadIdx.x == 0) scales[token] = used ? size / kLargestInt8 : finite ? 0.0f : float_of_bits(0x7fc00000u);
}

#define TWOFOUR_QUANTIZE_TOKENS(name, Items)                                                                          \
  TWOFOUR_KERNEL(kTokenThreads, 4)                                                                                    \
  name(const Items::Item* x, int64_t x_stride, int64_t columns, int8_t* q, int64_t q_stride, float* scales) {         \
    quantize_token<Items>(x, x_stride, columns, q, q_stride, scales);                                                 \
  }
TWOFOUR_QUANTIZE_TOKENS(quantize_tokens_fp32, Float32Items)
TWOFOUR_QUANTIZE_TOKENS(quantize_tokens_bf16, Bf16Items)
TWOFOUR_QUANTIZE_TOKENS(quantize_tokens_fp16, Fp16Items)

}  // namespace twofour::cuda
