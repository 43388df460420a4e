// Torch side of the CPU backend: turns tensors into Params and registers the operators that ctkernels/backends/cpu.py
// calls. Arguments have been checked in Python (attention.py for shapes and types, ops.py for values).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/arena.h"
#include "../csrc/cpu/select.h"
#include "problem.h"

namespace {

using namespace ctk::bindings;

MaybeTensor as_int64(const MaybeTensor& t) { return t ? MaybeTensor(t->to(at::kLong).contiguous()) : std::nullopt; }

int64_t element(const MaybeTensor& t, int64_t i, int64_t otherwise) {
  return t ? t->const_data_ptr<int64_t>()[i] : otherwise;
}

ctk::cpu::Pool pool() {
  const int workers = at::get_num_threads();
  return {workers, [workers](const std::function<void(int)>& body) {
            at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(int(worker));
            });
          }};
}

// Params, and everything that its pointers point into.
struct Call {
  ctk::Params p{};
  std::vector<ctk::Row> rows;
  Tensor bias, alibi, keep;
  at::ScalarType compute;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
       const MaybeTensor& prefix_bias, const Problem& problem) {
    TORCH_CHECK_VALUE(q.is_cpu(), "expected CPU tensors, got q on ", q.device());
    check_inputs(q, k, v, prefix_k, prefix_v, prefix_bias, problem);
    compute = compute_type(q);
    p.H = q.size(1), p.D = q.size(3), p.Dv = v.size(3), p.Hk = k.size(1), p.G = prefix_k.size(0),
    p.P = prefix_k.size(2);
    p.q = tensor4(q), p.k = tensor4(k), p.v = tensor4(v);
    p.prefix_k = tensor4(prefix_k), p.prefix_v = tensor4(prefix_v);
    if (prefix_bias) {
      bias = prefix_bias->detach().to(compute).contiguous();
      p.bias = bias.const_data_ptr();
      p.bias_prefix = bias.size(0) > 1 ? bias.stride(0) : 0;
      p.bias_head = bias.size(1) > 1 ? bias.stride(1) : 0;
    }
    if (problem.alibi_slopes) {
      alibi = problem.alibi_slopes->to(compute).contiguous();
      p.alibi = alibi.const_data_ptr();
    }
    p.scale = problem.scale, p.softcap = problem.softcap;
    p.causal = problem.causal, p.window_prefix = problem.window_prefix;
    p.window = std::min(problem.window, p.P + k.size(2) + 1);  // no key is farther away, and sums do not overflow
    p.rule = {problem.context_length, drop_threshold(problem.drop_p), seed_of(problem)};
    set_rows(q, k, problem);
  }

  // The values that index memory, with the messages of ctkernels/problem.py.
  void check_values(int64_t N, int64_t T, const MaybeTensor& cu_seqlens, const MaybeTensor& seq_lens,
                    const MaybeTensor& index, const MaybeTensor& prefix_lens, const MaybeTensor& hidden,
                    const MaybeTensor& ids) const {
    const auto within = [](const char* name, const MaybeTensor& t, int64_t last, const char* range) {
      for (int64_t i = 0; t && i < t->numel(); ++i) {
        const int64_t x = element(t, i, 0);
        TORCH_CHECK_VALUE(x >= 0 && x <= last, name, " must be in [0, ", range ? range : std::to_string(last) + "]",
                          ", got ", x);
      }
    };
    for (int64_t b = 0; hidden && b < p.B; ++b) {
      const int64_t start = element(hidden, 2 * b, 0), end = element(hidden, 2 * b + 1, 0);
      TORCH_CHECK_VALUE(0 <= start && start <= end && end <= p.rule.length,
                        "hidden must hold spans with 0 <= start <= end <= ", p.rule.length, " context positions, got (",
                        start, ", ", end, ") in row ", b);
    }
    within("row_ids", ids, 0xFFFFFFFF, "2^32)");
    within("prefix_index", index, p.G - 1, nullptr);
    within("prefix_lens", prefix_lens, p.P, nullptr);
    within("seq_lens", seq_lens, T, nullptr);
    TORCH_CHECK_VALUE(index || p.G > 0 || !p.B,
                      "prefix_k must hold at least one prefix (G >= 1) when there are rows, got G = 0");
    bool ordered = true;
    for (int64_t b = 0; cu_seqlens && b < p.B; ++b)
      ordered = ordered && element(cu_seqlens, b, 0) <= element(cu_seqlens, b + 1, 0);
    TORCH_CHECK_VALUE(
        !cu_seqlens || (ordered && element(cu_seqlens, 0, 0) == 0 && element(cu_seqlens, p.B, 0) == N),
        "cu_seqlens must start at 0, never decrease and end at N = ", N, ", got ",
        at::ArrayRef<int64_t>(cu_seqlens ? cu_seqlens->const_data_ptr<int64_t>() : nullptr, cu_seqlens ? p.B + 1 : 0));
  }

  void set_rows(const Tensor& q, const Tensor& k, const Problem& problem) {
    const MaybeTensor cu_seqlens = as_int64(problem.cu_seqlens), seq_lens = as_int64(problem.seq_lens);
    const MaybeTensor index = as_int64(problem.prefix_index), prefix_lens = as_int64(problem.prefix_lens);
    const MaybeTensor hidden = as_int64(problem.hidden), ids = as_int64(problem.row_ids);
    if (problem.keep) keep = problem.keep->contiguous();
    p.B = row_count(q, problem);
    const int64_t S = q.size(2), T = k.size(2);
    check_values(S, T, cu_seqlens, seq_lens, index, prefix_lens, hidden, ids);
    rows.resize(p.B);
    for (int64_t b = 0; b < p.B; ++b) {
      ctk::Row& row = rows[b];
      if (cu_seqlens) {
        row.token = element(cu_seqlens, b, 0);
        row.queries = row.keys = element(cu_seqlens, b + 1, 0) - row.token;
      } else {
        row.batch = b;
        row.keys = element(seq_lens, b, T);
        row.queries = T == S ? row.keys : S;
        row.offset = T == S ? 0 : row.keys - S;
      }
      row.prefix = element(index, b, 0);
      row.prefix_len = element(prefix_lens, row.prefix, p.P);
      row.context.id = uint32_t(element(ids, b, b));
      row.context.hidden_start = element(hidden, 2 * b, 0);
      row.context.hidden_end = element(hidden, 2 * b + 1, 0);
      if (keep.defined())
        row.context.keep = reinterpret_cast<const uint8_t*>(keep.const_data_ptr<bool>()) + b * keep.size(1);
      p.max_own = std::max(p.max_own, row.keys);
    }
    p.rows = rows.data();
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                                   const Tensor& prefix_v, const MaybeTensor& prefix_bias, CTK_PROBLEM_ARGS) {
  Call call(q, k, v, prefix_k, prefix_v, prefix_bias, CTK_PROBLEM);
  const bool padded = seq_lens.has_value();
  Tensor out = empty_rows(q, v.size(3), padded);
  Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(call.compute));
  if (padded) lse.fill_(-std::numeric_limits<double>::infinity());
  call.p.out = tensor4(out), call.p.lse = tensor4(lse);
  ctk::cpu::selected()->forward(call.p, pool());
  return {out, lse};
}

// ds_sum [B, H, S]: what ds adds up to over the keys of a query, where that is not dlse.
Gradients backward(const Tensor& dout, const MaybeTensor& dlse, const MaybeTensor& ds_sum, const Tensor& q,
                   const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                   const MaybeTensor& prefix_bias, const Tensor& out, const Tensor& lse, Needs needs,
                   CTK_PROBLEM_ARGS) {
  Call call(q, k, v, prefix_k, prefix_v, prefix_bias, CTK_PROBLEM);
  ctk::Params& p = call.p;
  const bool padded = seq_lens.has_value();
  check_gradients(q, v, dout, dlse, prefix_bias, out, lse, needs);
  TORCH_CHECK_VALUE(!ds_sum || (ds_sum->sizes() == lse.sizes() && ds_sum->device() == q.device()),
                    "ds_sum must be [B, H, S] as lse ", lse.sizes());
  const Tensor dout_rows = dout.stride(3) == 1 ? dout : dout.contiguous();
  const auto contiguous = [&](const MaybeTensor& t) { return t ? t->to(call.compute).contiguous() : Tensor(); };
  const Tensor lse_rows = lse.contiguous(), dlse_rows = contiguous(dlse), ds_sum_rows = contiguous(ds_sum);
  p.out = tensor4(out), p.lse = tensor4(lse_rows), p.dout = tensor4(dout_rows);
  if (dlse) p.dlse = tensor4(dlse_rows);
  if (ds_sum) p.ds_sum = tensor4(ds_sum_rows);

  Tensor dq, dk, dv, dprefix_k, dprefix_v, dbias;
  if (needs[0]) dq = empty_rows(q, q.size(3), padded), p.dq = tensor4(dq);
  if (needs[1]) dk = empty_rows(k, k.size(3), padded), p.dk = tensor4(dk);
  if (needs[2]) dv = empty_rows(v, v.size(3), padded), p.dv = tensor4(dv);
  // the prefix gradients are summed in the compute type
  const auto options = q.options().dtype(call.compute);
  if (needs[3]) dprefix_k = at::empty(prefix_k.sizes(), options), p.dprefix_k = tensor4(dprefix_k);
  if (needs[4]) dprefix_v = at::empty(prefix_v.sizes(), options), p.dprefix_v = tensor4(dprefix_v);
  if (needs[5]) {
    dbias = at::zeros({p.G, p.H, p.P}, options);
    p.dbias = dbias.data_ptr(), p.dbias_prefix = dbias.stride(0), p.dbias_head = dbias.stride(1);
  }
  ctk::cpu::selected()->backward(p, pool());

  if (needs[5]) dbias = dbias.sum_to_size(prefix_bias->sizes());
  return {gradient_as(dq, q),
          gradient_as(dk, k),
          gradient_as(dv, v),
          gradient_as(dprefix_k, prefix_k),
          gradient_as(dprefix_v, prefix_v),
          gradient_as(dbias, prefix_bias ? *prefix_bias : q)};
}

std::vector<std::string> cpu_isa() {
  std::vector<std::string> names{ctk::cpu::selected()->name};
  for (const ctk::cpu::Kernels* kernels : ctk::cpu::available()) names.emplace_back(kernels->name);
  return names;
}

// How many threads a call really runs on: a build without OpenMP would run every worker on the calling thread.
int64_t cpu_workers() {
  const ctk::cpu::Pool workers = pool();
  std::vector<std::thread::id> ran_on(workers.workers);
  workers.run([&](int worker) { ran_on[worker] = std::this_thread::get_id(); });
  return int64_t(std::set<std::thread::id>(ran_on.begin(), ran_on.end()).size());
}

// Frees the scratch memory that threads keep between calls.
void cpu_release() {
  pool().run([](int) { ctk::cpu::Arena::release(); });
}

void set_cpu_isa(const std::string& name) {
  std::string known;
  for (const ctk::cpu::Kernels* kernels : ctk::cpu::available()) {
    if (name == kernels->name) {
      ctk::cpu::selected() = kernels;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  TORCH_CHECK_VALUE(false, "the instruction set must be one of ", known, " on this machine, got '", name, "'");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ctkernels, m) {
  m.def("cpu_forward" CTK_FORWARD_SCHEMA);
  m.def("cpu_backward(Tensor dout, Tensor? dlse, Tensor? ds_sum, " CTK_BACKWARD_SCHEMA_END);
  m.def("cpu_isa() -> str[]", cpu_isa);
  m.def("cpu_workers() -> int", cpu_workers);
  m.def("cpu_release() -> ()", cpu_release);
  m.def("set_cpu_isa(str name) -> ()", [](std::string name) { set_cpu_isa(name); });
}

TORCH_LIBRARY_IMPL(ctkernels, CPU, m) {
  m.impl("cpu_forward", forward);
  m.impl("cpu_backward", backward);
}
