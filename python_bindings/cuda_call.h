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

// What the caller has already: the tables of this pass (cuda_tables), and the prefix in the rows' type.
struct Prepared {
  MaybeTensor tables, prefix_k, prefix_v;
};
#define CTK_PREPARED_ARGS \
  const MaybeTensor &tables, const MaybeTensor &prepared_prefix_k, const MaybeTensor &prepared_prefix_v
#define CTK_PREPARED \
  ctk::bindings::Prepared { tables, prepared_prefix_k, prepared_prefix_v }
#define CTK_PREPARED_SCHEMA "Tensor? tables=None, Tensor? prepared_prefix_k=None, Tensor? prepared_prefix_v=None"
#define CTK_CUDA_INPUTS "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_bias, "
#define CTK_CUDA_FORWARD_SCHEMA "(" CTK_CUDA_INPUTS CTK_PROBLEM_SCHEMA ", " CTK_PREPARED_SCHEMA ") -> (Tensor, Tensor)"
#define CTK_CUDA_BACKWARD_SCHEMA                                                                              \
  "(Tensor dout, Tensor? dlse, " CTK_CUDA_INPUTS "Tensor out, Tensor lse, bool[6] needs, " CTK_PROBLEM_SCHEMA \
  ", " CTK_PREPARED_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
#define CTK_CUDA_TABLES_SCHEMA "(" CTK_CUDA_INPUTS CTK_PROBLEM_SCHEMA ", bool backward) -> Tensor"

// Whether the user allows TF32 in fp32 matrix products. Reading the old setting raises once the new one was written.
inline bool tf32_allowed() {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 10)
  const auto set = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return set == at::Float32Precision::TF32;
#else
  return at::globalContext().allowTF32CuBLAS();
#endif
}

// Params of one call, and the tensors that its pointers point into.
class CudaCall {
 public:
  cuda::Call call{};  // all zero: absent tensors, no options

  CudaCall(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
           const MaybeTensor& prefix_bias, const Problem& problem, const Prepared& prepared = {})
      : tables_(prepared.tables) {
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
    p.prefix_k = tensor4(in_place_of("prefix_k", prefix_k, prepared.prefix_k, q));
    p.prefix_v = tensor4(in_place_of("prefix_v", prefix_v, prepared.prefix_v, q));
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
    if (problem.seed_in_memory)
      call.seed = static_cast<const uint64_t*>(keep_alive(*problem.seed_in_memory).const_data_ptr());
    if (problem.keep) call.keep = static_cast<const uint8_t*>(keep_alive(problem.keep->contiguous()).const_data_ptr());
    call.tf32 = q.scalar_type() == at::kFloat && tf32_allowed();
  }

  // Plans the call, first for the size of its workspace, and runs it. False: there was nothing to run.
  bool run(const Executor& executor, bool backward, const Tensor& q) const try {
    void* tables = nullptr;
    if (tables_) {
      const int64_t bytes = cuda::plan_tables(call, executor.device, nullptr, backward).workspace_bytes;
      TORCH_CHECK_VALUE(tables_->scalar_type() == at::kByte && tables_->device() == q.device() &&
                            tables_->is_contiguous() && tables_->numel() == bytes,
                        "tables must be uint8 [", bytes, "] on ", q.device(), ", made for a call of these sizes, got ",
                        tables_->scalar_type(), " ", tables_->sizes(), " on ", tables_->device());
      tables = tables_->data_ptr();
    }
    const auto plan_pass = backward ? cuda::plan_backward : cuda::plan_forward;
    const int64_t bytes = plan_pass(call, executor.device, nullptr, tables).workspace_bytes;
    const Tensor workspace = at::empty({bytes}, q.options().dtype(at::kByte));
    const cuda::Plan plan = plan_pass(call, executor.device, workspace.data_ptr(), tables);
    if (!plan.launches.empty()) executor.run(plan);
    return !plan.launches.empty();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }

  // The tables of a pass alone.
  Tensor make_tables(const Executor& executor, bool backward, const Tensor& q) const try {
    const int64_t bytes = cuda::plan_tables(call, executor.device, nullptr, backward).workspace_bytes;
    const Tensor tables = at::empty({bytes}, q.options().dtype(at::kByte));
    const cuda::Plan plan = cuda::plan_tables(call, executor.device, tables.data_ptr(), backward);
    if (!plan.launches.empty()) executor.run(plan);
    return tables;
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }

  Tensor keep_alive(const Tensor& t) { return kept_.emplace_back(t); }

 private:
  // slots and lanes are counted in 32 bits, with some to spare for tiles that are not full
  static constexpr int64_t LIMIT = int64_t(1) << 30;

  // The prefix in the rows' type, if there is one.
  static const Tensor& in_place_of(const char* name, const Tensor& prefix, const MaybeTensor& prepared,
                                   const Tensor& q) {
    if (!prepared) return prefix;
    TORCH_CHECK_VALUE(prepared->sizes() == prefix.sizes() && prepared->scalar_type() == q.scalar_type() &&
                          prepared->device() == q.device() && (prefix.size(3) <= 1 || prepared->stride(3) == 1),
                      "a prepared ", name, " must be ", q.scalar_type(), " ", prefix.sizes(), " on ", q.device(),
                      " with a contiguous last dimension, got ", prepared->scalar_type(), " ", prepared->sizes(),
                      " on ", prepared->device());
    return *prepared;
  }

  cuda::Index index(const char* name, const MaybeTensor& t) {
    if (!t) return {};
    const at::ScalarType type = t->scalar_type();
    TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, name, " must be int32 or int64, got ", type);
    return {keep_alive(t->contiguous()).const_data_ptr(), type == at::kLong};
  }

  std::vector<Tensor> kept_;
  MaybeTensor tables_;
};

inline Tensor cuda_tables(const Executor& executor, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& prefix_k, const Tensor& prefix_v, const MaybeTensor& prefix_bias,
                          const Problem& problem, bool backward) {
  return CudaCall(q, k, v, prefix_k, prefix_v, prefix_bias, problem).make_tables(executor, backward, q);
}

inline std::tuple<Tensor, Tensor> cuda_forward(const Executor& executor, const Tensor& q, const Tensor& k,
                                               const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                                               const MaybeTensor& prefix_bias, const Problem& problem,
                                               const Prepared& prepared) {
  CudaCall call(q, k, v, prefix_k, prefix_v, prefix_bias, problem, prepared);
  const Tensor out = empty_rows(q, v.size(3), false);
  const Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  call.call.p.out = tensor4(out), call.call.p.lse = tensor4(lse);
  if (!call.run(executor, false, q)) out.zero_(), lse.fill_(-std::numeric_limits<float>::infinity());
  return {out, lse};
}

inline Gradients cuda_backward(const Executor& executor, const Tensor& dout, const MaybeTensor& dlse, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                               const MaybeTensor& prefix_bias, const Tensor& out, const Tensor& lse, const Needs& needs,
                               const Problem& problem, const Prepared& prepared) {
  CudaCall call(q, k, v, prefix_k, prefix_v, prefix_bias, problem, prepared);
  check_gradients(q, v, dout, dlse, prefix_bias, out, lse, needs);
  Params& p = call.call.p;
  p.out = tensor4(out);
  p.dout = tensor4(dout.stride(3) == 1 ? dout : call.keep_alive(dout.contiguous()));
  p.lse = tensor4(call.keep_alive(lse.contiguous()));
  if (dlse) p.dlse = tensor4(call.keep_alive(dlse->to(at::kFloat).contiguous()));

  Tensor dq, dk, dv, dprefix_k, dprefix_v, dbias;
  if (needs[0]) dq = empty_rows(q, q.size(3), false), p.dq = tensor4(dq);
  if (needs[1]) dk = empty_rows(k, k.size(3), false), p.dk = tensor4(dk);
  if (needs[2]) dv = empty_rows(v, v.size(3), false), p.dv = tensor4(dv);
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
  if (any && !call.run(executor, true, q))
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
