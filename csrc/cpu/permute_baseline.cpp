// Vectors of 16 bytes: SSE2 on x86-64, NEON on AArch64, without asking for more.
#include "cpu/permute.h"

namespace twofour::cpu {
namespace {

constexpr int kVectorBytes = 16;
#include "cpu/permute_kernels.inl.h"

}  // namespace

const PermuteKernels permute_baseline = {prepare, anneal};

}  // namespace twofour::cpu
