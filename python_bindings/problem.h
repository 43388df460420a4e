// What the torch sides of the C++ backends share: the arguments of the registered operators, and their checks.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "../csrc/params.h"

namespace ctk::bindings {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Needs = std::array<bool, 6>;  // which of the gradients

// The fields of ctkernels.problem.Problem but the backend's name, in order.
struct Problem {
  MaybeTensor alibi_slopes, cu_seqlens, seq_lens, prefix_index, prefix_lens, hidden, row_ids, keep, seed_in_memory;
  int64_t context_length;
  double drop_p;
  int64_t seed;
  double scale;
  bool causal;
  int64_t window;
  bool window_prefix;
  double softcap;
};

// ... and how they stand in the signature and in the schema of an operator
#define CTK_PROBLEM_ARGS                                                                                              \
  const MaybeTensor &alibi_slopes, const MaybeTensor &cu_seqlens, const MaybeTensor &seq_lens,                        \
      const MaybeTensor &prefix_index, const MaybeTensor &prefix_lens, const MaybeTensor &hidden,                     \
      const MaybeTensor &row_ids, const MaybeTensor &keep, const MaybeTensor &seed_in_memory, int64_t context_length, \
      double drop_p, int64_t seed, double scale, bool causal, int64_t window, bool window_prefix, double softcap
#define CTK_PROBLEM                                                                                       \
  ctk::bindings::Problem {                                                                                \
    alibi_slopes, cu_seqlens, seq_lens, prefix_index, prefix_lens, hidden, row_ids, keep, seed_in_memory, \
        context_length, drop_p, seed, scale, causal, window, window_prefix, softcap                       \
  }
#define CTK_PROBLEM_SCHEMA                                                                                    \
  "Tensor? alibi_slopes, Tensor? cu_seqlens, Tensor? seq_lens, Tensor? prefix_index, Tensor? prefix_lens, "   \
  "Tensor? hidden, Tensor? row_ids, Tensor? keep, Tensor? seed_in_memory, int context_length, float drop_p, " \
  "int seed, float scale, bool causal, int window, bool window_prefix, float softcap"
#define CTK_FORWARD_SCHEMA                                                                                    \
  "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_bias, " CTK_PROBLEM_SCHEMA \
  ") -> (Tensor, Tensor)"
#define CTK_BACKWARD_SCHEMA_END                                                           \
  "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_bias, " \
  "Tensor out, Tensor lse, bool[6] needs, " CTK_PROBLEM_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kDouble: return Type::f64;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: TORCH_CHECK_TYPE(false, "expected a floating tensor, got ", t.scalar_type());
  }
}

inline Tensor4 tensor4(const Tensor& t) { return {t.data_ptr(), type_of(t), t.stride(0), t.stride(1), t.stride(2)}; }

// Type of the softmax and of all accumulation.
inline at::ScalarType compute_type(const Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline uint32_t drop_threshold(double drop_p) { return uint32_t(std::floor(drop_p * 4294967296.0)); }

// The seed of token dropout of a call whose tensors are on the CPU.
inline uint64_t seed_of(const Problem& problem) {
  return uint64_t(problem.seed_in_memory ? *problem.seed_in_memory->const_data_ptr<int64_t>() : problem.seed);
}

inline int64_t row_count(const Tensor& q, const Problem& problem) {
  return problem.cu_seqlens ? problem.cu_seqlens->numel() - 1 : q.size(0);
}

// The operators can be called without attention.py; inconsistent tensors must not reach memory that is not theirs.
inline void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                         const Tensor& prefix_v, const MaybeTensor& bias, const Problem& problem) {
  for (const Tensor* t : {&q, &k, &v, &prefix_k, &prefix_v})
    TORCH_CHECK_VALUE(t->dim() == 4 && (t->size(3) <= 1 || t->stride(3) == 1) && t->device() == q.device(),
                      "expected a 4-dimensional tensor on ", q.device(), " with a contiguous last dimension, got ",
                      t->sizes(), " on ", t->device());
  const int64_t D = q.size(3), Dv = v.size(3), H = q.size(1), Hk = k.size(1);
  const bool rows_fit = k.sizes().slice(0, 3) == v.sizes().slice(0, 3) && k.size(0) == q.size(0) && k.size(3) == D &&
                        k.size(2) >= q.size(2) && Hk > 0 && H % Hk == 0 && std::min(D, Dv) >= 1 &&
                        std::max(D, Dv) <= MAX_HEAD_DIM && k.scalar_type() == q.scalar_type() &&
                        v.scalar_type() == q.scalar_type();
  TORCH_CHECK_VALUE(rows_fit, "q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(), " do not fit together");
  TORCH_CHECK_VALUE(prefix_k.sizes().slice(0, 3) == prefix_v.sizes().slice(0, 3) && prefix_k.size(1) == Hk &&
                        prefix_k.size(3) == D && prefix_v.size(3) == Dv &&
                        prefix_k.scalar_type() == prefix_v.scalar_type() &&
                        (q.scalar_type() == at::kDouble) == (prefix_k.scalar_type() == at::kDouble),
                    "prefix_k ", prefix_k.sizes(), " and prefix_v ", prefix_v.sizes(), " do not fit k ", k.sizes(),
                    " and v ", v.sizes());
  const int64_t G = prefix_k.size(0), P = prefix_k.size(2), B = row_count(q, problem);
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 3 && (bias->size(0) == 1 || bias->size(0) == G) &&
                (bias->size(1) == 1 || bias->size(1) == H) && bias->size(2) == P && bias->device() == q.device()),
      "prefix_bias must be [1 or ", G, ", 1 or ", H, ", ", P, "] on ", q.device(), ", got ", bias->sizes(), " on ",
      bias->device());
  TORCH_CHECK_VALUE(problem.drop_p >= 0 && problem.drop_p < 1, "drop_p must be in [0, 1), got ", problem.drop_p);
  TORCH_CHECK_VALUE(problem.context_length >= 0 && problem.window >= 0,
                    "context_length and window must not be negative, got ", problem.context_length, " and ",
                    problem.window);
  TORCH_CHECK_VALUE(
      !problem.cu_seqlens || (problem.cu_seqlens->dim() == 1 && B >= 0 && problem.cu_seqlens->device() == q.device()),
      "cu_seqlens must be a tensor [B+1] on ", q.device(), ", got ", problem.cu_seqlens->sizes());
  TORCH_CHECK_VALUE(!problem.cu_seqlens || (q.size(0) == 1 && k.size(2) == q.size(2) && !problem.seq_lens),
                    "packed rows need q and k of batch size 1 and equal length, and no seq_lens");
  const auto expect = [&](const char* name, const MaybeTensor& t, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(!t || (t->sizes() == sizes && t->device() == q.device()), name, " must be a tensor ", sizes,
                      " on ", q.device(), ", got ", t->sizes(), " on ", t->device());
  };
  expect("seq_lens", problem.seq_lens, {B}), expect("prefix_index", problem.prefix_index, {B});
  expect("prefix_lens", problem.prefix_lens, {G}), expect("row_ids", problem.row_ids, {B});
  expect("alibi_slopes", problem.alibi_slopes, {H});
  expect("hidden", problem.hidden, {B, 2}), expect("keep", problem.keep, {B, problem.context_length});
  TORCH_CHECK_VALUE(!problem.keep || problem.keep->scalar_type() == at::kBool, "keep must be a bool tensor");
  expect("seed_in_memory", problem.seed_in_memory, {1});
  TORCH_CHECK_VALUE(!problem.seed_in_memory || problem.seed_in_memory->scalar_type() == at::kLong,
                    "seed_in_memory must be an int64 tensor");
}

// What backward gets beside the inputs of forward.
inline void check_gradients(const Tensor& q, const Tensor& v, const Tensor& dout, const MaybeTensor& dlse,
                            const MaybeTensor& bias, const Tensor& out, const Tensor& lse, const Needs& needs) {
  const std::array<int64_t, 4> sizes{q.size(0), q.size(1), q.size(2), v.size(3)};
  TORCH_CHECK_VALUE(dout.sizes() == sizes && out.sizes() == sizes, "dout ", dout.sizes(), " and out ", out.sizes(),
                    " must have shape ", at::IntArrayRef(sizes));
  TORCH_CHECK_VALUE(dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type() &&
                        lse.scalar_type() == compute_type(q),
                    "dout and out must have q's type, lse the compute type");
  TORCH_CHECK_VALUE(lse.sizes() == q.sizes().slice(0, 3) && (!dlse || dlse->sizes() == lse.sizes()),
                    "lse and dlse must be [B, H, S] as q ", q.sizes(), ", got ", lse.sizes());
  for (const Tensor* t : {&dout, &out, &lse, dlse ? &*dlse : &lse})
    TORCH_CHECK_VALUE(t->device() == q.device(), "dout, dlse, out and lse must be on ", q.device(), ", got ",
                      t->device());
  TORCH_CHECK_VALUE(!needs[5] || bias, "the gradient of an absent prefix_bias is asked for");
  TORCH_CHECK_VALUE(out.size(3) <= 1 || out.stride(3) == 1, "out must have a contiguous last dimension");
}

// [B, H, S, D], as x [B, H, S, ..], in memory order B, S, H, D: what the layers around attention read and write
inline Tensor empty_rows(const Tensor& x, int64_t D, bool zero) {
  const auto sizes = {x.size(0), x.size(2), x.size(1), D};
  return (zero ? at::zeros(sizes, x.options()) : at::empty(sizes, x.options())).transpose(1, 2);
}

// A gradient in the type of its tensor; one that is not needed has zero elements.
inline Tensor gradient_as(const Tensor& gradient, const Tensor& like) {
  return gradient.defined() ? gradient.to(like.scalar_type()) : at::empty({0}, like.options());
}

}  // namespace ctk::bindings
