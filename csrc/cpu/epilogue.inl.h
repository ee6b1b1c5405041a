// What follows the sums of a linear layer: y = activation(x @ W.T + bias) + residual, in fp32, rounded once with y. Included
// inside an unnamed namespace, after simd_*.inl.h.
//
// ReLU is exact. For y of fp32, GELU and SiLU err by 8 units of 2^-24 at most, relative, also where they decay to 0 on the
// negative side, where the textbook form 1 + erf(..) has lost every digit; GELU by tanh(z) by 8 (1 + 2|z|), for z itself is
// rounded. For y of bf16, which is rounded to 2^-8, they err by 2^-12.5 and those 8 (1 + 2|z|), and take half the time: the
// functions called rough. What is smaller than 2^-122 |x| may become 0. -inf gives NaN as in torch (-inf * 0), except for
// ReLU; NaN stays NaN.

inline bool has_epilogue(const LinearArgs& args) {
  return args.activation != Activation::kNone || args.residual != nullptr;
}

// c[0] + c[1] x + .. + c[N - 1] x^(N - 1).
template <int N>
TWOFOUR_INLINE inline F polynomial(const float (&c)[N], F x) {
  F sum = all(c[N - 1]);
  unroll<N - 1>([&](auto i) TWOFOUR_INLINE { sum = fma(sum, x, all(c[N - 2 - i])); });
  return sum;
}

// e^(x + rest) for x in [-87, 0] and |rest| < 0.06: no subnormals, which cost some processors a hundred cycles each.
TWOFOUR_INLINE inline F exponential(F x, F rest) {
  constexpr float kRound = 12582912;       // 1.5 * 2^23: what is added to it loses its fraction
  constexpr float kBiased = kRound + 127;  // and here its low bits are the exponent field of 2^n
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  static constexpr float kTerms[] = {0.499999821f, 0.166663766f, 0.041670084f, 0.00838326942f, 0.0013784609f};
  const F biased = fma(x, all(1.44269504f), all(kBiased));
  const F n = add(biased, all(-kBiased));
  const F r = add(fma(n, all(-kLn2Low), fma(n, all(-kLn2High), x)), rest);
  const F e = add(fma(mul(r, r), polynomial(kTerms, r), r), all(1));
  return mul(e, low_bits_as_exponent(biased));
}

// 2^(x * scale) for x * scale in [-127, 0], within 2^-18; 0 below -126.5.
TWOFOUR_INLINE inline F rough_power(F x, float scale) {
  constexpr float kRound = 12582912, kBiased = kRound + 127;  // as above
  static constexpr float kTerms[] = {0.99999926f, 0.69312181f, 0.240247462f, 0.0559178907f, 0.00957007698f};
  const F biased = fma(x, all(scale), all(kBiased));
  const F n = add(biased, all(-kBiased));
  return mul(polynomial(kTerms, fma(x, all(scale), mul(n, all(-1)))), low_bits_as_exponent(biased));
}

// min(|x|, largest); NaN becomes the largest, and x itself must bring it back.
TWOFOUR_INLINE inline F bounded_magnitude(F x, float largest) {
  return lesser(and_bits(x, 0x7fffffffu), all(largest));
}

// x / (1 + e^-z) for z of x's sign.
TWOFOUR_INLINE inline F times_sigmoid(F x, F z) {
  constexpr float kEnd = 87;
  const F t = bounded_magnitude(z, kEnd);
  const F e = select_less(t, all(kEnd), exponential(mul(t, all(-1)), zero()), zero());
  return mul(x, divide(select_less(x, zero(), e, all(1)), add(e, all(1))));
}
TWOFOUR_INLINE inline F rough_times_sigmoid(F x, F z) {
  constexpr float kLog2E = 1.44269504f, kEnd = 127 / kLog2E;  // where rough_power is 0
  const F e = rough_power(bounded_magnitude(z, kEnd), -kLog2E);
  return mul(select_less(x, zero(), mul(x, e), x), about_one_over(add(e, all(1))));
}

// x Phi(x), where Phi(-t) = e^(-t^2 / 2) R(t) and R, which falls from 1/2 like 1 / t, is a quotient of polynomials without
// a minus: nothing cancels. t^2 is taken in two parts, for its rounding would reach the result 80 times as large.
TWOFOUR_INLINE inline F gelu(F x) {
  static constexpr float kOver[] = {0.5f, 0.438504845f, 0.183390081f, 0.0406852886f, 0.0041239839f};
  static constexpr float kUnder[] = {1, 1.67489469f, 1.20314789f, 0.469879508f, 0.101989269f, 0.0103371767f};
  constexpr float kEnd = 12.75f;
  const F t = bounded_magnitude(x, kEnd);
  const F high = and_bits(t, 0xfffff000u);  // 12 bits: the square is exact
  const F rest = mul(fma(high, all(-1), t), mul(add(t, high), all(-0.5f)));
  const F e = exponential(mul(mul(high, high), all(-0.5f)), rest);
  const F tail = select_less(t, all(kEnd), mul(e, divide(polynomial(kOver, t), polynomial(kUnder, t))), zero());
  return mul(x, select_less(x, zero(), tail, fma(tail, all(-1), all(1))));
}
// Here R is a polynomial of u = 1 / (1 + kPole t), within 2^-15 (the form of Hastings, Approximations for Digital Computers,
// 1955, with terms that bound the relative error).
TWOFOUR_INLINE inline F rough_gelu(F x) {
  static constexpr float kTerms[] = {0.14908687f, 0.15814399f, 0.08254127f, 0.20159401f, -0.09137926f};
  constexpr float kPole = 0.37516025f, kScale = -0.72134752f;  // -1/2 log2(e)
  constexpr float kEnd = 13.2687f;                             // kScale kEnd^2 = -127: rough_power is 0
  const F t = bounded_magnitude(x, kEnd);
  const F u = about_one_over(fma(t, all(kPole), all(1)));
  const F tail = mul(rough_power(mul(t, t), kScale), mul(u, polynomial(kTerms, u)));
  return mul(x, select_less(x, zero(), tail, fma(tail, all(-1), all(1))));
}

// 0.5 x (1 + tanh(z)) = x / (1 + e^-2z) for z = sqrt(2 / pi) (x + 0.044715 x^3): 2z of x.
TWOFOUR_INLINE inline F tanh_argument(F x) { return mul(x, fma(mul(x, x), all(0.0713548163f), all(1.59576912f))); }

TWOFOUR_INLINE inline F relu(F x) { return select_less(x, zero(), zero(), x); }

// Gives body the function of an activation, for y of Output.
template <class Output, class Body>
TWOFOUR_INLINE inline void with_function_of(Activation activation, Body&& body) {
  constexpr bool kRough = sizeof(Output) == sizeof(bf16);
  switch (activation) {
    case Activation::kNone: return body([](F v) TWOFOUR_INLINE { return v; });
    case Activation::kRelu: return body([](F v) TWOFOUR_INLINE { return relu(v); });
    case Activation::kGelu: return body([](F v) TWOFOUR_INLINE { return kRough ? rough_gelu(v) : gelu(v); });
    case Activation::kGeluTanh:
      return body([](F v) TWOFOUR_INLINE {
        const F z = tanh_argument(v);
        return kRough ? rough_times_sigmoid(v, z) : times_sigmoid(v, z);
      });
    case Activation::kSilu:
      return body([](F v) TWOFOUR_INLINE { return kRough ? rough_times_sigmoid(v, v) : times_sigmoid(v, v); });
  }
}

// activation(v) for one vector of y of fp32 or bf16; a function of its own, for the same reason as `finish`.
TWOFOUR_OWN_REGISTERS inline F activated(F v, Activation activation, DType of_y) {
  F found = v;
  const auto body = [&](auto function) TWOFOUR_INLINE { found = function(v); };
  if (of_y == DType::kFp32) {
    with_function_of<float>(activation, body);
  } else {
    with_function_of<bf16>(activation, body);
  }
  return found;
}

template <class Output, int W, class Function>
TWOFOUR_INLINE inline void finish_each(const LinearArgs& args, const F* sums, const F* bias, int64_t token0, int tokens,
                                       int64_t row, int rows, Function&& function) {
  Output* y = static_cast<Output*>(args.y) + token0 * args.y_stride + row;
  const auto each = [&](auto&& added) TWOFOUR_INLINE {
    for (int t = 0; t < tokens; ++t) {
      unroll<W>([&](auto w) TWOFOUR_INLINE {
        const F v = function(add(sums[w * kLanes + t], bias[w]));
        store_first(y + t * args.y_stride + w * kLanes, added(v, t, w * kLanes), rows);
      });
    }
  };
  if (args.residual == nullptr) return each([](F v, int, int) TWOFOUR_INLINE { return v; });
  const Output* residual = static_cast<const Output*>(args.residual) + token0 * args.residual_stride + row;
  each([&](F v, int t, int i) TWOFOUR_INLINE {
    return add(v, load_first(residual + t * args.residual_stride + i, rows));
  });
}

// Writes outputs from `row` on of tokens [token0, token0 + tokens): W vectors side by side, `rows` of each (all of them, if
// W > 1), from sums kLanes apart. A function of its own: its registers are not those of the loops that made the sums.
template <class Output, int W>
TWOFOUR_OWN_REGISTERS void finish(const LinearArgs& args, const F* sums, const F* bias, int64_t token0, int tokens,
                                  int64_t row, int rows) {
  with_function_of<Output>(args.activation, [&](auto function) TWOFOUR_INLINE {
    finish_each<Output, W>(args, sums, bias, token0, tokens, row, rows, function);
  });
}

// The same for places [place, place + rows) of the tiles, whose rows args.order names: what finish would write side by side
// goes to its rows one by one.
template <class Output, int T>
TWOFOUR_OWN_REGISTERS void finish_scattered(const LinearArgs& args, const F* sums, F bias, int64_t token0, int64_t place,
                                            int rows) {
  const uint8_t* order = args.order + place;
  const int64_t window = place / nm::kWindowRows * nm::kWindowRows;
  const auto each_row = [&](auto body) TWOFOUR_INLINE {
    unroll<kLanes>([&](auto i) TWOFOUR_INLINE {
      if (i < rows) body(i, order[i]);
    });
  };
  Output finished[T * kLanes];
  if (has_epilogue(args)) {
    Output residual[T * kLanes] = {};
    LinearArgs aside = args;
    aside.y = finished;
    aside.y_stride = aside.residual_stride = kLanes;
    if (args.residual != nullptr) {
      const Output* from = static_cast<const Output*>(args.residual) + token0 * args.residual_stride + window;
      for (int t = 0; t < T; ++t, from += args.residual_stride) {
        each_row([&](int i, int64_t row) TWOFOUR_INLINE {
          __builtin_memcpy(residual + t * kLanes + i, from + row, sizeof(Output));
        });
      }
      aside.residual = residual;
    }
    finish<Output, 1>(aside, sums, &bias, 0, T, 0, kLanes);
  } else {
    for (int t = 0; t < T; ++t) store_first(finished + t * kLanes, add(sums[t], bias), kLanes);
  }
  Output* y = static_cast<Output*>(args.y) + token0 * args.y_stride + window;
  for (int t = 0; t < T; ++t, y += args.y_stride) {
    each_row([&](int i, int64_t row) TWOFOUR_INLINE {
      __builtin_memcpy(y + row, finished + t * kLanes + i, sizeof(Output));
    });
  }
}
