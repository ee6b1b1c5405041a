// AVX-512 with vdpbf16ps: bf16 pairs are multiplied and added as they are; fp32 as on AVX-512.
#include <immintrin.h>

#include "cpu/linear.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
#include "cpu/simd_avx512.inl.h"
#include "cpu/epilogue.inl.h"
#include "cpu/linear_few.inl.h"
#include "cpu/linear_many.inl.h"
#include "cpu/linear_pairs.inl.h"
#include "cpu/e4m3.inl.h"
#include "cpu/linear_kernels.inl.h"

}  // namespace

const LinearKernels linear_avx512bf16 = {
    kernel_of<FewWide<float>, ManyWide<float>>(),
    kernel_of<FewPairs, ManyPairs>(),
    kernel_of<FewWide<bf16, float>, ManyWide<bf16, float>>(),
    kernel_of<FewE4m3<FewWide<bf16, float>>, ManyE4m3<ManyWide<bf16, float>>>(),
    kernel_of<FewE4m3<FewPairs>, ManyE4m3<ManyPairs>>(),
};

}  // namespace twofour::cpu
