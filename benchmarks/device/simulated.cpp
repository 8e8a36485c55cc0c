// A device for torch that is not the CPU, though it computes there: memory of its own, which nothing
// but a copy reaches, and errors where tensors of two devices meet, as on a GPU.
//
// A tensor of the device has its storage from `Allocator`, filled with a pattern. An operator computes
// on tensors of the CPU over the same memory (`computed`); what it makes moves to the device.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
template <class T>
using Optional = std::optional<T>;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr auto CPU = c10::DeviceType::CPU;
const c10::Device DEVICE(KIND, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    if (bytes) {
      TORCH_CHECK(!posix_memalign(&memory, 512, bytes), "out of memory");
      memset(memory, 0x7f, bytes);  // what was not written is seen in results
    }
    return {memory, memory, &free, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

// There is one device with one stream, on which everything is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(42);
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void*) const override { return false; }
};
Hooks hooks;

bool is_here(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == KIND; }

// Returns a tensor of another device over the same memory, which it keeps alive.
Tensor over(const Tensor& tensor, c10::Device device, c10::DispatchKey key, c10::Allocator* owner) {
  auto release = [](void* kept) { delete static_cast<Tensor*>(kept); };
  c10::DataPtr memory(tensor.storage().mutable_data(), new Tensor(tensor.detach()), release, device);
  auto storage = c10::Storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(memory), owner, false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}
Tensor on_cpu(const Tensor& tensor) {
  return is_here(tensor) ? over(tensor, CPU, c10::DispatchKey::CPU, nullptr) : tensor;
}
Tensor on_device(const Tensor& tensor) {
  bool moves = tensor.defined() && !is_here(tensor);
  return moves ? over(tensor, DEVICE, c10::DispatchKey::PrivateUse1, &allocator) : tensor;
}

// Indices may be on the CPU, and numbers (tensors of no dimension), as CUDA allows it.
bool may_meet(const Tensor& tensor, const std::string& operation) {
  return !tensor.device().is_cpu() || !tensor.dim() || operation.rfind("aten::index", 0) == 0 ||
      operation.rfind("aten::_index_put", 0) == 0;
}

// The tensors of one call, and those of the CPU that stand for them.
struct Standing {
  std::string operation;
  std::vector<std::pair<Tensor, Tensor>> pairs;

  Tensor in(const Tensor& tensor) {
    if (!is_here(tensor)) {
      TORCH_CHECK(
          !tensor.defined() || may_meet(tensor, operation),
          "Expected all tensors to be on the same device, but found at least two devices, cpu and ",
          DEVICE, " (", operation, ")");
      return tensor;
    }
    for (auto& [own, its] : pairs)
      if (own.is_same(tensor)) return its;
    bool is_empty = !tensor.storage().nbytes();  // then it may be a result that will get a size
    pairs.emplace_back(
        tensor, is_empty ? at::empty(tensor.sizes(), tensor.options().device(CPU)) : on_cpu(tensor));
    return pairs.back().second;
  }
  // Gives the results that got another size their new memory.
  void settle() {
    for (auto& [own, its] : pairs) {
      if (its.sizes().equals(own.sizes())) continue;
      auto made = on_device(its);
      auto* tensor = own.unsafeGetTensorImpl();
      tensor->set_storage_keep_dtype(made.storage());
      tensor->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
    }
  }
  Tensor out(const Tensor& tensor) {
    for (auto& [own, its] : pairs)
      if (its.is_same(tensor)) return own;
    for (auto& [own, its] : pairs)  // a view of an argument
      if (tensor.defined() && tensor.numel() && tensor.storage().data() == its.storage().data())
        return at::native::as_strided_tensorimpl(
            own, tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return on_device(tensor);
  }
};

// Computes any operator on the CPU.
void computed(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  auto& schema = operation.schema();
  Standing standing{schema.name(), {}};
  auto given = torch::jit::pop(*stack, schema.arguments().size());
  for (auto& value : given) {
    if (value.isTensor()) {
      stack->emplace_back(standing.in(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(standing.in(each));
      stack->emplace_back(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<Optional<Tensor>> list;
      for (const auto& each : value.toOptionalTensorVector())
        list.push_back(each ? Optional<Tensor>(standing.in(*each)) : std::nullopt);
      stack->emplace_back(list);
    } else if (value.isDevice()) {
      stack->emplace_back(c10::Device(CPU));
    } else if (value.isNone() && schema.arguments()[&value - given.data()].name() == "generator") {
      stack->emplace_back(hooks.generator);
    } else {
      stack->push_back(value);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    operation.callBoxed(stack);
  }
  standing.settle();
  for (auto& value : torch::jit::pop(*stack, schema.returns().size())) {
    if (value.isTensor()) {
      stack->emplace_back(standing.out(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(standing.out(each));
      stack->emplace_back(list);
    } else {
      stack->push_back(value);
    }
  }
}

// What deals with memory cannot be left to the CPU.
Tensor empty(
    SymIntArrayRef size, Optional<at::ScalarType> dtype, Optional<at::Layout>, Optional<c10::Device>,
    Optional<bool>, Optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      at::dtype_or_default(dtype), format);
}
Tensor empty_strided(
    SymIntArrayRef size, SymIntArrayRef stride, Optional<at::ScalarType> dtype, Optional<at::Layout>,
    Optional<c10::Device>, Optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), at::dtype_or_default(dtype));
}
Tensor as_strided(
    const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride, Optional<SymInt> offset) {
  Optional<int64_t> begin;
  if (offset) begin = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), begin);
}
Tensor view(const Tensor& tensor, SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}
Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor& set_place(
    Tensor& tensor, c10::Storage storage, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  TORCH_CHECK(storage.device() == tensor.device(), "the storage is on ", storage.device());
  auto* own = tensor.unsafeGetTensorImpl();
  own->set_storage_keep_dtype(std::move(storage));
  own->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  if (stride.size() == size.size())
    own->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  else
    own->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  return tensor;
}
Tensor& set_storage(Tensor& tensor, c10::Storage storage) {
  SymInt count(static_cast<int64_t>(storage.nbytes() / tensor.element_size()));
  return set_place(tensor, std::move(storage), 0, {count}, {});
}
Tensor& set_tensor(Tensor& tensor, const Tensor& other) {
  return set_place(
      tensor, other.storage(), other.sym_storage_offset(), other.sym_sizes(), other.sym_strides());
}
const Tensor& resize(const Tensor& tensor, SymIntArrayRef size, Optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  return tensor;
}
Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  on_cpu(target).copy_(on_cpu(source));
  return target;
}
c10::Scalar number_of(const Tensor& tensor) { return on_cpu(tensor).item(); }
Tensor convolution(
    const Tensor& input, const Tensor& weight, const Optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups) {
  TORCH_CHECK(is_here(input) && is_here(weight), "Expected all tensors to be on the same device");
  Optional<Tensor> its = bias && bias->defined() ? Optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  return on_device(at::convolution(
      on_cpu(input), on_cpu(weight), its, stride, padding, dilation, transposed, output_padding,
      groups));
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      on_cpu(gradient), on_cpu(input), on_cpu(weight), IntArrayRef({weight.size(0)}), stride, padding,
      dilation, transposed, output_padding, groups, mask);
  return {on_device(of_input), on_device(of_weight), on_device(of_bias)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&computed>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_place);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("resize_", resize);
  library.impl("_copy_from", copy_from);
  library.impl("_local_scalar_dense", number_of);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

// Registers `computed` for what the CPU computes itself: without it, torch takes such an operator apart.
void register_operators() {
  static std::vector<c10::RegistrationHandleRAII> handles;
  static const std::set<std::string> others{"convolution", "copy_", "set_"};
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : dispatcher.getAllOpNames()) {
    auto operation = dispatcher.findOp(name);
    if (!operation || !operation->hasSchema() || name.name.rfind("aten::", 0) != 0) continue;
    if (others.count(name.name.substr(6)) || !operation->hasKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    if (operation->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    handles.push_back(dispatcher.registerImpl(
        name, c10::DispatchKey::PrivateUse1,
        c10::KernelFunction::makeFromBoxedFunction<&computed>(), {}, nullptr, "simulated"));
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("register", [] {
    at::RegisterPrivateUse1HooksInterface(&hooks);
    register_operators();
  });
  module.def("get_rng_state", [] { return hooks.generator.get_state(); });
  module.def("set_rng_state", [](const Tensor& state) { hooks.generator.set_state(state); });
  module.def("manual_seed", [](uint64_t seed) { hooks.generator.set_current_seed(seed); });
}
