// The int8 linear kernels without Python: every instruction set of this build that runs here, both families, fp32 and
// bf16, against a plain loop over the canonical format.
//
//   int8_test [--require NAME]... [--only TEXT]     as linear_test
//
// The loop follows the formula in cpu/linear_int8.h, where each operation is one rounding in a stated order: bits are
// equal, for real numbers too. This file is compiled with -ffp-contract=off.
#include <cfloat>
#include <stdexcept>
#include <thread>

#include "cpu/linear_int8.h"
#include "cpu/threads.h"
#include "activations.h"
#include "support.h"

namespace twofour::test {
namespace {

struct Mode {
  const char* name;
  cpu::DType code;
  const Type& tokens;  // x and y
};
constexpr Mode kModes[] = {{"fp32", cpu::DType::kFp32, kFp32}, {"bf16", cpu::DType::kBf16, kBf16}};

constexpr int64_t kMostFew = 8;  // tokens that the family of few takes, of every instruction set

struct Kernel {
  std::string isa;
  cpu::Family family;

  std::string name() const { return isa + (family == cpu::Family::kFew ? "/int8-few" : "/int8-many"); }
};

// Those that take so many tokens.
std::vector<Kernel> kernels(int64_t tokens) {
  std::vector<Kernel> all;
  for (int i = 0; i < cpu::int8_isa_count(); ++i) {
    if (tokens <= kMostFew) all.push_back({cpu::int8_isa_name(i), cpu::Family::kFew});
    all.push_back({cpu::int8_isa_name(i), cpu::Family::kMany});
  }
  return all;
}

// ---- weights, the reference, the call ------------------------------------------------------------------------------

const uint8_t* bytes_of(const Memory& memory) { return reinterpret_cast<const uint8_t*>(memory.data()); }
const int8_t* values_of(const Memory& memory) { return reinterpret_cast<const int8_t*>(memory.data()); }

// A matrix in the canonical format and in the int8 layout.
struct Weight {
  int64_t out_features, in_features;
  std::vector<int8_t> values;  // [out, in / 2]
  Mask mask;
  Rows scales;                 // [1, out]
  Memory packed_values, packed_metadata;

  int64_t steps() const { return (in_features + 7) / 8; }
  void pack() {
    const int64_t rows = (out_features + 15) / 16 * 16;
    packed_values = Memory(static_cast<size_t>(rows * steps() * 4));
    packed_metadata = Memory(static_cast<size_t>(rows * ((steps() + 3) / 4) * 4));
    cpu::pack_linear_int8(values.data(), mask.metadata.data(), reinterpret_cast<int8_t*>(packed_values.data()),
                          reinterpret_cast<uint8_t*>(packed_metadata.data()), out_features, in_features);
  }
};

Weight make_weight(int64_t out_features, int64_t in_features) {
  Random random(static_cast<uint64_t>(out_features * 4099 + in_features));
  Weight weight{out_features, in_features, {}, {}, Rows(kFp32, 1, out_features), {}, {}};
  weight.values.resize(static_cast<size_t>(out_features * in_features / 2));
  for (int8_t& value : weight.values) {
    const int drawn = random.below(288) - 144;  // one in nine is an extreme
    value = static_cast<int8_t>(std::max(-128, std::min(127, drawn)));
  }
  weight.mask = random_mask(random, out_features, in_features);
  weight.scales.fill([&] { return random.real() * 0x1p-7; });
  weight.pack();
  return weight;
}

// One token as cpu/linear_int8.h quantizes it.
struct Quantized {
  std::vector<int32_t> q;
  float scale;
};

Quantized quantized(const Rows& x, int64_t token) {
  Quantized result{std::vector<int32_t>(static_cast<size_t>(x.columns())), 0.0f};
  bool finite = true;
  float largest = 0.0f;
  for (int64_t k = 0; k < x.columns(); ++k) {
    const float value = static_cast<float>(x.get(token, k));
    finite &= std::isfinite(value);
    largest = std::max(largest, std::fabs(value));
  }
  if (!finite) {
    result.scale = NAN;
  } else if (largest >= 0x1p-119f) {
    result.scale = largest / 127.0f;
    const float factor = 127.0f / largest;
    for (int64_t k = 0; k < x.columns(); ++k) {
      const float scaled = static_cast<float>(x.get(token, k)) * factor;
      result.q[static_cast<size_t>(k)] = static_cast<int32_t>(std::nearbyint(scaled));
    }
  }
  return result;
}

// y of all tokens of x.
Rows reference(const Weight& weight, const Rows& x, const Rows* bias) {
  const int64_t kept = weight.in_features / 2;
  Rows y(x.type(), x.rows(), weight.out_features);
  for (int64_t t = 0; t < x.rows(); ++t) {
    const Quantized token = quantized(x, t);
    for (int64_t row = 0; row < weight.out_features; ++row) {
      int32_t sum = 0;
      for (int64_t j = row * kept; j < (row + 1) * kept; ++j) {
        const auto at = static_cast<size_t>(j);
        sum += token.q[static_cast<size_t>(weight.mask.columns[at])] * weight.values[at];
      }
      float value = static_cast<float>(sum) * token.scale;
      value = value * static_cast<float>(weight.scales.get(0, row));
      if (bias != nullptr) value = value + static_cast<float>(bias->get(0, row));
      y.set(t, row, value);
    }
  }
  return y;
}

// Runs y.rows() tokens and returns what ran.
std::string call(const char* isa, cpu::Family family, const Mode& mode, const Weight& weight, const Rows& x,
                 const Rows* bias, Rows& y, int threads, cpu::Activation activation = cpu::Activation::kNone) {
  const cpu::LinearInt8Args args = {
      x.data(),
      values_of(weight.packed_values),
      bytes_of(weight.packed_metadata),
      reinterpret_cast<const float*>(weight.scales.data()),
      bias != nullptr ? reinterpret_cast<const float*>(bias->data()) : nullptr,
      y.data(),
      mode.code,
      y.rows(),
      weight.out_features,
      weight.in_features,
      x.stride(),
      y.stride(),
      activation};
  return cpu::linear_int8(args, threads, isa, family);
}

// The first y.rows() tokens have the bits that `expected` has; a NaN is as good as another.
void check_same(const char* test, const std::string& kernel, const Mode& mode, const Weight& weight, const Rows& y,
                const Rows& expected) {
  for (int64_t token = 0; token < y.rows(); ++token) {
    for (int64_t row = 0; row < y.columns(); ++row) {
      const bool nan = std::isnan(y.get(token, row)) && std::isnan(expected.get(token, row));
      const auto size = static_cast<size_t>(mode.tokens.size);
      if (nan || std::memcmp(y.at(token, row), expected.at(token, row), size) == 0) continue;
      check(false, "%s, %s %s, %" PRId64 " tokens, %" PRId64 " x %" PRId64 ": y[%" PRId64 ", %" PRId64 "] = %a, not %a",
            test, kernel.c_str(), mode.name, y.rows(), weight.out_features, weight.in_features, token, row,
            y.get(token, row), expected.get(token, row));
      return;
    }
  }
  check(true, "%s", test);
}

// Runs the kernel asked for, and no other, on the first `tokens` of x.
Rows run(const char* test, const Kernel& kernel, const Mode& mode, const Weight& weight, const Rows& x,
         const Rows* bias, int64_t tokens, int threads, const Rows& expected) {
  Rows y(mode.tokens, tokens, weight.out_features);
  const std::string ran = call(kernel.isa.c_str(), kernel.family, mode, weight, x, bias, y, threads);
  check(ran == kernel.name(), "asked for %s, ran %s", kernel.name().c_str(), ran.c_str());
  check_same(test, kernel.name(), mode, weight, y, expected);
  return y;
}

// Real tokens of all sizes, and among them some that are zero, below what counts, or not finite in one place, which may
// be a dropped one. `first` shifts which.
void fill_tokens(Rows& x, Random& random, int first = 0) {
  for (int64_t t = 0; t < x.rows(); ++t) {
    const int kind = static_cast<int>((first + t) % 11);
    const double size = kind == 1   ? 0x1p-119  // below it, but for the token that has it once
                        : kind == 4 ? 0
                        : kind == 7 ? 0x1p-140
                                    : std::ldexp(1.0, random.below(200) - 100);
    for (int64_t k = 0; k < x.columns(); ++k) x.set(t, k, size * random.real());
    const int64_t somewhere = random.below(static_cast<int>(x.columns()));
    if (kind == 1 && t % 2 == 1) x.set(t, somewhere, -0x1p-119);
    if (kind == 3) x.set(t, somewhere, t % 2 == 0 ? NAN : -NAN);
    if (kind == 6) x.set(t, somewhere, t % 2 == 0 ? INFINITY : -INFINITY);
    if (kind == 9) x.set(t, x.columns() - 1, FLT_MAX * 0.99);
  }
}

// ---- the tests -----------------------------------------------------------------------------------------------------

// The int8 layout, written down a second time from the drawing in cpu/linear_int8.h; and back, bit for bit.
void packing_is_the_layout(const Mode&) {
  for (const int64_t out_features : {1, 15, 16, 17, 33, 100}) {
    for (const int64_t in_features : {4, 8, 12, 28, 32, 36, 64, 68, 516}) {
      const Weight weight = make_weight(out_features, in_features);
      const int64_t kept = in_features / 2, steps = weight.steps(), quads = (steps + 3) / 4;
      bool right = true;
      for (int64_t row = 0; row < (out_features + 15) / 16 * 16; ++row) {
        const int64_t tile = row / 16, r = row % 16;
        for (int64_t step = 0; step < (steps + 3) / 4 * 4; ++step) {
          for (int64_t k = 0; k < 4; ++k) {
            const int64_t j = 4 * step + k;
            const bool there = row < out_features && j < kept;
            const auto at = static_cast<size_t>(there ? row * kept + j : 0);
            const int8_t value = there ? weight.values[at] : int8_t{0};
            const int64_t place = there ? weight.mask.columns[at] % 4 : 0;
            if (step < steps) {
              right &= values_of(weight.packed_values)[((tile * steps + step) * 16 + r) * 4 + k] == value;
            }
            const uint8_t byte = bytes_of(weight.packed_metadata)[((tile * quads + step / 4) * 16 + r) * 4 + k];
            right &= (byte >> step % 4 * 2 & 3) == place;
          }
        }
      }
      check(right, "packing, %" PRId64 " x %" PRId64, out_features, in_features);

      Memory values(weight.values.size()), metadata(weight.mask.metadata.size());
      cpu::unpack_linear_int8(values_of(weight.packed_values), bytes_of(weight.packed_metadata),
                              reinterpret_cast<int8_t*>(values.data()), reinterpret_cast<uint8_t*>(metadata.data()),
                              out_features, in_features);
      check(std::memcmp(values.data(), weight.values.data(), values.size()) == 0 &&
                std::memcmp(metadata.data(), weight.mask.metadata.data(), metadata.size()) == 0,
            "unpacking, %" PRId64 " x %" PRId64, out_features, in_features);
    }
  }
}

// Around the edges of a tile, of a step, of a quad and of a chunk (1024 inputs); of a block of tokens.
void sizes_agree(const Mode& mode) {
  int number = 0;
  for (const int64_t out_features : {1, 15, 16, 17, 33, 100}) {
    for (const int64_t in_features : {4, 8, 12, 32, 36, 68, 516, 1028}) {
      if (in_features > 1024 && out_features != 17) continue;
      const Weight weight = make_weight(out_features, in_features);
      Random random(1);
      Rows x(mode.tokens, 97, in_features, number % 2 == 0 ? 0 : 5), bias(kFp32, 1, out_features);
      fill_tokens(x, random, number);
      bias.fill([&] { return random.real(); });
      const Rows* with = number % 3 != 0 ? &bias : nullptr;
      const Rows expected = reference(weight, x, with);
      for (const int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 33, 97}) {
        for (const Kernel& kernel : kernels(tokens)) {
          run("sizes", kernel, mode, weight, x, with, tokens, 1 + number % 2, expected);
        }
      }
      ++number;
    }
  }
}

// Every column by itself: row r of W has a 1 in column r, so y is q times the scale of the token.
void quantization_rounds_to_even(const Mode& mode) {
  constexpr int64_t kSize = 264;
  Weight weight = make_weight(kSize, kSize);
  for (int64_t row = 0; row < kSize; ++row) {
    for (int64_t j = row * kSize / 2; j < (row + 1) * kSize / 2; ++j) {
      const auto at = static_cast<size_t>(j);
      const int64_t group = row / 4, other = row % 4 == 0 ? 1 : 0;
      const bool first = j % 2 == 0;
      if (j % (kSize / 2) / 2 == group) {  // keeps column `row` and another
        const int64_t i0 = std::min(row % 4, other), i1 = std::max(row % 4, other);
        weight.mask.columns[at] = 4 * group + (first ? i0 : i1);
        uint8_t& byte = weight.mask.metadata[static_cast<size_t>(row * nm::metadata_row_bytes(kSize) + group / 2)];
        byte = static_cast<uint8_t>((byte & 0xf0 >> 4 * (group % 2)) | (i0 | i1 << 2) << 4 * (group % 2));
      }
      weight.values[at] = weight.mask.columns[at] == row;
    }
  }
  weight.pack();
  weight.scales.fill([] { return 1; });
  Rows x(mode.tokens, 26, kSize);
  Random random(2);
  for (int64_t t = 0; t < x.rows(); ++t) {
    // The largest is 127 times a power of two: quarters stay quarters, and every second is halfway. Then other sizes.
    const double size = t < 10 ? std::ldexp(1.0, static_cast<int>(25 * t) - 118) : 1 + std::fabs(random.real());
    for (int64_t k = 0; k < kSize; ++k) x.set(t, k, size * (static_cast<double>(k) / 2 - 66 + (t % 2)) * 0.5);
    x.set(t, t * 7, t % 4 < 2 ? size * 127 : -size * 127);
  }
  for (const double largest : {0x1p-119, 0x1.fep-120, 0x1p-126, 0x1p-149, 0x1.fep127}) {
    const int64_t t = largest == 0x1p-119 ? 20 : largest == 0x1.fep-120 ? 21 : largest == 0x1p-126 ? 22
                      : largest == 0x1p-149 ? 23 : 24;
    for (int64_t k = 0; k < kSize; ++k) x.set(t, k, largest * random.real());
    x.set(t, 263, -largest);
  }
  const Rows expected = reference(weight, x, nullptr);
  for (const int64_t tokens : {8, 26}) {
    for (const Kernel& kernel : kernels(tokens)) {
      run("quantization", kernel, mode, weight, x, nullptr, tokens, 1, expected);
    }
  }
}

// Extremes that add up: the longest row that is allowed, all of one sign, comes within 1 % of the end of an int32.
void longest_rows_agree(const Mode& mode) {
  Weight weight = make_weight(4, cpu::kInt8MostInputs);
  for (size_t i = 0; i < weight.values.size(); ++i) {
    const size_t row = i / (weight.values.size() / 4);
    weight.values[i] = row < 2 ? int8_t{-128} : row == 2 ? int8_t{127} : weight.values[i];
  }
  weight.pack();
  Random random(3);
  Rows x(mode.tokens, 9, cpu::kInt8MostInputs);
  for (int64_t t = 0; t < x.rows(); ++t) {
    for (int64_t k = 0; k < x.columns(); ++k) x.set(t, k, t % 3 == 0 ? 1 : t % 3 == 1 ? -1 : random.real());
  }
  const Rows expected = reference(weight, x, nullptr);
  for (const int64_t tokens : {2, 9}) {
    for (const Kernel& kernel : kernels(tokens)) run("longest", kernel, mode, weight, x, nullptr, tokens, 1, expected);
  }
}

// More quantized inputs than are held at once: several slabs, each of several panels.
void several_slabs_agree(const Mode& mode) {
  const int64_t tokens = 150, in_features = 65536;
  const Weight weight = make_weight(17, in_features);
  Random random(4);
  Rows x(mode.tokens, tokens, in_features);
  fill_tokens(x, random);
  const Rows expected = reference(weight, x, nullptr);
  for (const Kernel& kernel : kernels(tokens)) run("slabs", kernel, mode, weight, x, nullptr, tokens, 2, expected);
}

// The bias alone reaches y: ties, carries into the exponent, the largest float, subnormals, both zeros, NaN.
void rounding_is_to_nearest_even(const Mode& mode) {
  constexpr uint32_t kBits[] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f7fffff, 0x7f7fffff, 0x00000001, 0x00018000,
                                0x807fffff, 0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffffffff,
                                0x7f800001, 0xbf808000, 0xbf818000, 0x80018000};
  constexpr int64_t kCount = sizeof kBits / sizeof kBits[0];
  Weight weight = make_weight(kCount, 8);
  std::fill(weight.values.begin(), weight.values.end(), int8_t{0});
  weight.pack();
  Rows x(mode.tokens, 9, 8), bias(kFp32, 1, kCount);
  x.fill([] { return 1; });
  std::memcpy(bias.data(), kBits, sizeof kBits);
  const Rows expected = reference(weight, x, &bias);
  for (const int64_t tokens : {5, 9}) {
    for (const Kernel& kernel : kernels(tokens)) run("rounding", kernel, mode, weight, x, &bias, tokens, 1, expected);
  }
}

// Damaged metadata takes other inputs of the same groups, never a byte outside the buffers: every byte in every place.
void any_metadata_stay_inside(const Mode& mode) {
  Weight weight = make_weight(30, 256);
  std::fill(weight.values.begin(), weight.values.end(), int8_t{-3});
  weight.pack();
  Rows x(mode.tokens, 33, 256), bias(kFp32, 1, 30);
  x.fill([] { return -2; });
  bias.fill([] { return 1; });
  const Rows expected = reference(weight, x, &bias);
  for (size_t first = 0; first < 256; first += 37) {
    for (size_t i = 0; i < weight.packed_metadata.size(); ++i) {
      weight.packed_metadata.data()[i] = static_cast<char>(first + i);
    }
    for (const int64_t tokens : {1, 6, 33}) {
      for (const Kernel& kernel : kernels(tokens)) run("metadata", kernel, mode, weight, x, &bias, tokens, 1, expected);
    }
  }
}

// Rows apart with NaN between them, everything one element off any alignment, pages without access on either side:
// nothing outside the tensors is read, and what lies around the rows of y keeps its bytes.
void nothing_outside_is_touched(const Mode& mode) {
  struct {
    int64_t tokens, out_features, in_features;
  } const sizes[] = {{1, 1, 4},    {2, 17, 36},  {3, 17, 12},  {5, 15, 12},  {8, 16, 64},  {9, 33, 8},
                     {13, 30, 36}, {17, 15, 28}, {25, 16, 60}, {33, 31, 68}, {97, 33, 100}};
  for (const auto& size : sizes) {
    Weight weight = make_weight(size.out_features, size.in_features);
    const Memory values = std::move(weight.packed_values), metadata = std::move(weight.packed_metadata);
    for (int variant = 0; variant < 4; ++variant) {
      const auto place = variant % 2 == 0 ? Memory::Place::kEnd : Memory::Place::kBegin;
      const int skipped = variant / 2;
      const int64_t gap = 3 * skipped;
      Random random(7);
      Rows x(mode.tokens, size.tokens, size.in_features, gap, skipped, place);
      Rows bias(kFp32, 1, size.out_features, 0, skipped, place), scales(kFp32, 1, size.out_features, 0, skipped, place);
      for (Rows* rows : {&x, &bias, &scales}) rows->fill([&] { return random.real(); });
      weight.scales = std::move(scales);
      const Rows expected = reference(weight, x, &bias);
      // The packed weights once more, at the same kind of place, all bits around them set.
      const auto shift = static_cast<size_t>(skipped);
      Memory placed[] = {Memory(values.size() + 2 * shift, place), Memory(metadata.size() + 2 * shift, place)};
      for (Memory& memory : placed) std::memset(memory.data(), 0xff, memory.size());
      std::memcpy(placed[0].data() + shift, values.data(), values.size());
      std::memcpy(placed[1].data() + shift, metadata.data(), metadata.size());
      for (const Kernel& kernel : kernels(size.tokens)) {
        const Rows untouched(mode.tokens, size.tokens, size.out_features, gap, skipped, place, -99);
        Rows y(mode.tokens, size.tokens, size.out_features, gap, skipped, place, -99);
        const cpu::LinearInt8Args args = {x.data(),
                                          values_of(placed[0]) + shift,
                                          bytes_of(placed[1]) + shift,
                                          reinterpret_cast<const float*>(weight.scales.data()),
                                          reinterpret_cast<const float*>(bias.data()),
                                          y.data(),
                                          mode.code,
                                          size.tokens,
                                          size.out_features,
                                          size.in_features,
                                          x.stride(),
                                          y.stride()};
        const std::string ran = cpu::linear_int8(args, 2, kernel.isa.c_str(), kernel.family);
        check(ran == kernel.name(), "asked for %s, ran %s", kernel.name().c_str(), ran.c_str());
        check_same("outside", kernel.name(), mode, weight, y, expected);
        check(y.same_around(untouched), "outside, %s %s, %" PRId64 " tokens, %" PRId64 " x %" PRId64 ": wrote around y",
              kernel.name().c_str(), mode.name, size.tokens, size.out_features, size.in_features);
      }
    }
  }
}

void bits_do_not_depend_on_threads(const Mode& mode) {
  struct {
    int64_t tokens, out_features, in_features;
  } const sizes[] = {{1, 2100, 516}, {7, 300, 516}, {50, 200, 140}, {410, 40, 140}, {1100, 280, 36}};  // all beyond kAlone
  for (const auto& size : sizes) {
    const Weight weight = make_weight(size.out_features, size.in_features);
    Random random(8);
    Rows x(mode.tokens, size.tokens, size.in_features), bias(kFp32, 1, size.out_features);
    fill_tokens(x, random, 2);
    bias.fill([&] { return random.real(); });
    const Rows expected = reference(weight, x, &bias);
    for (const Kernel& kernel : kernels(size.tokens)) {
      const Rows alone = run("alone", kernel, mode, weight, x, &bias, size.tokens, 1, expected);
      for (const int threads : {2, 3, 4}) {
        const Rows y = run("threads", kernel, mode, weight, x, &bias, size.tokens, threads, expected);
        check(y.same_bytes(alone), "threads, %s %s, %" PRId64 " tokens: %d threads give other bits than 1",
              kernel.name().c_str(), mode.name, size.tokens, threads);
      }
    }
  }
}

// The pool serves one caller; the others work alone meanwhile, with the same result.
void several_callers_at_once(const Mode& mode) {
  const Weight weight = make_weight(400, 516);
  Random random(9);
  Rows x(mode.tokens, 24, 516);
  fill_tokens(x, random);
  const Rows expected = reference(weight, x, nullptr);
  for (int i = 0; i < cpu::int8_isa_count(); ++i) {
    std::vector<Rows> results;
    for (int caller = 0; caller < 4; ++caller) results.emplace_back(mode.tokens, 6 + 6 * caller, 400);
    std::vector<std::thread> callers;
    for (Rows& y : results) {
      callers.emplace_back(
          [&] { call(cpu::int8_isa_name(i), cpu::Family::kAuto, mode, weight, x, nullptr, y, 3); });
    }
    for (std::thread& caller : callers) caller.join();
    for (const Rows& y : results) check_same("callers", cpu::int8_isa_name(i), mode, weight, y, expected);
  }
}

// What they are given is exact: the bits of the reference in fp32.
void activations_stay_within_their_bound(const Mode& mode) {
  const Weight weight = make_weight(37, 60);
  Random random(11);
  Rows bias(kFp32, 1, 37), x(mode.tokens, 25, 60), same(kFp32, 25, 60);
  bias.fill([&] { return random.real(); });
  x.fill([&] { return random.real(); });
  for (int64_t t = 0; t < x.rows(); ++t) {
    for (int64_t k = 0; k < x.columns(); ++k) same.set(t, k, x.get(t, k));
  }
  const Rows before = reference(weight, same, &bias);
  for (const Function& function : kFunctions) {
    for (const int64_t tokens : {1, 5, 8, 25}) {
      for (const Kernel& kernel : kernels(tokens)) {
        Rows y(mode.tokens, tokens, 37);
        call(kernel.isa.c_str(), kernel.family, mode, weight, x, &bias, y, 2, function.code);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t row = 0; row < 37; ++row) {
            const double given = before.get(t, row), exact = function.of(given), found = y.get(t, row);
            const double error = function.code == cpu::Activation::kRelu
                                     ? 0
                                     : function_error(mode.tokens, function.condition(given));
            const double bound = (mode.tokens.unit * 1.001 + error) * std::fabs(exact) +
                                 std::fabs(given) * 0x1p-122 + 0x1p-126;
            check(std::fabs(found - exact) <= bound, "%s, %s %s: %a of %a, not %a", function.name, kernel.name().c_str(),
                  mode.name, found, given, exact);
          }
        }
      }
    }
  }
}

// Up to eight tokens take the few-token kernel unless told otherwise, more always the other, and none touch nothing.
void family_follows_the_number_of_tokens(const Mode& mode) {
  const Weight weight = make_weight(20, 32);
  Random random(10);
  Rows x(mode.tokens, 9, 32);
  fill_tokens(x, random);
  const Rows expected = reference(weight, x, nullptr);
  for (int i = 0; i < cpu::int8_isa_count(); ++i) {
    for (const cpu::Family family : {cpu::Family::kAuto, cpu::Family::kFew}) {
      for (const int64_t tokens : {0, 1, 8, 9}) {
        Rows y(mode.tokens, tokens, 20);
        const std::string ran = call(cpu::int8_isa_name(i), family, mode, weight, x, nullptr, y, 2);
        const Kernel should = {cpu::int8_isa_name(i), tokens > kMostFew ? cpu::Family::kMany : cpu::Family::kFew};
        check(ran == should.name(), "%" PRId64 " tokens ran %s", tokens, ran.c_str());
        check_same("family", should.name(), mode, weight, y, expected);
      }
    }
  }
}

void names_are_checked(const Mode& mode) {
  const Weight weight = make_weight(16, 4);
  Rows x(mode.tokens, 1, 4), y(mode.tokens, 1, 16);
  x.fill([] { return 1; });
  std::string message = "no error";
  try {
    call("sse9", cpu::Family::kAuto, mode, weight, x, nullptr, y, 1);
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  const char* expected = "int8 kernels have no instruction set 'sse9' on this machine, which has: baseline";
  check(message.find(expected) == 0, "%s", message.c_str());
  const std::string ran = call(nullptr, cpu::Family::kAuto, mode, weight, x, nullptr, y, 1);
  check(ran == std::string(cpu::default_int8_isa()) + "/int8-few", "%s ran by default", ran.c_str());
}

constexpr Test<Mode> kTests[] = {
    {"packing is the layout", packing_is_the_layout},
    {"names of instruction sets are checked", names_are_checked},
    {"sizes agree", sizes_agree},
    {"quantization rounds to even", quantization_rounds_to_even},
    {"longest rows agree", longest_rows_agree},
    {"several slabs agree", several_slabs_agree},
    {"rounding is to nearest even", rounding_is_to_nearest_even},
    {"any metadata stay inside the buffers", any_metadata_stay_inside},
    {"nothing outside the tensors is touched", nothing_outside_is_touched},
    {"bits do not depend on threads", bits_do_not_depend_on_threads},
    {"several callers at once", several_callers_at_once},
    {"activations stay within their bound", activations_stay_within_their_bound},
    {"family follows the number of tokens", family_follows_the_number_of_tokens},
};

}  // namespace
}  // namespace twofour::test

int main(int argc, char** argv) {
  using namespace twofour;
  return test::run_tests(test::kTests, test::kModes, cpu::int8_isa_count(), cpu::int8_isa_name, cpu::threads_source(),
                         argc, argv);
}
