// The bindings of the CUDA backend, python_bindings/cuda.cpp as it is, on GPUs that are not there: what they call of
// CUDA's runtime and of torch's CUDA library is here. Calls are recorded. Those that a GPU would refuse fail with its
// error. Tensors of the GPUs lie in the CPU's memory, and the CPU computes torch's own operators on them. Launches go
// to a callback (fake_gpu.py).
#include "../../../python_bindings/cuda.cpp"

#include <cstdarg>
#include <cstring>
#include <map>
#include <string>

#include "planned_kernels.h"

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace fake {

// 0, or anything else if the kernel failed
using Callback = int (*)(const char* kernel, const uint32_t* grid, uint32_t threads, uint32_t shared, const void* args,
                         int64_t bytes);

constexpr int DEVICES = 100, MULTIPROCESSORS = 4;
constexpr int SHARED_WITHOUT_PERMISSION = 48 * 1024, SHARED_OPT_IN = 99 * 1024;

struct Device {
  std::map<const void*, int> shared;  // kernels that are loaded, and what they may have
  int64_t stream = 0;                 // the current one
  bool capturing = false, broken = false;
};

Device devices[DEVICES];
int current = 0;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
Callback callback = nullptr;
std::string calls;  // a line of JSON each

__attribute__((format(printf, 1, 2))) void record(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  calls += line;
  calls += '\n';
}

cudaStream_t handle(int device, int64_t stream) {
  return reinterpret_cast<cudaStream_t>((int64_t(device) + 1) << 16 | stream);
}

// What is unsafe while any stream is captured ends the capture, unless the thread allows it.
cudaError_t unsafe() {
  if (mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  bool any = false;
  for (Device& device : devices)
    if (device.capturing) any = device.broken = true;
  return any ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t load(const void* kernel) {
  Device& device = devices[current];
  if (device.shared.count(kernel)) return cudaSuccess;
  if (const cudaError_t error = unsafe()) return error;
  device.shared[kernel] = SHARED_WITHOUT_PERMISSION;
  return cudaSuccess;
}

// What a build has: every kernel that a plan can name. A kernel's address is that of its name.
struct Build {
  std::string lines;
  std::vector<std::string> names;
  std::vector<ctk::cuda::KernelEntry> tables[4];  // bf16, fp16, fp32, all types

  Build() {
    for (const auto& [name, launch] : ctk::cuda::planned::kernels()) names.push_back(name), lines += name + '\n';
    for (const std::string& name : names) {
      int table = 0;
      for (const char* type : {"_bf16", "_fp16", "_fp32"}) {
        if (name.find(type) != std::string::npos) break;
        ++table;
      }
      tables[table].push_back({name.c_str(), name.c_str()});
    }
    for (auto& table : tables) table.push_back({nullptr, nullptr});
  }
};

const Build& build() {
  static const Build it;
  return it;
}

const char* name_of(const void* kernel) {
  for (const std::string& name : build().names)
    if (name.c_str() == kernel) return name.c_str();
  return nullptr;
}

// The same numbers on a device: CPU or CUDA.
at::Tensor moved(const at::Tensor& x, c10::Device to) {
  if (x.device() == to) return x;
  const c10::Storage& from = x.storage();
  const auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  c10::DataPtr data(from.mutable_data(), new c10::Storage(from), release, to);
  c10::Storage storage(c10::Storage::use_byte_size_t(), from.nbytes(), std::move(data), nullptr, false);
  const auto key = to.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), x.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return made;
}

bool on_gpu(const c10::IValue& value) {
  return (value.isTensor() && value.toTensor().defined() && value.toTensor().is_cuda()) ||
         (value.isDevice() && value.toDevice().is_cuda());
}

// torch's own operators.
void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  c10::Device device(c10::kCPU);
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    c10::IValue& value = (*stack)[stack->size() - schema.arguments().size() + i];
    if (!on_gpu(value)) continue;
    if (value.isDevice()) {
      device = value.toDevice(), value = c10::Device(c10::kCPU);
      continue;
    }
    const at::Tensor x = value.toTensor();
    if (const auto* alias = schema.arguments()[i].alias_info(); alias && alias->isWrite()) written.push_back(x);
    device = x.device(), value = moved(x, c10::kCPU);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    c10::IValue& value = (*stack)[stack->size() - schema.returns().size() + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) value = written.at(i);
    else if (value.isTensor()) value = moved(value.toTensor(), device);
  }
}

}  // namespace fake

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fake::on_the_cpu>()); }
// has one kernel for every device, which looks for the device's part itself
TORCH_LIBRARY_IMPL(aten, CUDA, m) { m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&fake::on_the_cpu>()); }

TORCH_LIBRARY(ctkernels_fake, m) {
  m.def("to_gpu(Tensor x, int device) -> Tensor", [](const at::Tensor& x, int64_t device) {
    return fake::moved(x, c10::Device(c10::kCUDA, c10::DeviceIndex(device)));
  });
  m.def("to_cpu(Tensor x) -> Tensor", [](const at::Tensor& x) { return fake::moved(x, c10::kCPU); });
}

// For fake_gpu.py.
FAKE_API void fake_set_callback(fake::Callback given) { fake::callback = given; }
FAKE_API void fake_set_device(int device) { fake::current = device; }
FAKE_API int fake_device() { return fake::current; }
FAKE_API void fake_set_stream(int device, int64_t stream) { fake::devices[device].stream = stream; }
FAKE_API void fake_begin_capture(int device) { fake::devices[device].capturing = true; }
FAKE_API int fake_end_capture(int device) {  // 0: the capture was ended by a call that it does not allow
  fake::Device& d = fake::devices[device];
  const bool whole = d.capturing && !d.broken;
  d.capturing = d.broken = false;
  return whole;
}
FAKE_API int fake_capture_mode() { return fake::mode; }
FAKE_API int fake_load(int device, const char* kernel) {
  std::swap(device, fake::current);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, ctk::cuda::find_kernel(kernel));
  std::swap(device, fake::current);
  return error;
}
FAKE_API const char* fake_calls() { return fake::calls.c_str(); }
FAKE_API void fake_forget_calls() { fake::calls.clear(); }
FAKE_API const char* fake_kernels() { return fake::build().lines.c_str(); }

// Of the build.
namespace ctk::cuda {

const KernelEntry* kernels_of(Type rows) {
  return fake::build().tables[rows == Type::bf16 ? 0 : rows == Type::f16 ? 1 : 2].data();
}
const KernelEntry* common_kernels() { return fake::build().tables[3].data(); }
const void* find_kernel(const char* name) {
  for (const std::string& known : fake::build().names)
    if (known == name) return known.c_str();
  return nullptr;
}

}  // namespace ctk::cuda

// Of CUDA's runtime.
cudaError_t cudaGetDevice(int* device) {
  *device = fake::current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  fake::record(R"({"call": "set_device", "device": %d})", device);
  fake::current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  fake::record(R"({"call": "device_attribute", "device": %d, "attribute": %d})", device, int(attribute));
  *value = fake::MULTIPROCESSORS;
  return attribute == cudaDevAttrMultiProcessorCount ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* given) {
  std::swap(*given, fake::mode);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const char* name = fake::name_of(kernel);
  if (!name) return cudaErrorInvalidDeviceFunction;
  fake::record(R"({"call": "load", "kernel": "%s", "device": %d})", name, fake::current);
  *attributes = cudaFuncAttributes{};
  return fake::load(kernel);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const char* name = fake::name_of(kernel);
  if (!name) return cudaErrorInvalidDeviceFunction;
  fake::record(R"({"call": "allow_shared", "kernel": "%s", "device": %d, "bytes": %d})", name, fake::current, value);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > fake::SHARED_OPT_IN)
    return cudaErrorInvalidValue;
  if (const cudaError_t error = fake::load(kernel)) return error;
  fake::devices[fake::current].shared[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  const char* name = fake::name_of(kernel);
  if (!name) return cudaErrorInvalidDeviceFunction;
  fake::Device& device = fake::devices[fake::current];
  fake::record(R"({"call": "launch", "kernel": "%s", "device": %d, "stream": %lld, "shared": %zu})", name,
               fake::current, (long long)(reinterpret_cast<int64_t>(stream) & 0xffff), shared);
  if (reinterpret_cast<int64_t>(stream) >> 16 != fake::current + 1) return cudaErrorInvalidResourceHandle;
  if (const cudaError_t error = fake::load(kernel)) return error;
  if (int64_t(shared) > device.shared.at(kernel)) return cudaErrorInvalidValue;
  if (device.capturing || !fake::callback) return cudaSuccess;
  const uint32_t blocks[] = {grid.x, grid.y, grid.z};
  const int failed =
      fake::callback(name, blocks, block.x, uint32_t(shared), arguments[0], int64_t(sizeof(ctk::cuda::Args)));
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  const int64_t device = (reinterpret_cast<int64_t>(stream) >> 16) - 1;
  const bool capturing = fake::devices[device].capturing;
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = capturing ? 1 + device : 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error of the fake runtime"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

// Of torch's CUDA library. What is not here is looked up when it is called, which ends the process with its name.
namespace c10::cuda {

std::atomic<CUDACachingAllocator::CUDAAllocator*> CUDACachingAllocator::allocator;  // headers name it

DeviceIndex current_device() { return DeviceIndex(fake::current); }
cudaError_t GetDevice(DeviceIndex* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t SetDevice(DeviceIndex device, bool) {
  return device == fake::current ? cudaSuccess : cudaSetDevice(device);
}
cudaError_t MaybeSetDevice(DeviceIndex device) { return SetDevice(device, false); }
DeviceIndex ExchangeDevice(DeviceIndex device) {
  const DeviceIndex before = current_device();
  SetDevice(device, false);
  return before;
}
CUDAStream getCurrentCUDAStream(DeviceIndex device) {
  if (device < 0) device = current_device();
  return CUDAStream(CUDAStream::UNCHECKED, Stream(Stream::UNSAFE, Device(kCUDA, device), fake::devices[device].stream));
}
cudaStream_t CUDAStream::stream() const { return fake::handle(device_index(), id()); }
void c10_cuda_check_implementation(int32_t error, const char*, const char*, uint32_t, bool) {
  TORCH_CHECK(error == cudaSuccess, "CUDA error ", error);
}

}  // namespace c10::cuda
