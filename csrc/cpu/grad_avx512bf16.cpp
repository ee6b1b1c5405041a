// AVX-512 with vdpbf16ps: bf16 pairs are multiplied and added as they are; fp32 as on AVX-512.
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
#include "cpu/grad_pairs.inl.h"
#include "cpu/grad_kernels.inl.h"

}  // namespace

const GradKernels grad_avx512bf16 = {
    grad_kernel_of<GradInput<GradInputWide<float>>, GradValues<float, MultiplyWide>, MultiplyWide>(),
    grad_kernel_of<GradInput<GradInputPairs>, GradValuesPairs, MultiplyPairs>(),
};

}  // namespace twofour::cpu
