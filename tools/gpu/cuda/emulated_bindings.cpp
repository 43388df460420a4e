// The torch side of the CUDA backend (python_bindings/cuda_call.h) on CPU tensors. What it would launch on a GPU goes
// to a callback in test_bindings.py, which runs it in the PTX emulator.
#include <torch/library.h>

#include "../../../python_bindings/cuda_call.h"

namespace {

using namespace ctk::bindings;

// 0, or anything else if the launches failed
using Callback = int (*)(const ctk::cuda::Launch* launches, int64_t count, const void* args, int64_t args_bytes);
Callback callback = nullptr;

constexpr ctk::cuda::Device SMALL{4};  // as many multiprocessors as the emulator of the other tests has

Executor executor() {
  return {SMALL, [](const ctk::cuda::Plan& plan) {
            const int failed =
                callback(plan.launches.data(), int64_t(plan.launches.size()), &plan.args, sizeof plan.args);
            TORCH_CHECK(!failed, "the emulator failed");
          }};
}

Tensor tables(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
              const MaybeTensor& prefix_bias, CTK_PROBLEM_ARGS, bool backward) {
  return cuda_tables(executor(), q, k, v, prefix_k, prefix_v, prefix_bias, CTK_PROBLEM, backward);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                                   const Tensor& prefix_v, const MaybeTensor& prefix_bias, CTK_PROBLEM_ARGS,
                                   CTK_PREPARED_ARGS) {
  return cuda_forward(executor(), q, k, v, prefix_k, prefix_v, prefix_bias, CTK_PROBLEM, CTK_PREPARED);
}

Gradients backward(const Tensor& dout, const MaybeTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& prefix_k, const Tensor& prefix_v, const MaybeTensor& prefix_bias, const Tensor& out,
                   const Tensor& lse, Needs needs, CTK_PROBLEM_ARGS, CTK_PREPARED_ARGS) {
  return cuda_backward(executor(), dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, out, lse, needs, CTK_PROBLEM,
                       CTK_PREPARED);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void set_callback(Callback given) { callback = given; }

TORCH_LIBRARY_FRAGMENT(ctkernels_emulated, m) {
  m.def("cuda_forward" CTK_CUDA_FORWARD_SCHEMA, forward);
  m.def("cuda_backward" CTK_CUDA_BACKWARD_SCHEMA, backward);
  m.def("cuda_tables" CTK_CUDA_TABLES_SCHEMA, tables);
}
