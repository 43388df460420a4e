// Torch side of the CUDA backend: launches the kernels on the current stream, and registers the operators that
// ctkernels/backends/cuda.py calls. Values that index memory are not read here, since that would wait for the GPU:
// the kernels clamp them.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <map>
#include <mutex>

#include "../csrc/cuda/kernels.h"
#include "cuda_call.h"

namespace {

using namespace ctk::bindings;

constexpr uint32_t DEFAULT_SHARED_LIMIT = 48 * 1024;

// Requests dynamic shared memory beyond the default limit, once per kernel and device.
void allow_shared(const void* kernel, uint32_t bytes) {
  if (bytes <= DEFAULT_SHARED_LIMIT) return;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, uint32_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  uint32_t& most = allowed[{c10::cuda::current_device(), kernel}];
  if (bytes <= most) return;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  most = bytes;
}

void launch(const ctk::cuda::Plan& plan) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  void* arguments[] = {const_cast<ctk::cuda::Args*>(&plan.args)};
  for (const ctk::cuda::Launch& l : plan.launches) {
    const void* kernel = ctk::cuda::find_kernel(l.name);
    TORCH_CHECK(kernel, "this build has no kernel ", l.name);
    allow_shared(kernel, l.shared);
    const dim3 grid(l.grid[0], l.grid[1], l.grid[2]), block(l.block);
    C10_CUDA_CHECK(cudaLaunchKernel(kernel, grid, block, arguments, l.shared, stream));
  }
}

Executor executor() {
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, c10::cuda::current_device()));
  return {{multiprocessors}, launch};
}

Tensor tables(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
              const MaybeTensor& prefix_bias, CTK_PROBLEM_ARGS, bool backward) {
  const c10::cuda::CUDAGuard guard(q.device());
  return cuda_tables(executor(), q, k, v, prefix_k, prefix_v, prefix_bias, CTK_PROBLEM, backward);
}

// The current stream of x's device, and the graph that it is captured into, 0 for none.
std::vector<int64_t> order(const Tensor& x) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(x.device().index());
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return {int64_t(reinterpret_cast<uintptr_t>(stream)), status == cudaStreamCaptureStatusNone ? 0 : int64_t(id)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                                   const Tensor& prefix_v, const MaybeTensor& prefix_bias, CTK_PROBLEM_ARGS,
                                   CTK_PREPARED_ARGS) {
  TORCH_CHECK_VALUE(q.is_cuda(), "expected CUDA tensors, got q on ", q.device());
  const c10::cuda::CUDAGuard guard(q.device());
  return cuda_forward(executor(), q, k, v, prefix_k, prefix_v, prefix_bias, CTK_PROBLEM, CTK_PREPARED);
}

Gradients backward(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& prefix_k, const Tensor& prefix_v, const MaybeTensor& prefix_bias, const Tensor& out,
                   const Tensor& lse, Needs needs, CTK_PROBLEM_ARGS, CTK_PREPARED_ARGS) {
  TORCH_CHECK_VALUE(q.is_cuda(), "expected CUDA tensors, got q on ", q.device());
  const c10::cuda::CUDAGuard guard(q.device());
  return cuda_backward(executor(), dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, out, lse, needs, CTK_PROBLEM,
                       CTK_PREPARED);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ctkernels, m) {
  m.def("cuda_forward" CTK_CUDA_FORWARD_SCHEMA);
  m.def("cuda_backward" CTK_CUDA_BACKWARD_SCHEMA);
  m.def("cuda_tables" CTK_CUDA_TABLES_SCHEMA);
  m.def("cuda_order(Tensor x) -> int[]");
  m.def("cuda_has_kernel(str name) -> bool",
        [](std::string name) { return ctk::cuda::find_kernel(name.c_str()) != nullptr; });
}

TORCH_LIBRARY_IMPL(ctkernels, CUDA, m) {
  m.impl("cuda_forward", forward);
  m.impl("cuda_backward", backward);
  m.impl("cuda_tables", tables);
  m.impl("cuda_order", order);
}
