// A device of its own for torch, in the memory of the CPU: what tests make on it fails where a GPU's tensors would, beside
// tensors or generators of the CPU and where plain memory is expected, and computes what the CPU does.
//
// torch's key for devices that it does not know, PrivateUse1, has a guard, an allocator, the few operations about memory, and a
// fallback: all others run on copies of their arguments.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kDevice); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

// Draws what one of the CPU draws.
struct Generator final : c10::GeneratorImpl {
  at::Generator drawn = at::detail::createCPUGenerator();

  Generator() : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { drawn.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { drawn.set_offset(offset); }
  uint64_t get_offset() const override { return drawn.get_offset(); }
  uint64_t current_seed() const override { return drawn.current_seed(); }
  uint64_t seed() override { return drawn.seed(); }
  void set_state(const c10::TensorImpl& state) override { drawn.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return drawn.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* other = new Generator();
    other->drawn = drawn.clone();
    return other;
  }
};

// What autograd asks of a device.
struct Hooks final : at::PrivateUse1HooksInterface {
  Hooks() { at::RegisterPrivateUse1HooksInterface(this); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::getDefaultCPUGenerator();
    return generator;
  }
};
Hooks hooks;

bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// The same memory, as a tensor of the CPU.
at::Tensor of_cpu(const at::Tensor& tensor) {
  if (!is_ours(tensor)) return tensor;
  at::Tensor same = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  same._set_conj(tensor.is_conj());
  same._set_neg(tensor.is_neg());
  return same;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  of_cpu(to).copy_(of_cpu(from));
  return to;
}

void grow(const at::Tensor& self) {
  const size_t bytes = at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.dtype().itemsize(),
                                                        self.storage_offset());
  c10::StorageImpl* storage = self.storage().unsafeGetStorageImpl();
  if (bytes <= storage->nbytes()) return;
  c10::DataPtr data = memory.allocate(bytes);
  std::memcpy(data.get(), storage->data(), storage->nbytes());
  storage->set_data_ptr(std::move(data));
  storage->set_nbytes(bytes);
}

const at::Tensor& resized(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  grow(self);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resized(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Tensor strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                       self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(self.storage_offset()));
  return view;
}

at::Tensor reshape_alias(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return strided(self, size, stride, std::nullopt);
}

at::Tensor like(const at::Tensor& self, const at::Tensor& view) {
  return strided(self, view.sizes(), view.strides(), std::nullopt);
}

at::Tensor viewed(const at::Tensor& self, c10::IntArrayRef size) { return like(self, of_cpu(self).view(size)); }

at::Tensor unfolded(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return like(self, of_cpu(self).unfold(dimension, size, step));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  grow(self);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const int64_t items = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {items}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor to_device(const at::Tensor& tensor) { return tensor.defined() ? tensor.to(kDevice) : tensor; }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
  const std::optional<at::Tensor> added = bias.has_value() ? std::optional<at::Tensor>(of_cpu(*bias)) : std::nullopt;
  return to_device(at::convolution(of_cpu(x), of_cpu(weight), added, stride, padding, dilation, transposed, output_padding,
                                   groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  const int64_t rows = transposed ? weight.size(1) * groups : weight.size(0);
  const auto [of_x, of_weight, of_bias] =
      at::convolution_backward(of_cpu(grad), of_cpu(x), of_cpu(weight), at::OptionalIntArrayRef({rows}), stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  return {to_device(of_x), to_device(of_weight), to_device(of_bias)};
}

at::Scalar item(const at::Tensor& self) { return of_cpu(self).item(); }

// Scalars of the CPU may stand beside anything.
void require_ours(const at::Tensor& tensor, const c10::OperatorHandle& op) {
  TORCH_CHECK(!tensor.defined() || is_ours(tensor) || tensor.dim() == 0,
              "Expected all tensors to be on the same device, but ", op.schema().name(), " found at least two: ", kDevice,
              " and ", tensor.device(), " ", tensor.sizes());
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size(), first = stack->size() - count;
  for (size_t place = first; place < stack->size(); ++place) {
    c10::IValue& argument = (*stack)[place];
    if (argument.isTensor()) {
      require_ours(argument.toTensor(), op);
    } else if (argument.isTensorList()) {  // not the indices of x[..], which may be the CPU's
      for (const at::Tensor& tensor : argument.toTensorVector()) require_ours(tensor, op);
    } else if (argument.isGenerator()) {
      auto* ours = dynamic_cast<Generator*>(argument.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(ours != nullptr, "Expected a '", kDevice, "' device type for generator but found '",
                  argument.toGenerator().device(), "'");
      argument = ours->drawn;
    }
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resized);
  m.impl("as_strided", strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", viewed);
  m.impl("unfold", unfolded);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "The device is registered as the library is loaded."; }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
}

// Copies look at the signs themselves; torch's fallback for lazy ones would copy, and never end.
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
