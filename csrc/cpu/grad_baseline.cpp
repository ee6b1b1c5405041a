// Portable C++: any architecture.
#include "cpu/grad.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
#include "cpu/simd_baseline.inl.h"
#include "cpu/grad_sizes.inl.h"
#include "cpu/grad_plain.inl.h"
#include "cpu/grad_input.inl.h"
#include "cpu/grad_values.inl.h"
#include "cpu/grad_kernels.inl.h"

}  // namespace

const GradKernels grad_baseline = {
    grad_kernel_of<GradInput<GradInputWide<float>>, GradValues<float, MultiplyWide>, MultiplyWide>(),
    grad_kernel_of<GradInput<GradInputWide<bf16>>, GradValues<bf16, MultiplyWide>, MultiplyWide>(),
};

}  // namespace twofour::cpu
