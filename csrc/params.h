// One call of the op, as plain pointers and sizes: what every C++ backend receives.
#pragma once
#include <cstdint>

#include "mask.h"

namespace ctk {

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

constexpr int MAX_HEAD_DIM = 512;

enum class Type : int32_t { f32, f64, bf16, f16 };

inline int64_t size_of(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

// A [batch, head, token, D] tensor (values and what is made of them: Dv) with a contiguous last dimension; strides in
// elements. Null data: absent.
struct Tensor4 {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t batch = 0, head = 0, token = 0;
};

// A row: a run of queries and the keys that are its own. Positions count from the row's first own key.
struct Row {
  int64_t batch;       // index into the batch dimension of q, k, v
  int64_t token;       // first token of the row there (packed rows)
  int64_t queries;     // valid queries
  int64_t keys;        // valid own keys
  int64_t offset;      // own position of query 0
  int64_t prefix;      // which prefix it reads
  int64_t prefix_len;  // valid keys of that prefix
  ContextRow context;
};

struct Params {
  int64_t B, H, Hk, D, Dv, G, P;
  int64_t max_own;  // largest number of own keys of a row
  const Row* rows;  // [B]
  ContextRule rule;
  Tensor4 q, k, v;                 // [batch, H | Hk, token, D | Dv]
  Tensor4 prefix_k, prefix_v;      // [G, Hk, P, D | Dv]
  const void* bias;                // prefix bias in the compute type (f64 for f64 rows, else f32); null: none
  int64_t bias_prefix, bias_head;  // its strides in elements, 0 where it is shared
  const void* alibi;               // [H] in the compute type; null: none
  double scale, softcap;           // softcap 0: none
  bool causal, window_prefix;
  int64_t window;  // 0: none
  Tensor4 out;     // as q, Dv in place of D
  Tensor4 lse;     // D = 1, in the compute type

  // backward only
  Tensor4 dout, dlse, ds_sum;        // ds_sum: over the keys of a query, dlse if absent; dlse may be absent, too
  Tensor4 dq, dk, dv;                // absent: not needed
  Tensor4 dprefix_k, dprefix_v;      // [G, Hk, P, D | Dv] in the compute type, contiguous; absent: not needed
  void* dbias;                       // compute type, [dbias_prefixes, dbias_heads, P] contiguous; null: not needed
  int64_t dbias_prefix, dbias_head;  // its strides in elements, 0 where it is shared
};

}  // namespace ctk
