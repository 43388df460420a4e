// Torch side of the CUDA backend: launches the kernels on the current stream, and registers the operators that
// ctkernels/backends/cuda.py calls. Values that index memory are not read here, since that would wait for the GPU:
// the kernels clamp them.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <utility>

#include "../csrc/cuda/kernels.h"
#include "cuda_call.h"

namespace {

using namespace ctk::bindings;

// Loads every kernel that rows of one type may need, once per device. Otherwise CUDA loads a kernel when it is launched
// first, which a stream that is being captured does not allow; and which kernels a call needs depends on its sizes, so
// that a call before the capture need not have launched all of them. If that first call is captured itself, loading is
// safe: it adds nothing to the stream.
//
// Each kernel may then have as much dynamic shared memory as plan.h asks for. Without permission it is 48 KiB.
void load_kernels(ctk::Type rows) {
  static std::mutex mutex;
  static std::set<std::pair<int, ctk::Type>> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int, ctk::Type> wanted{c10::cuda::current_device(), rows};
  if (loaded.count(wanted)) return;
  const c10::cuda::CUDAStreamCaptureModeGuard guard(cudaStreamCaptureModeRelaxed);
  for (const ctk::cuda::KernelEntry* entry : {ctk::cuda::common_kernels(), ctk::cuda::kernels_of(rows)})
    for (; entry->name; ++entry) {
      cudaFuncAttributes attributes;  // to ask for them loads the kernel
      C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, entry->kernel));
      C10_CUDA_CHECK(
          cudaFuncSetAttribute(entry->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ctk::cuda::SHARED_LIMIT));
    }
  loaded.insert(wanted);
}

void launch(const ctk::cuda::Plan& plan) {
  load_kernels(plan.args.call.p.q.type);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  void* arguments[] = {const_cast<ctk::cuda::Args*>(&plan.args)};
  for (const ctk::cuda::Launch& l : plan.launches) {
    const void* kernel = ctk::cuda::find_kernel(l.name);
    TORCH_CHECK(kernel, "this build has no kernel ", l.name);
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
