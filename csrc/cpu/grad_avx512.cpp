// AVX-512 F, BW, VL, DQ. bf16 runs on fp32 arithmetic.
#include <immintrin.h>

#include "cpu/grad.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
#include "cpu/simd_avx512.inl.h"
#include "cpu/grad_sizes.inl.h"
#include "cpu/grad_avx512.inl.h"
#include "cpu/grad_input.inl.h"
#include "cpu/grad_values.inl.h"
#include "cpu/grad_kernels.inl.h"

}  // namespace

const GradKernels grad_avx512 = {
    grad_kernel_of<GradInput<GradInputWide<float>>, GradValues<float, MultiplyWide>, MultiplyWide>(),
    grad_kernel_of<GradInput<GradInputWide<bf16>>, GradValues<bf16, MultiplyWide>, MultiplyWide>(),
};

}  // namespace twofour::cpu
