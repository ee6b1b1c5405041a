// Portable C++: any architecture.
#include "cpu/linear.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
#include "cpu/simd_baseline.inl.h"
#include "cpu/epilogue.inl.h"
#include "cpu/linear_few.inl.h"
#include "cpu/linear_many.inl.h"
#include "cpu/e4m3.inl.h"
#include "cpu/linear_kernels.inl.h"

}  // namespace

const LinearKernels linear_baseline = {
    kernel_of<FewWide<float>, ManyWide<float>>(),
    kernel_of<FewWide<bf16>, ManyWide<bf16>>(),
    kernel_of<FewWide<bf16, float>, ManyWide<bf16, float>>(),
    kernel_of<FewE4m3<FewWide<bf16, float>>, ManyE4m3<ManyWide<bf16, float>>>(),
    kernel_of<FewE4m3<FewWide<bf16>>, ManyE4m3<ManyWide<bf16>>>(),
};

}  // namespace twofour::cpu
