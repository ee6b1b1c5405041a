// AVX2 and FMA. bf16 runs on fp32 arithmetic.
#include <immintrin.h>

#include "cpu/linear.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
#include "cpu/simd_avx2.inl.h"
#include "cpu/epilogue.inl.h"
#include "cpu/linear_few.inl.h"
#include "cpu/linear_many.inl.h"
#include "cpu/linear_many_avx2.inl.h"
#include "cpu/e4m3.inl.h"
#include "cpu/linear_kernels.inl.h"

}  // namespace

const LinearKernels linear_avx2 = {
    kernel_of<FewWide<float>, ManyAvx2<float>>(),
    kernel_of<FewWide<bf16>, ManyAvx2<bf16>>(),
    kernel_of<FewWide<bf16, float>, ManyAvx2<bf16, float>>(),
    kernel_of<FewE4m3<FewWide<bf16, float>>, ManyE4m3<ManyAvx2<bf16, float>>>(),
    kernel_of<FewE4m3<FewWide<bf16>>, ManyE4m3<ManyAvx2<bf16>>>(),
};

}  // namespace twofour::cpu
