// AVX-512 F, BW, VL, DQ.
#include "cpu/masks.h"

#include <immintrin.h>

namespace twofour::cpu {
namespace {

constexpr int kLanes = 8;  // doubles of a vector

#include "cpu/linear_support.inl.h"
#include "nm/halves.inl.h"
#include "cpu/masks_rows.inl.h"
#include "cpu/masks_rows_avx512.inl.h"
#include "cpu/masks_blocks.inl.h"
#include "cpu/masks_groups.inl.h"
#include "cpu/masks_soft.inl.h"

}  // namespace

const MaskKernels masks_avx512 = {{transposable_2_4<float>, transposable_2_4<double>, transposable_2_4<bf16>},
{soft_2_4<float>, nullptr, soft_2_4<bf16>},
{soft_2_4t<float>, nullptr, soft_2_4t<bf16>},
                                  {best_of_groups<float>, best_of_groups<double>}};

}  // namespace twofour::cpu
