// The small kernels around the large ones: aligned copies of inputs, delta, and sums of partial results in a fixed
// order. All sums of the backward pass are one launch.
#pragma once
#include "tile.cuh"

namespace ctk::cuda {

__device__ __forceinline__ float load_number(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::bf16: return float(static_cast<const bf16*>(data)[i]);
    case Type::f16: return float(static_cast<const fp16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void store_number(void* data, Type type, int64_t i, float x) {
  switch (type) {
    case Type::bf16: static_cast<bf16*>(data)[i] = bf16(x); return;
    case Type::f16: static_cast<fp16*>(data)[i] = fp16(x); return;
    default: static_cast<float*>(data)[i] = x;
  }
}

template <class T>
__device__ __forceinline__ void pack_as(const Args& a) {
  constexpr int COUNT = 16 / int(sizeof(T));
  const Pack& job = a.packs[blockIdx.y];
  const int64_t i = (int64_t(blockIdx.x) * PACK_THREADS + threadIdx.x) * COUNT;
  if (i >= job.elements) return;
  const int64_t token = i / job.stride;
  const int d = int(i - token * job.stride), D = job.columns;
  const int64_t from = token / job.tokens / job.heads * job.from.batch +
                       token / job.tokens % job.heads * job.from.head + token % job.tokens * job.from.token + d;
  float x[COUNT];
  if (job.wide && job.from.type == Type::f32) {  // then D is a multiple of 4, but maybe not of COUNT
    const float4* pieces = reinterpret_cast<const float4*>(static_cast<const float*>(job.from.data) + from);
#pragma unroll
    for (int e = 0; e < COUNT; e += 4) {
      const float4 four = d + e < D ? pieces[e / 4] : float4{};
      x[e] = four.x, x[e + 1] = four.y, x[e + 2] = four.z, x[e + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) x[e] = d + e < D ? load_number(job.from.data, job.from.type, from + e) : 0.0f;
  }
  uint4 out;
#pragma unroll
  for (int e = 0; e < COUNT; ++e) reinterpret_cast<T*>(&out)[e] = T(x[e]);
  *reinterpret_cast<uint4*>(static_cast<T*>(job.to) + i) = out;
}

// Grid (PACK_THREADS pieces of 16 bytes of the copy, copies).
__device__ __forceinline__ void pack(const Args& a) {
  switch (a.call.p.q.type) {
    case Type::bf16: return pack_as<bf16>(a);
    case Type::f16: return pack_as<fp16>(a);
    default: return pack_as<float>(a);
  }
}

// Fills in lse, in units of log 2 as the sum of two fp32 numbers: a single one would carry a rounding of the size of
// lse into every probability.
__device__ __forceinline__ void set_lse(float lse, LaneState* state) {
  constexpr float HIGH = float(LOG2E), LOW = float(LOG2E - HIGH);
  state->high = lse * HIGH;
  state->low = fmaf(lse, HIGH, -state->high) + lse * LOW;
}

// Fills tokens that belong to no row in a tensor laid out as q, or as k and v: those around packed rows, and padding
// behind a row's queries. `heads` of each KV head, `columns` of each token. The programs (x, y) of a grid share them: y
// is the KV head.
template <class T>
__device__ __forceinline__ void fill_idle(const Args& a, const Tensor4& t, int heads, int64_t columns, T value) {
  const Call& call = a.call;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, B = int(call.p.B), S = int(call.S);
  const auto fill = [&](int batch, int first, int end) {
    for (int64_t i = warp; i < int64_t(end - first) * heads; i += warps) {
      T* to = static_cast<T*>(t.data) + batch * t.batch + (blockIdx.y * heads + i % heads) * t.head +
              (first + i / heads) * t.token;
      for (int64_t d = threadIdx.x % 32; d < columns; d += 32) to[d] = value;
    }
  };
  if (call.packed && blockIdx.x == 0) {
    fill(0, 0, clamp(read(call.cu_seqlens, 0, 0), 0, S));
    fill(0, clamp(read(call.cu_seqlens, B, S), 0, S), S);
  }
  if (call.seq_lens.data)
    for (int r = blockIdx.x; r < B; r += gridDim.x) fill(a.rows[r].batch, a.rows[r].queries, S);
}

// out and lse of tokens that belong to no row. Grid (programs, Hk).
template <class T>
__device__ __forceinline__ void fill_out(const Args& a) {
  fill_idle<T>(a, a.call.p.out, a.group, a.call.p.Dv, T(0.0f));
  fill_idle<float>(a, a.call.p.lse, a.group, 1, -INFINITY);
}

// state <- lse, delta = <out, dout> - dlse. Grid (DELTA_LANES lanes, Hk); eight threads per lane, 16 bytes at a time.
// Also dq, dk, dv of idle tokens: those of padded rows' keys are zeros that the kernel of keys writes.
template <class T>
__device__ __forceinline__ void delta(const Args& a) {
  const Params& p = a.call.p;
  if (p.dq.data) fill_idle<T>(a, p.dq, a.group, p.D, T(0.0f));
  if (p.dk.data && a.call.packed) fill_idle<T>(a, p.dk, 1, p.D, T(0.0f));
  if (p.dv.data && a.call.packed) fill_idle<T>(a, p.dv, 1, p.Dv, T(0.0f));
  const int lane = blockIdx.x * DELTA_LANES + threadIdx.x / 8, kv = blockIdx.y, part = threadIdx.x % 8;
  const Slot slot = lane < a.lanes ? a.slot_table[lane / a.group] : Slot{-1, 0, 0, 0};
  const int head = kv * a.group + lane % a.group;
  float lse = -INFINITY, sum = 0.0f;
  if (slot.row >= 0) lse = *lane_token<const float>(a, p.lse, lane, kv);
  LaneState state{INFINITY, 0.0f, 0.0f, 0, 0, 0, 0, slot.row, slot.position, 0, {}};
  if (slot.row >= 0) state.index = a.rows[slot.row].index, state.prefix_len = a.rows[slot.row].prefix_len;
  if (lse != -INFINITY) {
    const char* q = source<T>(p.q, slot.batch, head, slot.token).data;
    const char* dout = source<T>(p.dout, slot.batch, head, slot.token).data;
    const char* out = source<T>(p.out, slot.batch, head, slot.token).data;
    state.q = uint32_t((q - static_cast<const char*>(p.q.data)) / 16);
    state.dout = uint32_t((dout - static_cast<const char*>(p.dout.data)) / 16);
    state.bytes = 16;
    for (int chunk = part; chunk < a.value_chunks; chunk += 8) {
      const uint4 x = reinterpret_cast<const uint4*>(out)[chunk], y = reinterpret_cast<const uint4*>(dout)[chunk];
      const T *left = reinterpret_cast<const T*>(&x), *right = reinterpret_cast<const T*>(&y);
#pragma unroll
      for (int e = 0; e < 16 / int(sizeof(T)); ++e) sum = fmaf(float(left[e]), float(right[e]), sum);
    }
  }
#pragma unroll
  for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, step);
  if (lane >= a.lanes || part) return;
  if (lse != -INFINITY) {
    set_lse(lse, &state);
    state.delta = p.dlse.data ? sum - *lane_token<const float>(a, p.dlse, lane, kv) : sum;
  }
  a.state[int64_t(kv) * a.lanes + lane] = state;
}

// out and lse from the ranges of keys, in order, and those of tokens that belong to no row. Grid (MERGE_LANES lanes,
// Hk); a warp per lane.
template <class T>
__device__ __forceinline__ void merge_out(const Args& a) {
  const Params& p = a.call.p;
  fill_out<T>(a);
  const int lane = blockIdx.x * MERGE_LANES + threadIdx.x / 32, kv = blockIdx.y, thread = threadIdx.x % 32;
  if (lane >= a.lanes) return;
  T* to = lane_token<T>(a, p.out, lane, kv);
  if (!to) return;
  const auto at = [&](int split) { return (int64_t(split) * p.Hk + kv) * a.lanes + lane; };
  float top = -INFINITY, total = 0.0f;
  for (int split = 0; split < a.key_splits; ++split) top = fmaxf(top, a.part_max[at(split)]);
  const float base = top == -INFINITY ? 0.0f : top;
  for (int split = 0; split < a.key_splits; ++split)
    total = fmaf(a.part_sum[at(split)], exp2_fast(a.part_max[at(split)] - base), total);
  for (int d = thread; d < p.Dv; d += 32) {
    float sum = 0.0f;
    for (int split = 0; split < a.key_splits; ++split)
      sum = fmaf(a.part[at(split) * p.Dv + d], exp2_fast(a.part_max[at(split)] - base), sum);
    to[d] = T(total == 0.0f ? 0.0f : sum / total);
  }
  if (thread == 0) store_lse(a, lane, kv, top, total);
}

// dq as the sum over the ranges of keys. A warp per lane.
__device__ __forceinline__ void sum_dq(const Args& a, int64_t block) {
  const Params& p = a.call.p;
  const int64_t blocks = div_up(a.lanes, MERGE_LANES);
  const int lane = int(block % blocks) * MERGE_LANES + threadIdx.x / 32, kv = int(block / blocks);
  if (lane >= a.lanes) return;
  const Slot slot = a.slot_table[lane / a.group];
  if (slot.row < 0) return;
  const int64_t to =
      slot.batch * p.dq.batch + (kv * a.group + lane % a.group) * p.dq.head + int64_t(slot.token) * p.dq.token;
  for (int d = threadIdx.x % 32; d < p.D; d += 32) {
    float sum = 0.0f;
    for (int split = 0; split < a.key_splits; ++split)
      sum += a.part[((int64_t(split) * p.Hk + kv) * a.lanes + lane) * p.D + d];
    store_number(p.dq.data, p.dq.type, to + d, sum);
  }
}

// dprefix_k or dprefix_v, of `columns`, as the sum over the ranges of tiles. A thread per number.
__device__ __forceinline__ void sum_prefix(const Args& a, int64_t block, const float* part, const Tensor4& to,
                                           int64_t columns) {
  const Params& p = a.call.p;
  const int64_t size = p.G * p.Hk * p.P * columns, i = block * LANE_THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int split = 0; split < a.tile_splits; ++split) sum += part[split * size + i];
  store_number(to.data, to.type, i, sum);
}

// dbias, also over the prefixes and heads that share it. A thread per key.
__device__ __forceinline__ void sum_bias(const Args& a, int64_t block) {
  const Params& p = a.call.p;
  const int64_t blocks = div_up(p.P, LANE_THREADS), heads = p.dbias_head ? p.H : 1;
  const int64_t key = block % blocks * LANE_THREADS + threadIdx.x;
  if (key >= p.P) return;
  const int64_t first_head = block / blocks % heads, first_prefix = block / blocks / heads;
  const int64_t head_end = p.dbias_head ? first_head + 1 : p.H, prefix_end = p.dbias_prefix ? first_prefix + 1 : p.G;
  float sum = 0.0f;
  for (int split = 0; split < a.tile_splits; ++split)
    for (int64_t prefix = first_prefix; prefix < prefix_end; ++prefix)
      for (int64_t head = first_head; head < head_end; ++head)
        sum += a.part_dbias[((split * p.G + prefix) * p.H + head) * p.P + key];
  static_cast<float*>(p.dbias)[first_prefix * p.dbias_prefix + first_head * p.dbias_head + key] = sum;
}

// All partial results of the backward pass, each summed in order. Grid (total of `sum_blocks`).
__device__ __forceinline__ void sum_parts(const Args& a) {
  const Params& p = a.call.p;
  const SumBlocks blocks = sum_blocks(a);
  int64_t block = blockIdx.x;
  if (block < blocks.dq) return sum_dq(a, block);
  block -= blocks.dq;
  if (block < blocks.dprefix_k) return sum_prefix(a, block, a.part_dk, p.dprefix_k, p.D);
  block -= blocks.dprefix_k;
  if (block < blocks.dprefix_v) return sum_prefix(a, block, a.part_dv, p.dprefix_v, p.Dv);
  sum_bias(a, block - blocks.dprefix_v);
}

}  // namespace ctk::cuda
