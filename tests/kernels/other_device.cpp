// A device that is the CPU's memory under another name, and refuses operators whose tensors are on both.
//
// What PyTorch asks of a device in its own right (PrivateUse1): memory, copies and views. Everything else is computed
// on the CPU, after a look at where its tensors are.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kOther(DeviceType::PrivateUse1, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device) const override { return kOther; }
  Device getDevice() const override { return kOther; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kOther); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kOther); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar guard_registered(DeviceType::PrivateUse1, &guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};
const bool hooks_registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    return {data, data, &free, kOther};
  }
  static void free(void* data) {
    if (data) c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

// The same memory, as a tensor of the CPU.
Tensor as_cpu(const Tensor& x) {
  return x.is_cpu() ? x : at::from_blob(x.numel() ? x.data_ptr() : nullptr, x.sizes(), x.strides(), x.dtype());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

const Tensor& resize_(const Tensor& x, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const Tensor made = empty(size, x.scalar_type(), {}, {}, {}, {});
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  x.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides());
  return x;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

// Products of bfloat16 in float32, which PyTorch has on CUDA alone.
Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  TORCH_CHECK(!a.is_cpu() && !b.is_cpu() && !out.is_cpu() && out.scalar_type() == dtype, "mm of two devices");
  as_cpu(out).copy_(at::mm(as_cpu(a).to(dtype), as_cpu(b).to(dtype)));
  return out;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  bool there = false, elsewhere = false;
  const auto look = [&](const Tensor& x) {
    if (x.defined()) (x.is_cpu() ? elsewhere : there) |= !x.is_cpu() || x.dim() > 0;  // as on CUDA, scalars are free
  };
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); i++) {
    const c10::IValue& value = (*stack)[i];
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& x : value.toTensorVector()) look(x);
  }
  // Indices alone may be the CPU's.
  const bool indexes = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  TORCH_CHECK(indexes || !(there && elsewhere), name, " has tensors on two devices");
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("mm.dtype_out", &mm_out);
}

TORCH_LIBRARY(headstart_tests, m) { m.def("as_cpu(Tensor x) -> Tensor", &as_cpu); }
