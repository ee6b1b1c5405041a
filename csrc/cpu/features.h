// What the processor can do, asked at run time: for the files that dispatch an operation.
#pragma once

#if defined(TWOFOUR_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(TWOFOUR_AARCH64) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#endif

namespace twofour::cpu {

inline bool always() { return true; }

#if defined(TWOFOUR_X86)
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#if defined(TWOFOUR_EMULATED_AVX512)  // tests/native/emulated: nothing beyond AVX2 is executed
inline bool has_avx512() { return has_avx2(); }
inline bool has_avx512bf16() { return has_avx512(); }
inline bool has_avx512vnni() { return has_avx512(); }
#else
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
inline bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
inline bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#endif

#if defined(TWOFOUR_AARCH64)
// Linux tells by a bit of an entry of the auxiliary vector, macOS by a name.
inline bool has_arm_feature([[maybe_unused]] unsigned long entry, [[maybe_unused]] unsigned long bit,
                            [[maybe_unused]] const char* name) {
#if defined(__linux__)
  return (getauxval(entry) & bit) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
constexpr unsigned long kHwcap = 16, kHwcap2 = 26;  // AT_HWCAP, AT_HWCAP2
inline bool has_neondot() { return has_arm_feature(kHwcap, 1ul << 20, "hw.optional.arm.FEAT_DotProd"); }
inline bool has_neonbf16() { return has_arm_feature(kHwcap2, 1ul << 14, "hw.optional.arm.FEAT_BF16"); }
#endif

}  // namespace twofour::cpu
