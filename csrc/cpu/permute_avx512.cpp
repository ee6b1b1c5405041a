// AVX-512.
#include "cpu/permute.h"

namespace twofour::cpu {
namespace {

constexpr int kVectorBytes = 64;
#include "cpu/permute_kernels.inl.h"

}  // namespace

const PermuteKernels permute_avx512 = {prepare, anneal};

}  // namespace twofour::cpu
