// The products of each dtype: what mma.sp multiplies and sums.
#pragma once

#include "cuda/layout.h"
#include "cuda/ptx.h"

namespace twofour::cuda {

constexpr int kTokens = 8;  // of the right operand of mma.sp

#define TWOFOUR_PRODUCTS_OF(name, SumType, itemsize, instruction)                                                         \
  struct name {                                                                                                           \
    using Sum = SumType;                                                                                                  \
    static constexpr int kItemsize = itemsize;                                                                            \
    template <int kSelector>                                                                                              \
    TWOFOUR_DEVICE static void multiply(Sum (&sums)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {      \
      instruction<kSelector>(sums, a, b, metadata);                                                                       \
    }                                                                                                                     \
  };
TWOFOUR_PRODUCTS_OF(Bf16Products, float, 2, multiply_bf16)
TWOFOUR_PRODUCTS_OF(Fp16Products, float, 2, multiply_fp16)
TWOFOUR_PRODUCTS_OF(Int8Products, int32_t, 1, multiply_int8)

}  // namespace twofour::cuda
