// The floats that are ranked by their bits.
#pragma once

#include "cuda/device.h"

namespace twofour::cuda {

template <int kFractionBits, int kBitsOfExponent>
struct FloatFormat {
  static constexpr int kFraction = kFractionBits, kExponentBits = kBitsOfExponent;
  static constexpr uint32_t kInfinity = ((1u << kExponentBits) - 1) << kFraction;  // NaN lies above it
};

struct Bfloat16 : FloatFormat<7, 8> {};
struct Float16 : FloatFormat<10, 5> {};
struct Float32 : FloatFormat<23, 8> {};

}  // namespace twofour::cuda
