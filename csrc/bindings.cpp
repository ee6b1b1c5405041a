// The only file that knows Python. Addresses and sizes in, nothing owned, the GIL released: kernels/*.py and masks/cpu.py
// check.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/grad.h"
#include "cpu/linear.h"
#include "cpu/linear_int8.h"
#include "cpu/masks.h"
#include "cpu/pack.h"
#include "cpu/pack_masked.h"
#include "cpu/permute.h"
#include "cpu/threads.h"
#include "nm/layout.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace twofour;

thread_local const char* last_kernel = "";

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_weight(int64_t out_features, int64_t in_features) {
  if (out_features < 1 || in_features < nm::kGroup || in_features % nm::kGroup != 0) {
    throw std::invalid_argument("weight of " + std::to_string(out_features) + " x " + std::to_string(in_features) +
                                ": out_features must be positive and in_features a positive multiple of 4");
  }
}

void check_itemsize(int itemsize) {
  if (itemsize != 1 && itemsize != 2 && itemsize != 4) throw std::invalid_argument("itemsize must be 1, 2 or 4");
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_count(); ++i) names.emplace_back(cpu::isa_name(i));
  return names;
}

void check_shared(int shared) {
  if (shared != 1 && shared != 2 && shared != 4) throw std::invalid_argument("shared must be 1, 2 or 4");
}

bool order_rows(uintptr_t metadata, int64_t out_features, int64_t in_features, int shared, uintptr_t order) {
  check_shared(shared);
  check_weight(out_features, in_features);
  const nb::gil_scoped_release nogil;
  return cpu::order_rows(at<const uint8_t>(metadata), out_features, in_features, shared, at<uint8_t>(order));
}

void pack_linear(uintptr_t values, uintptr_t metadata, uintptr_t packed_values, uintptr_t packed_metadata,
                 int64_t out_features, int64_t in_features, int itemsize, int shared, uintptr_t order) {
  check_shared(shared);
  check_weight(out_features, in_features);
  check_itemsize(itemsize);
  const nb::gil_scoped_release nogil;
  cpu::pack_linear(at<const void>(values), at<const uint8_t>(metadata), at<void>(packed_values),
                   at<uint8_t>(packed_metadata), out_features, in_features, itemsize, shared, at<const uint8_t>(order));
}

void unpack_linear(uintptr_t packed_values, uintptr_t packed_metadata, uintptr_t values, uintptr_t metadata,
                   int64_t out_features, int64_t in_features, int itemsize, int shared, uintptr_t order) {
  check_weight(out_features, in_features);
  check_itemsize(itemsize);
  check_shared(shared);
  const nb::gil_scoped_release nogil;
  cpu::unpack_linear(at<const void>(packed_values), at<const uint8_t>(packed_metadata), at<void>(values),
                     at<uint8_t>(metadata), out_features, in_features, itemsize, shared, at<const uint8_t>(order));
}

std::vector<std::string> pack_masked_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::pack_masked_isa_count(); ++i) names.emplace_back(cpu::pack_masked_isa_name(i));
  return names;
}

bool pack_masked(uintptr_t weight, uintptr_t mask, uintptr_t values, uintptr_t metadata, uintptr_t turned_values,
                 uintptr_t turned_metadata, int64_t out_features, int64_t in_features, int64_t stride, int itemsize,
                 int threads, const std::optional<std::string>& isa) {
  check_weight(out_features, in_features);
  if (itemsize != 2 && itemsize != 4) throw std::invalid_argument("itemsize must be 2 or 4");
  if (out_features > 1 && stride < in_features) throw std::invalid_argument("rows must not overlap");
  if (turned_values != 0 && (turned_metadata == 0 || out_features % nm::kGroup != 0)) {
    throw std::invalid_argument("the transposed matrix needs metadata, and out_features a multiple of 4");
  }
  const cpu::MaskedPackArgs args = {at<const void>(weight),   at<const uint8_t>(mask),      at<void>(values),
                                    at<uint8_t>(metadata),    at<void>(turned_values), at<uint8_t>(turned_metadata),
                                    out_features,             in_features,             stride,
                                    itemsize};
  const nb::gil_scoped_release nogil;
  return cpu::pack_masked(args, threads, isa ? isa->c_str() : nullptr);
}

void check_activation(int activation) {
  if (activation < 0 || activation > 4) throw std::invalid_argument("activation is 0..4");
}

void linear(uintptr_t x, uintptr_t values, uintptr_t metadata, uintptr_t bias, uintptr_t y, int64_t tokens,
            int64_t out_features, int64_t in_features, int64_t x_stride, int64_t y_stride, int dtype, int threads,
            int kernel, const std::optional<std::string>& isa, int bias_dtype, int shared, int activation,
            uintptr_t residual, int64_t residual_stride, uintptr_t order, uintptr_t scales) {
  check_weight(out_features, in_features);
  check_shared(shared);
  if (tokens < 0 || (tokens > 1 && (x_stride < in_features || y_stride < out_features))) {
    throw std::invalid_argument("tokens must not be negative, nor rows overlap");
  }
  if (dtype < 0 || dtype >= cpu::kDTypes || bias_dtype < 0 || bias_dtype > 1 || kernel < 0 || kernel > 2) {
    throw std::invalid_argument("dtype is 0..4, bias_dtype 0..1, kernel 0..2");
  }
  check_activation(activation);
  if (residual != 0 && tokens > 1 && residual_stride < 0) throw std::invalid_argument("residual_stride must not be negative");
  cpu::LinearArgs args = {at<const void>(x), at<const void>(values), at<const uint8_t>(metadata), nullptr,
                          at<void>(y),       tokens,                 out_features,                in_features,
                          x_stride,          y_stride,               shared};
  args.activation = static_cast<cpu::Activation>(activation);
  args.residual = at<const void>(residual);
  args.residual_stride = residual_stride;
  args.order = at<const uint8_t>(order);
  args.scales = at<const float>(scales);
  const nb::gil_scoped_release nogil;
  last_kernel = cpu::linear(args, static_cast<cpu::DType>(dtype), at<const void>(bias),
                            static_cast<cpu::DType>(bias_dtype), threads, isa ? isa->c_str() : nullptr,
                            static_cast<cpu::Family>(kernel));
}

void check_grad(int64_t tokens, int64_t out_features, int64_t in_features, int64_t grad_stride, int64_t x_stride,
                int dtype) {
  check_weight(out_features, in_features);
  if (tokens < 0 || (tokens > 1 && (grad_stride < out_features || x_stride < in_features))) {
    throw std::invalid_argument("tokens must not be negative, nor rows overlap");
  }
  if (dtype < 0 || dtype > 1) throw std::invalid_argument("dtypes are 0..1");
}

void grad_input(uintptr_t grad, uintptr_t values, uintptr_t metadata, uintptr_t grad_x, int64_t tokens,
                int64_t out_features, int64_t in_features, int64_t grad_stride, int64_t x_stride, int dtype, int threads,
                const std::optional<std::string>& isa) {
  check_grad(tokens, out_features, in_features, grad_stride, x_stride, dtype);
  const cpu::GradInputArgs args = {at<const void>(grad), at<const void>(values), at<const uint8_t>(metadata),
                                   at<void>(grad_x),     tokens,                 out_features,
                                   in_features,          grad_stride,            x_stride};
  const nb::gil_scoped_release nogil;
  last_kernel = cpu::grad_input(args, static_cast<cpu::DType>(dtype), threads, isa ? isa->c_str() : nullptr);
}

void grad_values(uintptr_t grad, uintptr_t x, uintptr_t metadata, uintptr_t grad_values, int64_t tokens,
                 int64_t out_features, int64_t in_features, int64_t grad_stride, int64_t x_stride, int dtype,
                 int threads, const std::optional<std::string>& isa) {
  check_grad(tokens, out_features, in_features, grad_stride, x_stride, dtype);
  const cpu::GradValuesArgs args = {at<const void>(grad), at<const void>(x), at<const uint8_t>(metadata),
                                    at<void>(grad_values), tokens,           out_features,
                                    in_features,          grad_stride,       x_stride};
  const nb::gil_scoped_release nogil;
  last_kernel = cpu::grad_values(args, static_cast<cpu::DType>(dtype), threads, isa ? isa->c_str() : nullptr);
}

std::vector<std::string> int8_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::int8_isa_count(); ++i) names.emplace_back(cpu::int8_isa_name(i));
  return names;
}

void pack_linear_int8(uintptr_t values, uintptr_t metadata, uintptr_t packed_values, uintptr_t packed_metadata,
                      int64_t out_features, int64_t in_features) {
  check_weight(out_features, in_features);
  const nb::gil_scoped_release nogil;
  cpu::pack_linear_int8(at<const int8_t>(values), at<const uint8_t>(metadata), at<int8_t>(packed_values),
                        at<uint8_t>(packed_metadata), out_features, in_features);
}

void unpack_linear_int8(uintptr_t packed_values, uintptr_t packed_metadata, uintptr_t values, uintptr_t metadata,
                        int64_t out_features, int64_t in_features) {
  check_weight(out_features, in_features);
  const nb::gil_scoped_release nogil;
  cpu::unpack_linear_int8(at<const int8_t>(packed_values), at<const uint8_t>(packed_metadata), at<int8_t>(values),
                          at<uint8_t>(metadata), out_features, in_features);
}

void linear_int8(uintptr_t x, uintptr_t values, uintptr_t metadata, uintptr_t scales, uintptr_t bias, uintptr_t y,
                 int64_t tokens, int64_t out_features, int64_t in_features, int64_t x_stride, int64_t y_stride,
                 int dtype, int threads, int kernel, const std::optional<std::string>& isa, int activation) {
  check_weight(out_features, in_features);
  check_activation(activation);
  if (in_features > cpu::kInt8MostInputs) throw std::invalid_argument("in_features above 2^18 overflow int32 sums");
  if (tokens < 0 || (tokens > 1 && (x_stride < in_features || y_stride < out_features))) {
    throw std::invalid_argument("tokens must not be negative, nor rows overlap");
  }
  if (dtype < 0 || dtype > 1 || kernel < 0 || kernel > 2) throw std::invalid_argument("dtype is 0..1, kernel 0..2");
  const cpu::LinearInt8Args args = {at<const void>(x),
                                    at<const int8_t>(values),
                                    at<const uint8_t>(metadata),
                                    at<const float>(scales),
                                    at<const float>(bias),
                                    at<void>(y),
                                    static_cast<cpu::DType>(dtype),
                                    tokens,
                                    out_features,
                                    in_features,
                                    x_stride,
                                    y_stride,
                                    static_cast<cpu::Activation>(activation)};
  const nb::gil_scoped_release nogil;
  last_kernel = cpu::linear_int8(args, threads, isa ? isa->c_str() : nullptr, static_cast<cpu::Family>(kernel));
}

cpu::ScoreType score_type(int itemsize) {
  if (itemsize != 4 && itemsize != 8) throw std::invalid_argument("scores have 4 or 8 bytes");
  return itemsize == 4 ? cpu::ScoreType::kFp32 : cpu::ScoreType::kFp64;
}

std::vector<std::string> masks_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::masks_isa_count(); ++i) names.emplace_back(cpu::masks_isa_name(i));
  return names;
}

void transposable_2_4(uintptr_t scores, uintptr_t mask, int64_t rows, int64_t columns, int64_t stride, int itemsize,
                      bool magnitude, int threads, const std::optional<std::string>& isa) {
  if (rows < 0 || columns < 0 || rows % 4 != 0 || columns % 4 != 0) {
    throw std::invalid_argument("rows and columns must be multiples of 4");
  }
  if (rows > 1 && stride < columns) throw std::invalid_argument("rows must not overlap");
  const cpu::MaskArgs args = {
      at<const void>(scores), at<uint8_t>(mask), itemsize == 2 ? cpu::ScoreType::kBf16 : score_type(itemsize), rows, columns,
      stride, magnitude};
  const nb::gil_scoped_release nogil;
  last_kernel = cpu::transposable_2_4(args, threads, isa ? isa->c_str() : nullptr);
}

void soft_threshold(uintptr_t weight, uintptr_t soft, int64_t rows, int64_t columns, int64_t stride, int itemsize,
                    double scale, bool transposable, int threads, const std::optional<std::string>& isa) {
  if (rows < 0 || columns < 0 || columns % 4 != 0 || (transposable && rows % 4 != 0)) {
    throw std::invalid_argument("axes with groups must be multiples of 4");
  }
  if (rows > 1 && stride < columns) throw std::invalid_argument("rows must not overlap");
  if (itemsize != 2 && itemsize != 4) throw std::invalid_argument("weights have 2 or 4 bytes");
  const cpu::SoftArgs args = {at<const void>(weight), at<float>(soft),
                              itemsize == 2 ? cpu::ScoreType::kBf16 : cpu::ScoreType::kFp32, rows, columns, stride, scale};
  const nb::gil_scoped_release nogil;
  (transposable ? cpu::soft_2_4t : cpu::soft_2_4)(args, threads, isa ? isa->c_str() : nullptr);
}

int64_t count_differences(uintptr_t one, uintptr_t other, int64_t count, int threads) {
  const nb::gil_scoped_release nogil;
  return cpu::count_differences(at<const uint8_t>(one), at<const uint8_t>(other), count, threads);
}

void transposable_blocks(uintptr_t scores, uintptr_t mask, int64_t rows, int64_t columns, int64_t stride, int itemsize,
                         int keep, int group, int threads) {
  if (group < 2 || group > 32 || keep < 1 || keep >= group) {
    throw std::invalid_argument("a group has 2 to 32 scores, of which 1 to group - 1 are kept");
  }
  if (rows < 0 || columns < 0 || rows % group != 0 || columns % group != 0) {
    throw std::invalid_argument("rows and columns must be multiples of the group");
  }
  if (rows > 1 && stride < columns) throw std::invalid_argument("rows must not overlap");
  const cpu::MaskArgs args = {at<const void>(scores), at<uint8_t>(mask), score_type(itemsize), rows, columns, stride};
  const nb::gil_scoped_release nogil;
  cpu::transposable_blocks(args, keep, group, threads);
  last_kernel = "solver";
}

void best_of_groups(uintptr_t scores, uintptr_t mask, uintptr_t kept, int64_t rows, int64_t columns, int64_t stride,
                    int64_t kept_stride, int itemsize, int keep, int group, int64_t shared, bool magnitude, int threads,
                    const std::optional<std::string>& isa) {
  if (group < 2 || group > 32 || keep < 1 || keep >= group || shared < 1) {
    throw std::invalid_argument("a group has 2 to 32 scores, of which 1 to group - 1 are kept");
  }
  if (rows < 0 || columns < 0 || rows % shared != 0 || columns % group != 0) {
    throw std::invalid_argument("rows and columns must be multiples of shared and group");
  }
  if (rows > 1 && (stride < columns || (kept != 0 && kept_stride < columns))) {
    throw std::invalid_argument("rows must not overlap");
  }
  const cpu::GroupArgs args = {at<const void>(scores), at<uint8_t>(mask), at<void>(kept), score_type(itemsize), rows,
                               columns, stride, kept_stride, keep, group, shared, magnitude};
  const nb::gil_scoped_release nogil;
  last_kernel = cpu::best_of_groups(args, threads, isa ? isa->c_str() : nullptr);
}

int64_t permute(uintptr_t columns, uintptr_t order, int64_t channels, int64_t rows, int keep, int group, int64_t sweeps,
                double seconds, uint64_t seed, int threads, const std::optional<std::string>& isa) {
  if (group < 2 || group > cpu::kPermuteMostGroup || keep < 1 || keep >= group) {
    throw std::invalid_argument("group is 2..32, keep 1..group-1");
  }
  if (channels < group || channels % group != 0 || channels > INT32_MAX) {
    throw std::invalid_argument("channels must be a positive multiple of group");
  }
  if (rows < 0 || rows % cpu::kPermuteLanes != 0) throw std::invalid_argument("rows must be a multiple of 16");
  if (sweeps < 1 || threads < 1) throw std::invalid_argument("sweeps and threads must be positive");
  const cpu::PermuteArgs args = {at<const float>(columns), channels, rows, keep, group, at<int64_t>(order), sweeps,
                                 seconds,                  seed};
  const nb::gil_scoped_release nogil;
  return cpu::permute(args, threads, isa ? isa->c_str() : nullptr);
}

// CUlaunchAttribute and CUlaunchConfig.
struct alignas(8) CudaAttribute {
  int id, padding;
  uint32_t value[16];
};
struct CudaLaunch {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  CudaAttribute* attributes;
  unsigned count;
};
constexpr int kCudaCluster = 4, kCudaEarly = 6;  // CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .._PROGRAMMATIC_STREAM_SERIALIZATION

// cuLaunchKernelEx at `function`, which kernels/cuda/driver.py has found; no CUDA is linked. Its status. `cluster` blocks of
// grid_y are one; `early`: as soon as the kernel before lets it start.
int launch_cuda(uintptr_t function, uintptr_t kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned threads,
                unsigned shared_bytes, uintptr_t stream, const nb::tuple& arguments, unsigned cluster, bool early) {
  using Launch = int (*)(const CudaLaunch*, void*, void**, void**);
  constexpr size_t kMost = 32;
  const size_t count = arguments.size();
  if (count > kMost) throw std::invalid_argument("more than 32 arguments");
  uint64_t words[kMost];
  void* places[kMost];
  for (size_t i = 0; i < count; ++i) {
    words[i] = PyLong_AsUnsignedLongLongMask(arguments[i].ptr());
    if (words[i] == UINT64_MAX && PyErr_Occurred() != nullptr) throw nb::python_error();
    places[i] = words + i;
  }
  CudaAttribute attributes[2];
  unsigned wanted = 0;
  if (cluster > 1) attributes[wanted++] = {kCudaCluster, 0, {1, cluster, 1}};
  if (early) attributes[wanted++] = {kCudaEarly, 0, {1}};
  const CudaLaunch launch = {{grid_x, grid_y, grid_z}, {threads, 1, 1}, shared_bytes, at<void>(stream), attributes, wanted};
  const nb::gil_scoped_release nogil;  // a full queue waits here
  return reinterpret_cast<Launch>(function)(&launch, at<void>(kernel), places, nullptr);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of twofour. Takes raw addresses; use twofour.kernels instead.";
  m.def("isa", [] { return std::string(cpu::default_isa()); }, "Instruction set that runs by default.");
  m.def("isas", &isas, "Instruction sets that are compiled in and run here, plainest first.");
  m.def("threads_source", [] { return std::string(cpu::threads_source()); }, "\"libgomp\" or \"pool\".");
  m.def("last_kernel", [] { return std::string(last_kernel); }, "What the calling thread ran last, as \"isa/family\".");
  m.def("window_rows", [] { return nm::kWindowRows; }, "Rows inside which an order moves them.");
  m.def("order_rows", &order_rows, "metadata"_a, "out_features"_a, "in_features"_a, "shared"_a, "order"_a);
  m.def("pack_linear", &pack_linear, "values"_a, "metadata"_a, "packed_values"_a, "packed_metadata"_a,
        "out_features"_a, "in_features"_a, "itemsize"_a, "shared"_a = 1, "order"_a = 0);
  m.def("unpack_linear", &unpack_linear, "packed_values"_a, "packed_metadata"_a, "values"_a, "metadata"_a,
        "out_features"_a, "in_features"_a, "itemsize"_a, "shared"_a = 1, "order"_a = 0);
  m.def("ask_for_huge_pages", [](uintptr_t buffer, size_t bytes) { cpu::ask_for_huge_pages(at<void>(buffer), bytes); },
        "buffer"_a, "bytes"_a);
  m.def("linear", &linear, "x"_a, "values"_a, "metadata"_a, "bias"_a, "y"_a, "tokens"_a, "out_features"_a,
        "in_features"_a, "x_stride"_a, "y_stride"_a, "dtype"_a, "threads"_a, "kernel"_a = 0, "isa"_a = nb::none(),
        "bias_dtype"_a = 0, "shared"_a = 1, "activation"_a = 0, "residual"_a = 0, "residual_stride"_a = 0,
        "order"_a = 0, "scales"_a = 0);
  m.def("grad_input", &grad_input, "grad"_a, "values"_a, "metadata"_a, "grad_x"_a, "tokens"_a, "out_features"_a,
        "in_features"_a, "grad_stride"_a, "x_stride"_a, "dtype"_a, "threads"_a, "isa"_a = nb::none());
  m.def("grad_values", &grad_values, "grad"_a, "x"_a, "metadata"_a, "grad_values"_a, "tokens"_a, "out_features"_a,
        "in_features"_a, "grad_stride"_a, "x_stride"_a, "dtype"_a, "threads"_a, "isa"_a = nb::none());
  m.def("int8_isa", [] { return std::string(cpu::default_int8_isa()); }, "Instruction set of int8 kernels by default.");
  m.def("int8_isas", &int8_isas, "Instruction sets with int8 kernels that run here, plainest first.");
  m.def("pack_linear_int8", &pack_linear_int8, "values"_a, "metadata"_a, "packed_values"_a, "packed_metadata"_a,
        "out_features"_a, "in_features"_a);
  m.def("unpack_linear_int8", &unpack_linear_int8, "packed_values"_a, "packed_metadata"_a, "values"_a, "metadata"_a,
        "out_features"_a, "in_features"_a);
  m.def("linear_int8", &linear_int8, "x"_a, "values"_a, "metadata"_a, "scales"_a, "bias"_a, "y"_a, "tokens"_a,
        "out_features"_a, "in_features"_a, "x_stride"_a, "y_stride"_a, "dtype"_a, "threads"_a, "kernel"_a = 0,
        "isa"_a = nb::none(), "activation"_a = 0);
  m.def("pack_masked_isas", &pack_masked_isas, "Instruction sets that pack masked weights and run here, plainest first.");
  m.def("pack_masked", &pack_masked, "weight"_a, "mask"_a, "values"_a, "metadata"_a, "turned_values"_a,
        "turned_metadata"_a, "out_features"_a, "in_features"_a, "stride"_a, "itemsize"_a, "threads"_a,
        "isa"_a = nb::none());
  m.def("masks_isas", &masks_isas, "Instruction sets that choose masks and run here, plainest first.");
  m.def("transposable_2_4", &transposable_2_4, "scores"_a, "mask"_a, "rows"_a, "columns"_a, "stride"_a, "itemsize"_a,
        "magnitude"_a, "threads"_a, "isa"_a = nb::none());
  m.def("soft_threshold", &soft_threshold, "weight"_a, "soft"_a, "rows"_a, "columns"_a, "stride"_a, "itemsize"_a,
        "scale"_a, "transposable"_a, "threads"_a, "isa"_a = nb::none());
  m.def("count_differences", &count_differences, "one"_a, "other"_a, "count"_a, "threads"_a);
  m.def("best_of_groups", &best_of_groups, "scores"_a, "mask"_a, "kept"_a, "rows"_a, "columns"_a, "stride"_a,
        "kept_stride"_a, "itemsize"_a, "keep"_a, "group"_a, "shared"_a, "magnitude"_a, "threads"_a,
        "isa"_a = nb::none());
  m.def("transposable_blocks", &transposable_blocks, "scores"_a, "mask"_a, "rows"_a, "columns"_a, "stride"_a,
        "itemsize"_a, "keep"_a, "group"_a, "threads"_a);
  m.def("permute", &permute, "columns"_a, "order"_a, "channels"_a, "rows"_a, "keep"_a, "group"_a, "sweeps"_a,
        "seconds"_a, "seed"_a, "threads"_a, "isa"_a = nb::none());
  m.def("launch_cuda", &launch_cuda, "function"_a, "kernel"_a, "grid_x"_a, "grid_y"_a, "grid_z"_a, "threads"_a,
        "shared_bytes"_a, "stream"_a, "arguments"_a, "cluster"_a, "early"_a);
}
