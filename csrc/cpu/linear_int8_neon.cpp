// NEON, which every AArch64 machine has.
#include <arm_neon.h>

#include "cpu/linear_int8.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
namespace floats {
#include "cpu/simd_neon.inl.h"
#include "cpu/epilogue.inl.h"
}  // namespace floats

constexpr int kBlockTokens = 4;  // 16 sums and 8 registers of weights; the products take three more
constexpr int kFewWide = 3;      // 12 sums; 16 go to the stack

// Two products of at most 127 * 128 fit an int16, and so does their sum.
TWOFOUR_INLINE inline int32x4_t dot_bytes(int32x4_t sum, int8x16_t a, int8x16_t b) {
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(sum, vpaddq_s16(low, high));
}

#include "cpu/simd_int8_neon.inl.h"
#include "cpu/linear_int8_kernels.inl.h"

}  // namespace

const LinearInt8Kernel linear_int8_neon = kKernel;

}  // namespace twofour::cpu
