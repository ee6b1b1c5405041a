// What every kernel includes first. Three compilers read this text: NVRTC, which has no standard library; nvcc; and g++ on a
// machine without a GPU, where tests/cuda/emulated/gpu.h runs the threads of a block in turns.
#pragma once

#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define TWOFOUR_DEVICE __device__ __forceinline__
#define TWOFOUR_BOTH __host__ __device__ __forceinline__
#define TWOFOUR_APART __device__ __noinline__  // seldom called: it must not cost the others registers
#define TWOFOUR_ROLLED _Pragma("unroll 1")
#define TWOFOUR_SHARED __shared__
#define TWOFOUR_TABLE __device__ constexpr  // read by places that the compiler does not know
#define TWOFOUR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define TWOFOUR_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#else
#include "gpu.h"
#endif

namespace twofour::cuda {

// body(0), body(1), .., with constants: what they index stays in registers.
template <int kValue>
struct Constant {
  TWOFOUR_BOTH constexpr operator int() const { return kValue; }
};

template <int kCount, int kFrom = 0, class Body>
TWOFOUR_BOTH void unroll(Body&& body) {
  if constexpr (kFrom < kCount) {
    body(Constant<kFrom>{});
    unroll<kCount, kFrom + 1>(body);
  }
}

TWOFOUR_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace twofour::cuda
