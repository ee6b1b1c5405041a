// AVX2.
#include <immintrin.h>

#include "cpu/linear_int8.h"
#include "nm/layout.h"

namespace twofour::cpu {
namespace {

#include "cpu/linear_support.inl.h"
namespace floats {
#include "cpu/simd_avx2.inl.h"
#include "cpu/epilogue.inl.h"
}  // namespace floats
#include "cpu/simd_int8_avx2.inl.h"
#include "cpu/linear_int8_kernels.inl.h"

}  // namespace

const LinearInt8Kernel linear_int8_avx2 = kKernel;

}  // namespace twofour::cpu
