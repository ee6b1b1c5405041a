// NEON with SDOT (Armv8.4, optional before).
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

constexpr int kBlockTokens = 5;  // 20 sums and 8 registers of weights
constexpr int kFewWide = 4;      // 16 sums

TWOFOUR_INLINE inline int32x4_t dot_bytes(int32x4_t sum, int8x16_t a, int8x16_t b) { return vdotq_s32(sum, a, b); }

#include "cpu/simd_int8_neon.inl.h"
#include "cpu/linear_int8_kernels.inl.h"

}  // namespace

const LinearInt8Kernel linear_int8_neondot = kKernel;

}  // namespace twofour::cpu
