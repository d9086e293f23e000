// The part of a CUDA device that autograd insists on: a device guard, and the hooks that a build of torch with CUDA has.
//
// A build of torch without CUDA refuses to run a backward pass over tensors that claim to be on a GPU: it finds no guard
// that could select the device. This file registers one that only remembers which device was selected. Nothing is
// allocated and nothing is computed: the tensors are fake (torch.fx's FakeTensor), they have a shape and no data.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto kType = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex kDevices = 1;  // one GPU for each process, as a rank sees it
thread_local c10::DeviceIndex selected = 0;

c10::DeviceIndex select(c10::DeviceIndex index) {
  const auto before = selected;
  if (index >= 0) selected = index;
  return before;
}

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device getDevice() const override { return {kType, selected}; }
  c10::Device exchangeDevice(c10::Device device) const override { return {kType, select(device.index())}; }
  void setDevice(c10::Device device) const override { select(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { select(device.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  // There is one stream, in which everything has finished as soon as it was launched.
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};

}  // namespace

namespace at {

struct FakeHooks final : CUDAHooksInterface {
  explicit FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex current_device() const override { return selected; }
  c10::DeviceIndex getCurrentDevice() const override { return selected; }
  void setCurrentDevice(c10::DeviceIndex index) const override { select(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return select(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return select(index); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }  // recorder.py keeps account of pinned memory
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

using CUDAHooks = FakeHooks;  // the name that the macro pastes
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

extern "C" int install() {
  auto& guard = c10::impl::device_guard_impl_registry[static_cast<size_t>(kType)];
  if (guard.load() != nullptr) return 0;  // this torch has CUDA of its own
  guard.store(new Guard());
  return 1;
}
