// A call of the CUDA kernels, from tensors to the list of launches: checks, params, outputs, workspace. Knows torch but
// not CUDA: the caller runs the launches (cuda.cpp on a GPU; the tests in an emulator, on CPU tensors).
#pragma once
#include <ATen/Context.h>
#include <torch/version.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../csrc/cuda/plan.h"
#include "problem.h"

namespace ctk::bindings {

struct Executor {
  cuda::Device device;
  std::function<void(const cuda::Plan&)> run;  // its launches in order, on the current stream
};

// Whether the user allows TF32 in fp32 matrix products. Reading the old setting raises once the new one was written.
inline bool tf32_allowed() {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10)
  const auto set = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return set == at::Float32Precision::TF32;
#else
  return at::globalContext().allowTF32CuBLAS();
#endif
}

// Whether tokens may belong to no row: padding, or tokens after the last packed row. No kernel writes there.
inline bool may_have_idle_tokens(const Problem& problem) {
  return problem.seq_lens.has_value() || problem.cu_seqlens.has_value();
}

// Params of one call, and the tensors that its pointers point into.
class CudaCall {
 public:
  cuda::Call call{};  // all zero: absent tensors, no options

  CudaCall(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
           const MaybeTensor& prefix_bias, const Problem& problem) {
    check_inputs(q, k, v, prefix_k, prefix_v, prefix_bias, problem);
    TORCH_CHECK_TYPE(q.scalar_type() != at::kDouble, "q must be fp32, bf16 or fp16, got ", q.scalar_type());
    Params& p = call.p;
    p.B = row_count(q, problem);
    p.H = q.size(1), p.D = q.size(3), p.Dv = v.size(3), p.Hk = k.size(1), p.G = prefix_k.size(0),
    p.P = prefix_k.size(2);
    TORCH_CHECK_VALUE(p.G > 0 || !p.B,
                      "prefix_k must hold at least one prefix (G >= 1) when there are rows, got G = 0");
    call.S = q.size(2), call.T = k.size(2), call.packed = problem.cu_seqlens.has_value();
    const int64_t lanes = q.size(0) * call.S * (p.H / p.Hk), longest = std::max({lanes, call.T * q.size(0), p.P});
    TORCH_CHECK_VALUE(longest < LIMIT, "rows and prefixes must have fewer than ", LIMIT,
                      " queries x heads per KV head, and keys, got ", longest);
    p.q = tensor4(q), p.k = tensor4(k), p.v = tensor4(v);
    p.prefix_k = tensor4(prefix_k), p.prefix_v = tensor4(prefix_v);
    if (prefix_bias) {
      const Tensor bias = keep_alive(prefix_bias->detach().to(at::kFloat).contiguous());
      p.bias = bias.const_data_ptr();
      p.bias_prefix = bias.size(0) > 1 ? bias.stride(0) : 0;
      p.bias_head = bias.size(1) > 1 ? bias.stride(1) : 0;
    }
    if (problem.alibi_slopes) p.alibi = keep_alive(problem.alibi_slopes->to(at::kFloat).contiguous()).const_data_ptr();
    p.scale = problem.scale, p.softcap = problem.softcap;
    p.causal = problem.causal, p.window_prefix = problem.window_prefix;
    p.window = std::min(problem.window, p.P + call.T + 1);  // no key is farther away, and sums do not overflow
    p.rule = {problem.context_length, drop_threshold(problem.drop_p), uint64_t(problem.seed)};
    call.cu_seqlens = index("cu_seqlens", problem.cu_seqlens), call.seq_lens = index("seq_lens", problem.seq_lens);
    call.prefix_index = index("prefix_index", problem.prefix_index);
    call.prefix_lens = index("prefix_lens", problem.prefix_lens);
    call.hidden = index("hidden", problem.hidden), call.row_ids = index("row_ids", problem.row_ids);
    if (problem.keep) call.keep = static_cast<const uint8_t*>(keep_alive(problem.keep->contiguous()).const_data_ptr());
    call.tf32 = q.scalar_type() == at::kFloat && tf32_allowed();
  }

  // Plans the call, first for the size of its workspace, and runs it. False: there was nothing to run.
  template <class Planner>
  bool run(const Executor& executor, Planner plan_pass, const Tensor& q) const try {
    const int64_t bytes = plan_pass(call, executor.device, nullptr).workspace_bytes;
    const Tensor workspace = at::empty({bytes}, q.options().dtype(at::kByte));
    const cuda::Plan plan = plan_pass(call, executor.device, workspace.data_ptr());
    if (!plan.launches.empty()) executor.run(plan);
    return !plan.launches.empty();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }

  Tensor keep_alive(const Tensor& t) { return kept_.emplace_back(t); }

 private:
  // slots and lanes are counted in 32 bits, with some to spare for tiles that are not full
  static constexpr int64_t LIMIT = int64_t(1) << 30;

  cuda::Index index(const char* name, const MaybeTensor& t) {
    if (!t) return {};
    const at::ScalarType type = t->scalar_type();
    TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, name, " must be int32 or int64, got ", type);
    return {keep_alive(t->contiguous()).const_data_ptr(), type == at::kLong};
  }

  std::vector<Tensor> kept_;
};

inline std::tuple<Tensor, Tensor> cuda_forward(const Executor& executor, const Tensor& q, const Tensor& k,
                                               const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                                               const MaybeTensor& prefix_bias, const Problem& problem) {
  CudaCall call(q, k, v, prefix_k, prefix_v, prefix_bias, problem);
  const bool idle = may_have_idle_tokens(problem);
  const Tensor out = empty_rows(q, v.size(3), idle);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (idle) lse.fill_(-std::numeric_limits<float>::infinity());
  call.call.p.out = tensor4(out), call.call.p.lse = tensor4(lse);
  call.run(executor, cuda::plan_forward, q);
  return {out, lse};
}

inline Gradients cuda_backward(const Executor& executor, const Tensor& dout, const MaybeTensor& dlse, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                               const MaybeTensor& prefix_bias, const Tensor& out, const Tensor& lse, const Needs& needs,
                               const Problem& problem) {
  CudaCall call(q, k, v, prefix_k, prefix_v, prefix_bias, problem);
  check_gradients(q, v, dout, dlse, prefix_bias, out, lse, needs);
  Params& p = call.call.p;
  p.out = tensor4(out);
  p.dout = tensor4(dout.stride(3) == 1 ? dout : call.keep_alive(dout.contiguous()));
  p.lse = tensor4(call.keep_alive(lse.contiguous()));
  if (dlse) p.dlse = tensor4(call.keep_alive(dlse->to(at::kFloat).contiguous()));

  const bool idle = may_have_idle_tokens(problem);
  Tensor dq, dk, dv, dprefix_k, dprefix_v, dbias;
  if (needs[0]) dq = empty_rows(q, q.size(3), idle), p.dq = tensor4(dq);
  if (needs[1]) dk = empty_rows(k, k.size(3), idle), p.dk = tensor4(dk);
  if (needs[2]) dv = empty_rows(v, v.size(3), idle), p.dv = tensor4(dv);
  // accumulated in fp32 and rounded once, when they are stored
  if (needs[3]) dprefix_k = at::empty(prefix_k.sizes(), prefix_k.options()), p.dprefix_k = tensor4(dprefix_k);
  if (needs[4]) dprefix_v = at::empty(prefix_v.sizes(), prefix_v.options()), p.dprefix_v = tensor4(dprefix_v);
  if (needs[5]) {
    dbias = at::empty(prefix_bias->sizes(), q.options().dtype(at::kFloat));
    p.dbias = dbias.data_ptr();
    p.dbias_prefix = dbias.size(0) > 1 ? dbias.stride(0) : 0;
    p.dbias_head = dbias.size(1) > 1 ? dbias.stride(1) : 0;
  }
  const bool any = std::any_of(needs.begin(), needs.end(), [](bool need) { return need; });
  if (any && !call.run(executor, cuda::plan_backward, q))
    for (Tensor* gradient : {&dq, &dk, &dv, &dprefix_k, &dprefix_v, &dbias})
      if (gradient->defined()) gradient->zero_();
  return {gradient_as(dq, q),
          gradient_as(dk, k),
          gradient_as(dv, v),
          gradient_as(dprefix_k, prefix_k),
          gradient_as(dprefix_v, prefix_v),
          gradient_as(dbias, prefix_bias ? *prefix_bias : q)};
}

}  // namespace ctk::bindings
