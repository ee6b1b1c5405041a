// The linear kernels without Python: every instruction set of this build that runs here, both families, every mode,
// against a double loop over the canonical format.
//
//   linear_test [--require NAME]... [--only TEXT]     exit status 1 for a wrong result, or for a required instruction set that is
//                                       not there
//
// Rules for numbers, as in tests/kernels: integers agree exactly; real inputs stay inside a component-wise bound; bits
// do not depend on threads. To add a mode (other dtypes), give it a row in kModes; what a call takes is in `call`, what
// it should give in `reference`, and how a weight is made in `make_weight`.
#include <algorithm>
#include <cinttypes>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/linear.h"
#include "cpu/pack.h"
#include "cpu/threads.h"
#include "nm/layout.h"
#include "activations.h"
#include "support.h"

namespace twofour::test {
namespace {

struct Mode {
  const char* name;
  cpu::DType code;
  const Type& weight;
  const Type& tokens;  // x and y
  int shared = 1;      // neighbouring rows that have one mask
  bool ordered = false;  // neighbours in an order, not in W
};
constexpr Mode kModes[] = {
    {"fp32", cpu::DType::kFp32, kFp32, kFp32},
    {"bf16", cpu::DType::kBf16, kBf16, kBf16},
    {"bf16 fp32", cpu::DType::kBf16Fp32, kBf16, kFp32},
    {"bf16 fp32 x4", cpu::DType::kBf16Fp32, kBf16, kFp32, 4},
    {"fp32 x2", cpu::DType::kFp32, kFp32, kFp32, 2},
    {"fp32 x4", cpu::DType::kFp32, kFp32, kFp32, 4},
    {"bf16 x2", cpu::DType::kBf16, kBf16, kBf16, 2},
    {"bf16 x4", cpu::DType::kBf16, kBf16, kBf16, 4},
    {"fp32 x4 in order", cpu::DType::kFp32, kFp32, kFp32, 4, true},
    {"fp32 x2 in order", cpu::DType::kFp32, kFp32, kFp32, 2, true},
    {"bf16 x4 in order", cpu::DType::kBf16, kBf16, kBf16, 4, true},
    {"bf16 fp32 x4 in order", cpu::DType::kBf16Fp32, kBf16, kFp32, 4, true},
    {"e4m3 fp32", cpu::DType::kE4m3Fp32, kE4m3, kFp32},
    {"e4m3 bf16", cpu::DType::kE4m3Bf16, kE4m3, kBf16},
    {"e4m3 fp32 x4 in order", cpu::DType::kE4m3Fp32, kE4m3, kFp32, 4, true},
    {"e4m3 bf16 x2 in order", cpu::DType::kE4m3Bf16, kE4m3, kBf16, 2, true},
};

struct Kernel {
  std::string isa;
  cpu::Family family;

  std::string name() const { return isa + (family == cpu::Family::kFew ? "/few" : "/many"); }
};

std::vector<Kernel> kernels() {
  std::vector<Kernel> all;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    for (const cpu::Family family : {cpu::Family::kFew, cpu::Family::kMany}) all.push_back({cpu::isa_name(i), family});
  }
  return all;
}

// ---- weights, the reference, the call ------------------------------------------------------------------------------

// A matrix in the canonical format and in the CPU layout.
struct Weight {
  int64_t out_features, in_features;
  Rows values;                      // [out, in / 2]
  std::vector<int64_t> columns;     // [out, in / 2], where in the row each value stands
  std::vector<uint8_t> metadata;    // canonical
  int shared;                       // as in Mode
  Memory packed_values, packed_metadata;
  std::vector<uint8_t> rows_in_order;  // as in nm/layout.h; empty for none
  Memory order;                        // the same between guard pages
  Rows scales{kFp32, 0, 0};            // [1, out], powers of two, where values are e4m3

  double scale(int64_t row) const { return scales.rows() == 0 ? 1 : scales.get(0, row); }

  const uint8_t* order_data() const {
    return rows_in_order.empty() ? nullptr : reinterpret_cast<const uint8_t*>(order.data());
  }
  bool keeps(int64_t row, int64_t column) const { return value_at(row, column) >= 0; }
  // Index among the kept values of the row, or -1.
  int64_t value_at(int64_t row, int64_t column) const {
    const int64_t kept = in_features / 2;
    for (int64_t j = column / 4 * 2; j < column / 4 * 2 + 2; ++j) {
      if (columns[static_cast<size_t>(row * kept + j)] == column) return j;
    }
    return -1;
  }

  void pack() {
    const size_t cells = static_cast<size_t>(nm::tiles_of(out_features) * nm::groups_of(in_features));
    packed_values = Memory(cells * 32 * static_cast<size_t>(values.type().size));
    packed_metadata = Memory(cells * static_cast<size_t>(nm::metadata_bytes(shared)));
    cpu::pack_linear(values.data(), metadata.data(), packed_values.data(),
                     reinterpret_cast<uint8_t*>(packed_metadata.data()), out_features, in_features,
                     values.type().size, shared, order_data());
  }
};

// Rows shuffled inside their windows; what fills the last tile stays.
std::vector<uint8_t> random_order(Random& random, int64_t out_features) {
  std::vector<uint8_t> order(static_cast<size_t>(nm::tiles_of(out_features) * nm::kTileRows));
  for (size_t place = 0; place < order.size(); ++place) order[place] = static_cast<uint8_t>(place % nm::kWindowRows);
  for (int64_t window = 0; window < out_features; window += nm::kWindowRows) {
    const int rows = static_cast<int>(std::min<int64_t>(nm::kWindowRows, out_features - window));
    for (int i = rows - 1; i > 0; --i) {
      std::swap(order[static_cast<size_t>(window + i)], order[static_cast<size_t>(window + random.below(i + 1))]);
    }
  }
  return order;
}

// The mask whose rows lie in `order` in the given one.
Mask scattered(const Mask& mask, const std::vector<uint8_t>& order, int64_t out_features, int64_t in_features) {
  Mask moved = mask;
  const int64_t kept = in_features / 2, bytes = nm::metadata_row_bytes(in_features);
  for (int64_t place = 0; place < out_features; ++place) {
    const int64_t row = nm::row_of(order.data(), place);
    std::copy_n(mask.columns.begin() + place * kept, kept, moved.columns.begin() + row * kept);
    std::copy_n(mask.metadata.begin() + place * bytes, bytes, moved.metadata.begin() + row * bytes);
  }
  return moved;
}

enum class Numbers { kIntegers, kReals };

double draw(Random& random, Numbers numbers) {
  return numbers == Numbers::kIntegers ? random.integer() : random.real();
}

Weight make_weight(const Mode& mode, int64_t out_features, int64_t in_features, Numbers numbers, uint64_t seed = 0) {
  Random random(seed * 1000003 + static_cast<uint64_t>(out_features * 4099 + in_features));
  Rows values(mode.weight, out_features, in_features / 2);
  Weight weight{out_features, in_features, std::move(values), {}, {}, mode.shared, {}, {}, {}, {}};
  weight.values.fill([&] { return draw(random, numbers); });
  if (&mode.weight == &kE4m3) {
    weight.scales = Rows(kFp32, 1, out_features);
    weight.scales.fill([&] { return std::ldexp(1, random.below(5) - 2); });
  }
  Mask mask = random_mask(random, out_features, in_features, mode.shared);
  if (mode.ordered) {
    weight.rows_in_order = random_order(random, out_features);
    weight.order = Memory(weight.rows_in_order.size());
    std::memcpy(weight.order.data(), weight.rows_in_order.data(), weight.rows_in_order.size());
    mask = scattered(mask, weight.rows_in_order, out_features, in_features);
  }
  weight.columns = std::move(mask.columns);
  weight.metadata = std::move(mask.metadata);
  weight.pack();
  return weight;
}

// Per output: the exact result (exact for integers, else rounded to double) and the sum of the terms' magnitudes.
struct Reference {
  std::vector<double> y, magnitude;
  int64_t out_features;

  double at(int64_t token, int64_t row) const { return y[static_cast<size_t>(token * out_features + row)]; }
  double magnitude_at(int64_t token, int64_t row) const {
    return magnitude[static_cast<size_t>(token * out_features + row)];
  }
};

Reference reference(const Weight& weight, const Rows& x, const Rows* bias, int64_t tokens) {
  const int64_t kept = weight.in_features / 2;
  Reference result{{}, {}, weight.out_features};
  std::vector<double> row_values(static_cast<size_t>(kept)), token(static_cast<size_t>(weight.in_features));
  result.y.resize(static_cast<size_t>(tokens * weight.out_features));
  result.magnitude.resize(result.y.size());
  std::vector<double> values(static_cast<size_t>(weight.out_features * kept));
  for (int64_t row = 0; row < weight.out_features; ++row) {
    for (int64_t j = 0; j < kept; ++j) values[static_cast<size_t>(row * kept + j)] = weight.values.get(row, j);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < weight.in_features; ++k) token[static_cast<size_t>(k)] = x.get(t, k);
    for (int64_t row = 0; row < weight.out_features; ++row) {
      const double added = bias != nullptr ? bias->get(0, row) : 0;
      double sum = 0, magnitude = 0;
      for (int64_t j = 0; j < kept; ++j) {
        const size_t at = static_cast<size_t>(row * kept + j);
        const double product = values[at] * token[static_cast<size_t>(weight.columns[at])];
        sum += product;
        magnitude += std::fabs(product);
      }
      sum = sum * weight.scale(row) + added;
      magnitude = magnitude * weight.scale(row) + std::fabs(added);
      result.y[static_cast<size_t>(t * weight.out_features + row)] = sum;
      result.magnitude[static_cast<size_t>(t * weight.out_features + row)] = magnitude;
    }
  }
  return result;
}

// As the output type has it.
double rounded(const Type& type, double value) {
  char item[8];
  type.write(item, value);
  return type.read(item);
}

// What follows the sums: y = activation(x @ W.T + bias) + residual.
struct Epilogue {
  cpu::Activation activation = cpu::Activation::kNone;
  const Rows* residual = nullptr;  // of y's type
};

// Runs y.rows() tokens and returns what ran.
std::string call(const char* isa, cpu::Family family, const Mode& mode, const Weight& weight, const Rows& x,
                 const Rows* bias, Rows& y, int threads, const Epilogue& epilogue = {}) {
  cpu::LinearArgs args = {x.data(),
                          weight.packed_values.data(),
                          reinterpret_cast<const uint8_t*>(weight.packed_metadata.data()),
                          nullptr,
                          y.data(),
                          y.rows(),
                          weight.out_features,
                          weight.in_features,
                          x.stride(),
                          y.stride(),
                          weight.shared};
  args.activation = epilogue.activation;
  args.residual = epilogue.residual != nullptr ? epilogue.residual->data() : nullptr;
  args.residual_stride = epilogue.residual != nullptr ? epilogue.residual->stride() : 0;
  args.order = weight.order_data();
  args.scales = weight.scales.rows() == 0 ? nullptr : reinterpret_cast<const float*>(weight.scales.data());
  const cpu::DType bias_code = bias != nullptr && &bias->type() == &kBf16 ? cpu::DType::kBf16 : cpu::DType::kFp32;
  return cpu::linear(args, mode.code, bias != nullptr ? bias->data() : nullptr, bias_code, threads, isa, family);
}

// The same, having made sure that the kernel asked for is the one that ran.
void run(const Kernel& kernel, const Mode& mode, const Weight& weight, const Rows& x, const Rows* bias, Rows& y,
         int threads, const Epilogue& epilogue = {}) {
  const std::string ran = call(kernel.isa.c_str(), kernel.family, mode, weight, x, bias, y, threads, epilogue);
  check(ran == kernel.name(), "asked for %s, ran %s", kernel.name().c_str(), ran.c_str());
}

// Calls `expected(token, row)` for every output and reports the first that differs.
template <class Expected>
void check_equal(const char* test, const Kernel& kernel, const Mode& mode, const Weight& weight, const Rows& y,
                 Expected&& expected) {
  for (int64_t token = 0; token < y.rows(); ++token) {
    for (int64_t row = 0; row < y.columns(); ++row) {
      const double is = y.get(token, row), should = expected(token, row);
      if (is == should || (std::isnan(is) && std::isnan(should))) continue;
      check(false, "%s, %s %s, %" PRId64 " tokens, %" PRId64 " x %" PRId64 ": y[%" PRId64 ", %" PRId64 "] = %g, not %g",
            test, kernel.name().c_str(), mode.name, y.rows(), weight.out_features, weight.in_features, token, row, is,
            should);
      return;
    }
  }
  check(true, "%s", test);
}

// ---- the tests -----------------------------------------------------------------------------------------------------

struct Shape {
  int64_t out_features, in_features;
};

// Around the edges of a tile (16 rows), of a step of packing (4 groups), of a chunk (64 groups at most, fewer where the
// panel has more tokens), and of the metadata's bytes (2 groups), of a window (64 rows).
constexpr Shape kShapes[] = {{1, 4},    {1, 1028}, {15, 8},   {15, 64},   {16, 12},  {16, 256}, {17, 60}, {17, 260},
                             {31, 68},  {33, 100}, {33, 388}, {50, 516},  {64, 4},   {65, 36},  {130, 96},
                             {60, 20},  {68, 28},  {132, 12}};
// Around the edges of a vector (4, 8, 16 tokens), of a pass of the few-token kernel and of a panel (6 vectors).
constexpr int64_t kTokens[] = {1,  2,  3,  4,  5,  7,  8,  9,  15, 16, 17, 23, 24, 25,
                               31, 33, 47, 48, 49, 64, 80, 95, 96, 97, 193};

void integers_agree_exactly(const Mode& mode) {
  int number = 0;
  for (const Shape& shape : kShapes) {
    const Weight weight = make_weight(mode, shape.out_features, shape.in_features, Numbers::kIntegers);
    Random random(1);
    Rows x(mode.tokens, 193, shape.in_features, number % 2 == 0 ? 0 : 5);
    x.fill([&] { return random.integer(); });
    Rows bias(number % 3 == 1 ? kBf16 : kFp32, 1, shape.out_features);
    bias.fill([&] { return random.integer(); });
    const Rows* with = number % 3 != 0 ? &bias : nullptr;
    const Reference exact = reference(weight, x, with, x.rows());
    for (const int64_t tokens : kTokens) {
      for (const Kernel& kernel : kernels()) {
        Rows y(mode.tokens, tokens, shape.out_features);
        run(kernel, mode, weight, x, with, y, 1 + number % 2);
        check_equal("integers", kernel, mode, weight, y,
                    [&](int64_t t, int64_t row) { return rounded(mode.tokens, exact.at(t, row)); });
      }
    }
    ++number;
  }
}

// Elements that put rows a multiple of 4 KiB apart: there the kernels of many tokens write whole cache lines.
int64_t gap_to_4_kib(const Type& type, int64_t columns) {
  const int64_t page = 4096 / type.size;
  return (page - columns % page) % page;
}

// Several panels, several blocks of rows, several threads, for which the last panels are cut; with gaps x and y reach over
// more than 1 MiB, from where on they are fetched beforehand.
void large_integers_agree_exactly(const Mode& mode) {
  constexpr int64_t kTokens = 280, kOut = 1100, kIn = 132;
  const Weight weight = make_weight(mode, kOut, kIn, Numbers::kIntegers);
  for (const bool gaps : {false, true}) {
    Random random(2);
    Rows x(mode.tokens, kTokens, kIn, gaps ? gap_to_4_kib(mode.tokens, kIn) : 0);
    x.fill([&] { return random.integer(); });
    const Reference exact = reference(weight, x, nullptr, x.rows());
    for (const Kernel& kernel : kernels()) {
      const bool few = kernel.family == cpu::Family::kFew;
      Rows y(mode.tokens, few ? 11 : kTokens, kOut, gaps ? gap_to_4_kib(mode.tokens, kOut) : 0);
      for (const int threads : {2, 3, 4}) {
        if (few && threads != 3) continue;
        run(kernel, mode, weight, x, nullptr, y, threads);
        check_equal("large", kernel, mode, weight, y,
                    [&](int64_t t, int64_t row) { return rounded(mode.tokens, exact.at(t, row)); });
      }
    }
  }
}

void reals_stay_in_bound(const Mode& mode) {
  struct {
    int64_t tokens;
    Shape shape;
  } const sizes[] = {{37, {1, 512}}, {96, {18, 1028}}, {7, {70, 260}}};
  for (const auto& size : sizes) {
    const Weight weight = make_weight(mode, size.shape.out_features, size.shape.in_features, Numbers::kReals);
    Random random(3);
    Rows x(mode.tokens, size.tokens, weight.in_features), bias(kFp32, 1, weight.out_features);
    x.fill([&] { return random.real(); });
    bias.fill([&] { return random.real(); });
    const Reference exact = reference(weight, x, &bias, size.tokens);
    // One rounding for each product and each sum, to nearest (u = 2^-24). BFDOT and vdpbf16ps round half as often, to
    // odd or to nearest, and take subnormals for 0: below 2^-126 for each.
    const double terms = static_cast<double>(weight.in_features) / 2 + 1;
    for (const Kernel& kernel : kernels()) {
      Rows y(mode.tokens, size.tokens, weight.out_features);
      run(kernel, mode, weight, x, &bias, y, 1);
      double worst = 0;
      for (int64_t t = 0; t < size.tokens; ++t) {
        for (int64_t row = 0; row < weight.out_features; ++row) {
          const double bound = mode.tokens.unit * std::fabs(exact.at(t, row)) * 1.01 +
                               2 * terms * 0x1p-24 * exact.magnitude_at(t, row) + terms * 0x1p-126;
          const double error = std::fabs(y.get(t, row) - exact.at(t, row)) / bound;
          worst = error <= worst ? worst : error;  // a NaN is the worst and stays it
        }
      }
      check(worst <= 1, "bound, %s %s, %" PRId64 " tokens, %" PRId64 " x %" PRId64 ": %g times the bound",
            kernel.name().c_str(), mode.name, size.tokens, weight.out_features, weight.in_features, worst);
    }
  }
}

// inf and NaN in x at a dropped position do not reach y; at a kept one they do, even times 0.
void dropped_positions_take_no_part(const Mode& mode) {
  const int64_t tokens = 26, column = 9;
  const Weight weight = make_weight(mode, 19, 64, Numbers::kIntegers, 5);
  Random random(4);
  Rows x(mode.tokens, tokens, 64);
  x.fill([&] { return random.integer(); });
  const Reference exact = reference(weight, x, nullptr, tokens);
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    for (int64_t t = 0; t < tokens; ++t) x.set(t, column, bad);
    for (const Kernel& kernel : kernels()) {
      Rows y(mode.tokens, tokens, 19);
      run(kernel, mode, weight, x, nullptr, y, 1);
      check_equal("dropped", kernel, mode, weight, y, [&](int64_t t, int64_t row) {
        const int64_t j = weight.value_at(row, column);
        return j < 0 ? rounded(mode.tokens, exact.at(t, row)) : bad * weight.values.get(row, j);
      });
    }
  }
}

// A NaN or an infinity among the values damages its row and no other.
void bad_values_stay_in_their_row(const Mode& mode) {
  Weight weight = make_weight(mode, 33, 32, Numbers::kIntegers);
  weight.values.set(3, 5, NAN);
  weight.values.set(17, 0, INFINITY);
  weight.values.set(32, 15, -INFINITY);
  weight.pack();
  Random random(5);
  Rows x(mode.tokens, 21, 32);
  x.fill([&] { return std::fabs(random.integer()) + 1; });
  const Reference exact = reference(weight, x, nullptr, 21);
  for (const Kernel& kernel : kernels()) {
    Rows y(mode.tokens, 21, 33);
    run(kernel, mode, weight, x, nullptr, y, 1);
    check_equal("bad values", kernel, mode, weight, y,
                [&](int64_t t, int64_t row) { return rounded(mode.tokens, exact.at(t, row)); });
  }
}

// Each of the 256 numbers of float8, in every place of a cell: token t sees column t alone. NaN damages its row.
void every_float8_is_itself(const Mode& mode) {
  if (&mode.weight != &kE4m3) return;
  constexpr int64_t kRows = 272, kColumns = 64;
  Weight weight = make_weight(mode, kRows, kColumns, Numbers::kIntegers);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t j = 0; j < kColumns / 2; ++j) {
      const uint8_t bits = static_cast<uint8_t>(row < 256 ? row + 16 * (j % 16) : 255);  // rows 256 on: NaN
      const uint8_t item = row < 256 && bits % 128 == 127 ? 0 : bits;
      std::memcpy(weight.values.data() + row * kColumns / 2 + j, &item, 1);
    }
  }
  weight.pack();
  Rows x(mode.tokens, kColumns, kColumns);
  x.fill([] { return 0; });
  for (int64_t t = 0; t < kColumns; ++t) x.set(t, t, 1);
  for (const Kernel& kernel : kernels()) {
    Rows y(mode.tokens, kColumns, kRows);
    run(kernel, mode, weight, x, nullptr, y, 1);
    check_equal("every float8", kernel, mode, weight, y, [&](int64_t t, int64_t row) {
      const int64_t j = weight.value_at(row, t);
      return row >= 256 ? NAN : j < 0 ? 0.0 : weight.values.get(row, j) * weight.scale(row);
    });
  }
}

// The bias alone reaches y: ties, carries into the exponent, the largest float, subnormals, both zeros, NaN.
void rounding_is_to_nearest_even(const Mode& mode) {
  constexpr uint32_t kBits[] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f7fffff, 0x7f7fffff, 0x00000001, 0x00018000,
                                0x807fffff, 0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffffffff};
  constexpr int64_t kCount = sizeof kBits / sizeof kBits[0];
  Weight weight = make_weight(mode, kCount, 8, Numbers::kIntegers);
  weight.values.fill([] { return 0; });
  weight.pack();
  Rows x(mode.tokens, 5, 8), bias(kFp32, 1, kCount);
  x.fill([] { return 0; });
  std::memcpy(bias.data(), kBits, sizeof kBits);
  for (const Kernel& kernel : kernels()) {
    Rows y(mode.tokens, 5, kCount);
    run(kernel, mode, weight, x, &bias, y, 1);
    for (int64_t row = 0; row < kCount; ++row) {
      char expected[8];
      mode.tokens.write(expected, bias.get(0, row) + 0.0);  // 0 + -0 = +0
      for (int64_t t = 0; t < 5; ++t) {
        const bool nan = std::isnan(bias.get(0, row)) && std::isnan(y.get(t, row));
        check(nan || std::memcmp(y.at(t, row), expected, static_cast<size_t>(mode.tokens.size)) == 0,
              "rounding, %s %s: %08" PRIx32 " becomes %a", kernel.name().c_str(), mode.name, kBits[row], y.get(t, row));
      }
    }
  }
}

// ReLU and a residual keep integers exact: any token, row or stride that is taken for another shows.
void epilogues_agree_exactly(const Mode& mode) {
  int number = 0;
  for (const Shape& shape : kShapes) {
    const Weight weight = make_weight(mode, shape.out_features, shape.in_features, Numbers::kIntegers);
    Random random(11);
    Rows x(mode.tokens, 97, shape.in_features), bias(kFp32, 1, shape.out_features);
    Rows residual(mode.tokens, 97, shape.out_features, number % 2 == 0 ? 0 : 5);
    for (Rows* rows : {&x, &bias, &residual}) rows->fill([&] { return random.integer(); });
    const Rows* with = number % 3 != 0 ? &bias : nullptr;
    const Reference exact = reference(weight, x, with, x.rows());
    for (const int64_t tokens : {1, 3, 4, 7, 8, 17, 33, 49, 97}) {
      // What follows the sums does not know what the weights were: some counts suffice for those that are widened.
      if (mode.weight.size == 1 && tokens != 1 && tokens != 7 && tokens != 33 && tokens != 97) continue;
      for (const Kernel& kernel : kernels()) {
        for (const bool relu : {false, true}) {
          for (const bool adds : {false, true}) {
            if (!relu && !adds) continue;  // integers_agree_exactly
            Rows y(mode.tokens, tokens, shape.out_features, relu == adds ? gap_to_4_kib(mode.tokens, shape.out_features) : 0);
            const Epilogue epilogue = {relu ? cpu::Activation::kRelu : cpu::Activation::kNone, adds ? &residual : nullptr};
            run(kernel, mode, weight, x, with, y, 1 + number % 2, epilogue);
            check_equal(relu ? "relu" : "residual", kernel, mode, weight, y, [&](int64_t t, int64_t row) {
              const double sum = relu ? relu_of(exact.at(t, row)) : exact.at(t, row);
              return rounded(mode.tokens, sum + (adds ? residual.get(t, row) : 0));
            });
          }
        }
      }
    }
    ++number;
  }
}

// The bias alone reaches the functions: numbers of every size, both infinities, NaN. The bits are the same for every
// token and family.
void functions_stay_in_bound(const Mode& mode) {
  constexpr int64_t kCount = 6007;
  Weight weight = make_weight(mode, kCount, 4, Numbers::kIntegers);
  weight.values.fill([] { return 0; });
  weight.pack();
  Random random(12);
  Rows x(mode.tokens, 21, 4), bias(kFp32, 1, kCount);
  x.fill([] { return 0; });
  for (int64_t i = 0; i < kCount; ++i) {
    const double wide = random.real();
    bias.set(0, i, i % 4 == 0 ? 3 * wide : i % 4 == 1 ? 16 * wide : i % 4 == 2 ? 112 * wide : 0);
    if (i % 4 == 3) {
      const uint32_t bits = static_cast<uint32_t>(random.next() >> 32);
      std::memcpy(bias.data() + i * 4, &bits, 4);
    }
  }
  constexpr double kSpecial[] = {0, -0.0, INFINITY, -INFINITY, NAN, 0x1p-149, -0x1p-149, 0x1.fffffep127, -0x1.fffffep127,
                                 12.75, -12.75, 12.7499, -12.7499, 87, -87, 86.9999, -86.9999, 1e20, -1e20};
  for (size_t i = 0; i < sizeof kSpecial / sizeof kSpecial[0]; ++i) bias.set(0, 31 + static_cast<int64_t>(i), kSpecial[i]);
  for (const Function& function : kFunctions) {
    for (int i = 0; i < cpu::isa_count(); ++i) {
      Rows few(mode.tokens, 5, kCount), many(mode.tokens, 21, kCount);
      run({cpu::isa_name(i), cpu::Family::kFew}, mode, weight, x, &bias, few, 1, {function.code, nullptr});
      run({cpu::isa_name(i), cpu::Family::kMany}, mode, weight, x, &bias, many, 1, {function.code, nullptr});
      bool same = true;
      const size_t row_bytes = static_cast<size_t>(kCount * mode.tokens.size);
      for (int64_t t = 0; t < 21; ++t) same &= std::memcmp(many.at(t, 0), few.at(t % 5, 0), row_bytes) == 0;
      check(same, "%s, %s %s: the bits depend on the token", function.name, cpu::isa_name(i), mode.name);
      for (int64_t row = 0; row < kCount; ++row) {
        const double input = bias.get(0, row) + 0.0, exact = function.of(input), is = few.get(0, row);
        const double error = function_error(mode.tokens, function.condition(input));
        const double bound = (mode.tokens.unit * 1.001 + error) * std::fabs(exact) +
                             std::fabs(input) * 0x1p-122 + mode.tokens.unit * 0x1p-126 + 0x1p-149;
        const double written = rounded(mode.tokens, exact);
        const bool holds = std::isfinite(written) ? std::fabs(is - exact) <= bound
                                                  : is == written || (std::isnan(is) && std::isnan(written));
        check(holds, "%s, %s %s: of %a is %a, not %a", function.name, cpu::isa_name(i), mode.name, input, is, exact);
      }
    }
  }
}

// The error of the sums passes through a function at most 1.13 times as large; the residual is added before rounding.
void finished_reals_stay_in_bound(const Mode& mode) {
  const int64_t tokens = 37;
  const Weight weight = make_weight(mode, 50, 260, Numbers::kReals);
  Random random(13);
  Rows x(mode.tokens, tokens, 260), bias(kFp32, 1, 50), residual(mode.tokens, tokens, 50, 3);
  for (Rows* rows : {&x, &bias, &residual}) rows->fill([&] { return random.real(); });
  const Reference exact = reference(weight, x, &bias, tokens);
  for (const Function& function : kFunctions) {
    for (const Kernel& kernel : kernels()) {
      Rows y(mode.tokens, tokens, 50);
      run(kernel, mode, weight, x, &bias, y, 2, {function.code, &residual});
      double worst = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < 50; ++row) {
          const double sum = exact.at(t, row), value = function.of(sum), should = value + residual.get(t, row);
          const double before = 2 * 131 * 0x1p-24 * exact.magnitude_at(t, row) + 131 * 0x1p-126;
          const double bound = mode.tokens.unit * std::fabs(should) * 1.01 + 1.13 * before + 0x1p-24 * std::fabs(should) +
                               function_error(mode.tokens, function.condition(sum)) * std::fabs(value) + 0x1p-126;
          const double error = std::fabs(y.get(t, row) - should) / bound;
          worst = error <= worst ? worst : error;
        }
      }
      check(worst <= 1, "finished, %s, %s %s: %g times the bound", function.name, kernel.name().c_str(), mode.name, worst);
    }
  }
}

// Damaged metadata gives some number, never a read outside the buffers: every byte value in every place.
void any_nibble_stays_inside(const Mode& mode) {
  Weight weight = make_weight(mode, 16, 256, Numbers::kIntegers);
  weight.values.fill([] { return 1; });
  for (size_t i = 0; i < weight.metadata.size(); ++i) weight.metadata[i] = static_cast<uint8_t>(i);
  weight.pack();
  for (const int64_t tokens : {1, 20, 97}) {
    Rows x(mode.tokens, tokens, 256);
    x.fill([] { return 1; });
    for (const Kernel& kernel : kernels()) {
      Rows y(mode.tokens, tokens, 16);
      run(kernel, mode, weight, x, nullptr, y, 1);
      check_equal("any nibble", kernel, mode, weight, y, [&](int64_t, int64_t row) { return 128 * weight.scale(row); });
    }
  }
}

// Rows apart with NaN between them, everything one element off any alignment, pages without access on either side:
// nothing outside the tensors is read, and what lies around the rows of y keeps its bytes.
void nothing_outside_is_touched(const Mode& mode) {
  struct {
    int64_t tokens;
    Shape shape;
  } const sizes[] = {{1, {1, 4}},    {3, {17, 12}},  {5, {17, 12}},  {8, {16, 64}},   {17, {15, 36}},
                     {25, {16, 60}}, {33, {31, 68}}, {97, {33, 100}}, {49, {50, 264}}, {9, {68, 12}},  {50, {132, 20}}};
  for (const auto& size : sizes) {
    const auto [out_features, in_features] = size.shape;
    Weight weight = make_weight(mode, out_features, in_features, Numbers::kIntegers, 6);
    const Memory& values = weight.packed_values;
    const Memory& metadata = weight.packed_metadata;
    for (int variant = 0; variant < 4; ++variant) {
      const auto place = variant % 2 == 0 ? Memory::Place::kEnd : Memory::Place::kBegin;
      const int skipped = variant / 2;
      const int64_t gap = 3 * skipped;
      Random random(7);
      Rows x(mode.tokens, size.tokens, in_features, gap, skipped, place), bias(kFp32, 1, out_features, 0, skipped, place);
      x.fill([&] { return random.integer(); });
      bias.fill([&] { return random.integer(); });
      // The packed weights once more, at the same kind of place.
      Weight placed = make_weight(mode, out_features, in_features, Numbers::kIntegers, 6);
      const size_t shift = static_cast<size_t>(skipped * mode.weight.size);
      placed.packed_values = Memory(values.size() + 2 * shift, place);
      placed.packed_metadata = Memory(metadata.size() + 2 * static_cast<size_t>(skipped), place);
      std::memset(placed.packed_values.data(), 0xff, placed.packed_values.size());
      std::memcpy(placed.packed_values.data() + shift, values.data(), values.size());
      std::memcpy(placed.packed_metadata.data() + skipped, metadata.data(), metadata.size());
      if (mode.ordered) {
        placed.order = Memory(weight.rows_in_order.size() + static_cast<size_t>(2 * skipped), place);
        std::memset(placed.order.data(), 0xff, placed.order.size());
        std::memcpy(placed.order.data() + skipped, weight.rows_in_order.data(), weight.rows_in_order.size());
      }
      Rows scales(kFp32, weight.scales.rows(), out_features, 0, skipped, place);
      for (int64_t row = 0; scales.rows() != 0 && row < out_features; ++row) scales.set(0, row, weight.scale(row));
      const Reference exact = reference(weight, x, &bias, size.tokens);
      for (const Kernel& kernel : kernels()) {
        const Rows untouched(mode.tokens, size.tokens, out_features, gap, skipped, place, -99);
        Rows y(mode.tokens, size.tokens, out_features, gap, skipped, place, -99);
        cpu::LinearArgs args = {x.data(),
                                placed.packed_values.data() + shift,
                                reinterpret_cast<const uint8_t*>(placed.packed_metadata.data()) + skipped,
                                nullptr,
                                y.data(),
                                size.tokens,
                                out_features,
                                in_features,
                                x.stride(),
                                y.stride(),
                                mode.shared};
        args.order = mode.ordered ? placed.order_data() + skipped : nullptr;
        args.scales = scales.rows() == 0 ? nullptr : reinterpret_cast<const float*>(scales.data());
        const std::string ran = cpu::linear(args, mode.code, bias.data(), cpu::DType::kFp32, 2, kernel.isa.c_str(),
                                            kernel.family);
        check(ran == kernel.name(), "asked for %s, ran %s", kernel.name().c_str(), ran.c_str());
        check_equal("outside", kernel, mode, weight, y,
                    [&](int64_t t, int64_t row) { return rounded(mode.tokens, exact.at(t, row)); });
        check(y.same_around(untouched), "outside, %s %s, %" PRId64 " tokens, %" PRId64 " x %" PRId64 ": wrote around y",
              kernel.name().c_str(), mode.name, size.tokens, out_features, in_features);

        Rows residual(mode.tokens, size.tokens, out_features, 2 * gap, skipped, place);
        residual.fill([&] { return random.integer(); });
        Rows finished(mode.tokens, size.tokens, out_features, gap, skipped, place, -99);
        args.y = finished.data();
        args.activation = cpu::Activation::kRelu;
        args.residual = residual.data();
        args.residual_stride = residual.stride();
        cpu::linear(args, mode.code, bias.data(), cpu::DType::kFp32, 2, kernel.isa.c_str(), kernel.family);
        check_equal("outside, relu", kernel, mode, weight, finished, [&](int64_t t, int64_t row) {
          return rounded(mode.tokens, relu_of(exact.at(t, row)) + residual.get(t, row));
        });
        check(finished.same_around(untouched), "outside, relu, %s %s: wrote around y", kernel.name().c_str(), mode.name);
      }
    }
  }
}

void bits_do_not_depend_on_threads(const Mode& mode) {
  struct {
    int64_t tokens;
    Shape shape;
  } const sizes[] = {{1, {1100, 516}}, {7, {300, 260}}, {50, {200, 140}}, {130, {40, 140}}};  // all beyond kAlone
  for (const auto& size : sizes) {
    const Weight weight = make_weight(mode, size.shape.out_features, size.shape.in_features, Numbers::kReals);
    Random random(8);
    Rows x(mode.tokens, size.tokens, weight.in_features);
    x.fill([&] { return random.real(); });
    for (const Kernel& kernel : kernels()) {
      Rows alone(mode.tokens, size.tokens, weight.out_features);
      run(kernel, mode, weight, x, nullptr, alone, 1);
      for (const int threads : {2, 3}) {
        Rows y(mode.tokens, size.tokens, weight.out_features);
        run(kernel, mode, weight, x, nullptr, y, threads);
        check(y.same_bytes(alone), "threads, %s %s, %" PRId64 " tokens: %d threads give other bits than 1",
              kernel.name().c_str(), mode.name, size.tokens, threads);
      }
      // Nor on the distance of the rows of y, which decides how many are written at once.
      const int64_t gap = gap_to_4_kib(mode.tokens, weight.out_features);
      for (const Function& function : kFunctions) {
        Rows finished(mode.tokens, size.tokens, weight.out_features);
        Rows again(mode.tokens, size.tokens, weight.out_features, gap);
        run(kernel, mode, weight, x, nullptr, finished, 1, {function.code, &alone});
        run(kernel, mode, weight, x, nullptr, again, 3, {function.code, &alone});
        int64_t others = 0;
        for (int64_t t = 0; t < size.tokens; ++t) {
          const auto bytes = static_cast<size_t>(weight.out_features * mode.tokens.size);
          others += std::memcmp(again.at(t, 0), finished.at(t, 0), bytes) != 0;
        }
        check(others == 0, "threads, %s, %s %s: 3 threads and rows apart give other bits than 1 in %" PRId64 " tokens",
              function.name, kernel.name().c_str(), mode.name, others);
      }
    }
  }
}

// The pool serves one caller; the others work alone meanwhile, with the same result.
void several_callers_at_once(const Mode& mode) {
  const Weight weight = make_weight(mode, 400, 260, Numbers::kIntegers);
  Random random(9);
  Rows x(mode.tokens, 24, 260);
  x.fill([&] { return random.integer(); });
  const Reference exact = reference(weight, x, nullptr, 24);
  for (const Kernel& kernel : kernels()) {
    std::vector<Rows> results;
    for (int i = 0; i < 4; ++i) results.emplace_back(mode.tokens, 6 + 6 * i, 400);
    std::vector<std::thread> callers;
    for (Rows& y : results) {
      callers.emplace_back([&] { call(kernel.isa.c_str(), kernel.family, mode, weight, x, nullptr, y, 3); });
    }
    for (std::thread& caller : callers) caller.join();
    for (const Rows& y : results) {
      check_equal("callers", kernel, mode, weight, y,
                  [&](int64_t t, int64_t row) { return rounded(mode.tokens, exact.at(t, row)); });
    }
  }
}

// Unless told otherwise, one token takes the few-token kernel, hundreds the other, and no tokens touch nothing.
void family_follows_the_number_of_tokens(const Mode& mode) {
  const Weight weight = make_weight(mode, 20, 32, Numbers::kIntegers);
  Random random(10);
  Rows x(mode.tokens, 512, 32);
  x.fill([&] { return random.integer(); });
  const Reference exact = reference(weight, x, nullptr, 512);
  for (int i = 0; i < cpu::isa_count(); ++i) {
    const std::string isa = cpu::isa_name(i);
    for (const int64_t tokens : {0, 1, 512}) {
      Rows y(mode.tokens, tokens, 20);
      const std::string ran = call(isa.c_str(), cpu::Family::kAuto, mode, weight, x, nullptr, y, 2);
      const Kernel expected = {isa, tokens > 1 ? cpu::Family::kMany : cpu::Family::kFew};
      check(ran == expected.name(), "%" PRId64 " tokens ran %s", tokens, ran.c_str());
      check_equal("auto", expected, mode, weight, y,
                  [&](int64_t t, int64_t row) { return rounded(mode.tokens, exact.at(t, row)); });
    }
  }
}

// The CPU layout, written down a second time from the drawing in nm/layout.h; and back, bit for bit.
void packing_is_the_layout(const Mode& mode) {
  const int size = mode.weight.size;
  for (const Shape& shape : {Shape{1, 4}, Shape{16, 8}, Shape{17, 12}, Shape{31, 100}, Shape{48, 36}, Shape{70, 20}, Shape{132, 8}}) {
    Weight weight = make_weight(mode, shape.out_features, shape.in_features, Numbers::kReals);
    // A signalling NaN and a negative zero must keep their bits.
    const uint32_t special[] = {0x7f800001u, 0x80000000u};
    const uint16_t special16[] = {0x7f81u, 0x8000u};
    const uint8_t special8[] = {0xffu, 0x80u};
    const void* const specials = size == 4   ? static_cast<const void*>(special)
                                 : size == 2 ? static_cast<const void*>(special16)
                                             : special8;
    std::memcpy(weight.values.data(), specials, static_cast<size_t>(2 * size));
    weight.pack();
    const int64_t groups = shape.in_features / 4, metadata_row = nm::metadata_row_bytes(shape.in_features);
    bool right = true;
    const auto row_at = [&](int64_t place) {
      return mode.ordered ? place / 64 * 64 + weight.rows_in_order[static_cast<size_t>(place)] : place;
    };
    for (int64_t place = 0; place < nm::tiles_of(shape.out_features) * 16; ++place) {
      const int64_t row = row_at(place);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t cell = place / 16 * groups + group, r = place % 16;
        const bool padding = place >= shape.out_features;
        for (int64_t kept = 0; kept < 2; ++kept) {
          const int64_t slot = cell * 32 + (size == 4 ? kept * 16 + r : r * 2 + kept);
          const char zero[4] = {};
          const char* from = padding ? zero : weight.values.at(row, 2 * group + kept);
          right &= std::memcmp(weight.packed_values.data() + slot * size, from, static_cast<size_t>(size)) == 0;
        }
        const auto* bytes = reinterpret_cast<const uint8_t*>(weight.packed_metadata.data()) + cell * 8 / mode.shared;
        const int64_t first_place = place / mode.shared * mode.shared;  // whose nibble is stored
        const int64_t first = row_at(first_place);
        const unsigned nibble = first_place >= shape.out_features
                                    ? 4u
                                    : weight.metadata[static_cast<size_t>(first * metadata_row + group / 2)] >>
                                              (group % 2 * 4) & 15u;
        const unsigned stored = mode.shared == 1   ? bytes[r % 2 * 4 + r / 4] >> (r / 2 % 2 * 4)
                                : mode.shared == 2 ? bytes[r / 4] >> (r / 2 % 2 * 4)
                                                   : bytes[r / 8] >> (r / 4 % 2 * 4);
        right &= (stored & 15u) == nibble;
      }
    }
    check(right, "packing, %s, %" PRId64 " x %" PRId64, mode.name, shape.out_features, shape.in_features);

    Rows values(mode.weight, shape.out_features, shape.in_features / 2);
    Memory metadata(weight.metadata.size());
    cpu::unpack_linear(weight.packed_values.data(), reinterpret_cast<const uint8_t*>(weight.packed_metadata.data()),
                       values.data(), reinterpret_cast<uint8_t*>(metadata.data()), shape.out_features,
                       shape.in_features, size, mode.shared, weight.order_data());
    check(values.same_bytes(weight.values) &&
              std::memcmp(metadata.data(), weight.metadata.data(), weight.metadata.size()) == 0,
          "unpacking, %s, %" PRId64 " x %" PRId64, mode.name, shape.out_features, shape.in_features);
  }
}

// Rows with equal masks become neighbours, each in its window; where a window does not allow it, no order is found.
void orders_are_found(const Mode& mode) {
  for (const int64_t out_features : {4, 60, 64, 68, 132, 256}) {
    constexpr int64_t kInFeatures = 92;
    Weight weight = make_weight(mode, out_features, kInFeatures, Numbers::kIntegers, 11);
    const size_t row_bytes = static_cast<size_t>(nm::metadata_row_bytes(kInFeatures));
    const auto mask_of = [&](int64_t row) { return weight.metadata.data() + static_cast<size_t>(row) * row_bytes; };
    Memory memory(static_cast<size_t>(nm::tiles_of(out_features) * 16));
    auto* const order = reinterpret_cast<uint8_t*>(memory.data());
    bool right = cpu::order_rows(weight.metadata.data(), out_features, kInFeatures, mode.shared, order);
    check(right, "orders, %s, %" PRId64 " rows: none was found", mode.name, out_features);
    std::vector<int> seen(memory.size());
    for (int64_t place = 0; place < static_cast<int64_t>(memory.size()); ++place) {
      const int64_t row = place / 64 * 64 + order[place];
      right &= order[place] < 64 && row < static_cast<int64_t>(memory.size()) && ++seen[static_cast<size_t>(row)] == 1;
      if (place >= out_features || !mode.ordered) right &= row == place;
      if (!right || place >= out_features) continue;
      const int64_t first = place / mode.shared * mode.shared, first_row = first / 64 * 64 + order[first];
      right &= std::memcmp(mask_of(row), mask_of(first_row), row_bytes) == 0;
    }
    check(right, "orders, %s, %" PRId64 " rows: a wrong one was found", mode.name, out_features);
    std::memset(weight.metadata.data() + static_cast<size_t>(out_features - 1) * row_bytes, 0xe4, row_bytes);
    check(cpu::order_rows(weight.metadata.data(), out_features, kInFeatures, mode.shared, order) == (mode.shared == 1),
          "orders, %s, %" PRId64 " rows: one was found where a row is alone", mode.name, out_features);
  }
}

void names_are_checked(const Mode& mode) {
  const Weight weight = make_weight(mode, 16, 4, Numbers::kIntegers);
  Rows x(mode.tokens, 1, 4), y(mode.tokens, 1, 16);
  const auto message_of = [&](const char* isa) -> std::string {
    try {
      call(isa, cpu::Family::kAuto, mode, weight, x, nullptr, y, 1);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  check(message_of("sse9").find("instruction set 'sse9' is unknown; this build has: baseline") == 0, "%s",
        message_of("sse9").c_str());
  for (const char* name : {"avx2", "avx512", "avx512bf16", "neon", "neonbf16"}) {
    bool here = false;
    for (int i = 0; i < cpu::isa_count(); ++i) here |= std::string(cpu::isa_name(i)) == name;
    const std::string expected = std::string("instruction set '") + name + "' does not run on this machine; it has: ";
    if (!here) check(message_of(name).find(expected) == 0, "%s", message_of(name).c_str());
  }
}

constexpr Test<Mode> kTests[] = {
    {"packing is the layout", packing_is_the_layout},
    {"orders are found", orders_are_found},
    {"names of instruction sets are checked", names_are_checked},
    {"integers agree exactly", integers_agree_exactly},
    {"large integers agree exactly", large_integers_agree_exactly},
    {"reals stay in bound", reals_stay_in_bound},
    {"dropped positions take no part", dropped_positions_take_no_part},
    {"bad values stay in their row", bad_values_stay_in_their_row},
    {"every float8 is itself", every_float8_is_itself},
    {"rounding is to nearest even", rounding_is_to_nearest_even},
    {"epilogues agree exactly", epilogues_agree_exactly},
    {"functions stay in bound", functions_stay_in_bound},
    {"finished reals stay in bound", finished_reals_stay_in_bound},
    {"any nibble stays inside the buffers", any_nibble_stays_inside},
    {"nothing outside the tensors is touched", nothing_outside_is_touched},
    {"bits do not depend on threads", bits_do_not_depend_on_threads},
    {"several callers at once", several_callers_at_once},
    {"family follows the number of tokens", family_follows_the_number_of_tokens},
};

}  // namespace
}  // namespace twofour::test

int main(int argc, char** argv) {
  using namespace twofour;
  return test::run_tests(test::kTests, test::kModes, cpu::isa_count(), cpu::isa_name, cpu::threads_source(), argc,
                         argv);
}
