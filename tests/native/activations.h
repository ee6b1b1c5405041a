// The activations in double, and what the kernels may err.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/linear.h"
#include "support.h"

namespace twofour::test {

struct Function {
  const char* name;
  cpu::Activation code;
  double (*of)(double);
  double (*condition)(double);  // how many times the rounding of an intermediate result may grow
};
inline double relu_of(double x) { return x < 0 ? 0 : x; }
inline double times_sigmoid_of(double x, double z) {
  const double e = std::exp(-std::fabs(z));
  return x * ((z < 0 ? e : 1) / (1 + e));
}
inline double tanh_argument_of(double x) { return 2 * std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x); }
inline double always_one(double) { return 1; }
inline constexpr Function kFunctions[] = {
    {"relu", cpu::Activation::kRelu, relu_of, always_one},
    {"gelu", cpu::Activation::kGelu, [](double x) { return x * (0.5 * std::erfc(-x * std::sqrt(0.5))); }, always_one},
    {"gelu_tanh", cpu::Activation::kGeluTanh, [](double x) { return times_sigmoid_of(x, tanh_argument_of(x)); },
     [](double x) { return 1 + std::min(std::fabs(tanh_argument_of(x)), 110.0); }},
    {"silu", cpu::Activation::kSilu, [](double x) { return times_sigmoid_of(x, x); }, always_one},
};
// What an activation may err, relative: 8 units of 2^-24, of which 4 to 7.6 were seen; 2^-12.5 more where y is bf16: rcp14 may
// err by 2^-14 and less (2^-13.06 in all was seen on Zen 5).
inline double function_error(const Type& of_y, double condition) {
  return 8 * 0x1p-24 * condition + (&of_y == &kBf16 ? 0x1.6p-13 : 0);
}

}  // namespace twofour::test
