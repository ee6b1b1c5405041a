// AVX2.
#include "cpu/permute.h"

namespace twofour::cpu {
namespace {

constexpr int kVectorBytes = 32;
#include "cpu/permute_kernels.inl.h"

}  // namespace

const PermuteKernels permute_avx2 = {prepare, anneal};

}  // namespace twofour::cpu
