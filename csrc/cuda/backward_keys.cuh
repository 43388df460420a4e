// Gradients of keys: a program owns a block of keys, of the prefix or of one row, and walks the lanes that may see
// them.
//
//     dk <- 0, dv <- 0                                              a warp has 16 keys
//     for each L lanes, in order:
//       s  <- k q^T;  dp <- v dout^T                                tensor cores, [16, L] in registers
//       p  <- 2^(s - lse), 0 where the lane does not see the key
//       ds <- p (dp - delta);  dbias <- dbias + sum over lanes ds
//       dv <- dv + p dout;  dk <- dk + ds (1 - tanh^2) q            p, ds go to the tensor cores from the registers
//     dk <- scale dk
//
// The sum over rows, queries and heads stays in fp32 registers: no atomics, no gradient per row, and an order that
// depends on nothing but the inputs. Where there are few prefix keys and many lanes, the lanes are cut into ranges with
// a program each, whose sums `sum_prefix` adds in order. q and dout of the next lanes arrive while these are computed,
// where two stages of them fit.
#pragma once
#include "tile.cuh"

namespace ctk::cuda {

// Which keys a program owns, and the range of lanes, in steps of L, that may see them.
struct KeyBlock {
  Step keys;  // row, first key, keys that exist
  int prefix = 0, split = 0, prefix_len = 0;
  RowInfo row{};
  int begin = 0, end = 0;
};

template <int N, int L>
__device__ inline bool find_key_block(const Args& a, int job, KeyBlock* block) {
  constexpr int PER_BLOCK = BLOCK / N;
  const Params& p = a.call.p;
  if (job < a.prefix_programs) {
    const int per_prefix = a.prefix_blocks * PER_BLOCK, rest = job / per_prefix;
    block->prefix = rest % int(p.G), block->split = rest / int(p.G);
    block->keys.start = job % per_prefix * N;
    block->keys.any = low_bits(min(int(p.P) - block->keys.start, N));
    const int first = a.run_first[block->prefix] * a.group / L, last = a.run_end[block->prefix] * a.group;
    const int steps = (last + L - 1) / L - first, share = (steps + a.tile_splits - 1) / a.tile_splits;
    block->begin = first + block->split * share;
    block->end = first + min((block->split + 1) * share, steps);
    return true;
  }
  job -= a.prefix_programs;
  const OwnBlock own = a.own_table[job / PER_BLOCK];
  if (own.row < 0) return false;
  const RowInfo row = block->row = a.rows[own.row];
  const int start = own.start + job % PER_BLOCK * N;
  block->keys = {own.row, start, own_bits(a, row, start) & low_bits(N), false};
  const int first = p.causal ? max(start - row.offset, 0) : 0;
  const int last = p.window > 0 ? clamp(start + N - 1 + p.window - row.offset, 0, row.queries) : row.queries;
  block->begin = (row.first + first) * a.group / L;
  block->end = first < last ? min(((row.first + last) * a.group + L - 1) / L, a.lanes / L) : block->begin;
  return true;
}

// Whether any of the L lanes of a step sees any of the keys, and whether all see all.
template <int N, int L>
__device__ __forceinline__ bool find_seen(const Args& a, const KeyBlock& block, int step, bool* full) {
  const Params& p = a.call.p;
  const int start = block.keys.start;
  if (block.keys.row < 0) {
    const int tile = step * L / a.tile_lanes;
    if (step * L % a.tile_lanes >= a.tile_table[tile].lanes) return false;
    const Seen seen = a.seen[int64_t(tile) * a.prefix_blocks + start / BLOCK];
    *full = (seen.all >> (start % BLOCK) & low_bits(N)) == low_bits(N);
    return (seen.any >> (start % BLOCK) & low_bits(N)) != 0;
  }
  const RowInfo& row = block.row;
  const int first = step * L / a.group - row.first, last = ((step + 1) * L - 1) / a.group - row.first;
  *full = first >= 0 && last < row.queries && block.keys.any == low_bits(N) && p.window == 0 &&
          (!p.causal || row.offset + first >= start + N - 1);
  return true;
}

template <class T, int W, bool General, bool WithK, bool WithV>
__device__ __forceinline__ void backward_keys(const Args& a) {
  constexpr KeyShape SHAPE = key_shape(sizeof(T), W);
  constexpr int N = SHAPE.keys, L = SHAPE.lanes, THREADS = SHAPE.threads(), STAGES = SHAPE.stages;
  static_assert(N == 16 * SHAPE.warps && L <= THREADS);
  const int kv = blockIdx.y, warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const Params& p = a.call.p;
  KeyBlock block;
  if (!find_key_block<N, L>(a, blockIdx.x, &block)) return;
  const bool of_prefix = block.keys.row < 0;
  const bool need_bias = General && WithK && of_prefix && p.dbias;
  const bool need_k = WithK && (of_prefix ? p.dprefix_k.data || need_bias : p.dk.data != nullptr);
  const bool need_v = WithV && (of_prefix ? p.dprefix_v.data != nullptr : p.dv.data != nullptr);
  if (!need_k && !need_v) return;

  extern __shared__ __align__(128) char memory[];
  using Tile = Shared<T, W>;
  LaneState* states = reinterpret_cast<LaneState*>(memory);              // [STAGES][L]
  LaneTerms* terms = reinterpret_cast<LaneTerms*>(states + STAGES * L);  // [STAGES][L]
  uint16_t* words = reinterpret_cast<uint16_t*>(terms + STAGES * L);     // [STAGES][warps][L], 16 keys of a warp
  int* positions = reinterpret_cast<int*>(words + STAGES * 4 * L);       // [STAGES][L]
  char* tiles = memory + STAGES * L * LANE_STAGE_BYTES;
  const Tile k{shared_address(tiles)}, v{k.base + Tile::bytes(N)};
  const uint32_t stages = v.base + Tile::bytes(N);
  float* gradients = reinterpret_cast<float*>(memory + key_shared(sizeof(T), W));  // [L][N + 1], with a bias gradient
  float* dbias = gradients + L * (N + 1);                                          // [group][N]

  copy_keys<T, W, N, THREADS>(a, k, source_of<T>(a, block.keys, p.k, p.prefix_k, block.prefix, kv), block.keys.any);
  copy_keys<T, W, N, THREADS>(a, v, source_of<T>(a, block.keys, p.v, p.prefix_v, block.prefix, kv), block.keys.any);
  if (need_bias)
    for (int i = threadIdx.x; i < a.group * N; i += THREADS) dbias[i] = 0.0f;

  int step = block.begin - 1, stage = 0;
  bool full = false;
  const auto next = [&] {
    while (++step < block.end)
      if (find_seen<N, L>(a, block, step, &full)) return true;
    return false;
  };
  const auto copy = [&] {
    const Tile q{stages + stage * 2 * Tile::bytes(L)}, dout{q.base + Tile::bytes(L)};
    const int first = step * L;
    const LaneState* state = a.state + int64_t(kv) * a.lanes + first;
    // of other rows, and of lanes that saw nothing, nothing may reach a product
    const auto use = [&](int i, const Slot& slot) {
      return (of_prefix || slot.row == block.keys.row) && state[i].high != INFINITY;
    };
    copy_lanes<T, W, L, THREADS>(a, q, p.q, first, kv, use);
    copy_lanes<T, W, L, THREADS>(a, dout, p.dout, first, kv, use);
    const int i = threadIdx.x;
    if (i >= L) return;
    copy_async(shared_address(states + stage * L + i), state + i, true);
    if (full && !General) return;
    const LaneInfo lane = lane_info(a, first + i, true);
    const int prefix_len = of_prefix && lane.row >= 0 ? a.rows[lane.row].prefix_len : 0;
    const uint64_t word = lane_word<N, General>(a, block.keys, lane, prefix_len);
#pragma unroll
    for (int w = 0; w < SHAPE.warps; ++w) words[(stage * SHAPE.warps + w) * L + i] = uint16_t(word >> (16 * w));
    if (General) {
      terms[stage * L + i] = lane_terms(a, first + i, kv, block.prefix);
      positions[stage * L + i] = lane.position + prefix_len;
    }
  };
  bool more = next();
  if (more) copy();
  copy_commit();

  float dk[1][W / 8][4] = {}, dv[1][W / 8][4] = {};
  while (more) {
    copy_wait<0>();
    __syncthreads();  // these lanes are here, and nobody reads the stage of the last ones any more
    const Tile q{stages + stage * 2 * Tile::bytes(L)}, dout{q.base + Tile::bytes(L)};
    const LaneState* state = states + stage * L;
    const uint16_t* word = words + (stage * SHAPE.warps + warp) * L;
    const LaneTerms* term = terms + stage * L;
    const int* position = positions + stage * L;
    const bool all = full;
    const int first = step * L;
    more = next();
    if (STAGES == 2) {
      stage ^= 1;
      if (more) copy();
      copy_commit();
    }
    bool active = true;
    if (!all) {
      const uint32_t two = 2 * thread < L ? reinterpret_cast<const uint32_t*>(word)[thread] : 0;
      active = __any_sync(WARP, two != 0);
    }
    float s[1][L / 8][4] = {}, ds[1][L / 8][4] = {};
    if (active) {
      multiply_rows<T, W, 1, L / 8>(s, k, warp * 16, q, a.call.tf32);
      if (need_k) multiply_rows<T, W, 1, L / 8>(ds, v, warp * 16, dout, a.call.tf32);
#pragma unroll
      for (int n = 0; n < L / 8; ++n) {
        const int i =
            8 * n + thread % 4 * 2;  // this thread's lanes are i and i + 1, its keys g and g + 8 of the warp's
        // bits 0 and 8: keys g and g + 8 of lane i; bits 16 and 24: of lane i + 1
        const uint32_t visible = all ? WARP : *reinterpret_cast<const uint32_t*>(word + i) >> (thread / 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const LaneState lane = state[i + e % 2];
          float& x = s[0][n][e];
          float derivative = 1.0f;
          if constexpr (General) {
            const int key = block.keys.start + warp * 16 + thread / 4 + e / 2 * 8;
            const LaneTerms mine = term[i + e % 2];
            const float bias = bias_of(a, mine, block.keys, key, int(p.P));
            x = logit(a, x, bias, mine.slope, position[i + e % 2] - key, &derivative);
            x = exp2_fast((x - lane.high) - lane.low);
          } else {
            x = exp2_fast(fmaf(x, a.factor, -lane.high));
          }
          float& gradient = ds[0][n][e];
          gradient = x * (gradient - lane.delta);
          if (!all) {
            const bool sees = visible >> (16 * (e % 2) + 8 * (e / 2)) & 1;
            x = sees ? x : 0.0f, gradient = sees ? gradient : 0.0f;
          }
          if constexpr (General) {
            if (need_bias) gradients[(i + e % 2) * (N + 1) + warp * 16 + thread / 4 + e / 2 * 8] = gradient;
            gradient *= derivative;
          }
        }
      }
      if (need_v) multiply_columns<T, W, 1, L / 8>(dv, s, dout, a.call.tf32);
      if (need_k) multiply_columns<T, W, 1, L / 8>(dk, ds, q, a.call.tf32);
    } else if (need_bias) {
      for (int i = thread; i < 16 * L; i += 32) gradients[i / 16 * (N + 1) + warp * 16 + i % 16] = 0.0f;
    }
    if (need_bias) {  // a sum per key and head, over the lanes of that head, in order
      __syncthreads();
      for (int i = threadIdx.x; i < a.group * N; i += THREADS) {
        const int head = i / N;
        float sum = 0.0f;
        for (int lane = (head - first % a.group + a.group) % a.group; lane < L; lane += a.group)
          sum += gradients[lane * (N + 1) + i % N];
        dbias[i] += sum;
      }
      __syncthreads();
    }
    if (STAGES == 1) {
      __syncthreads();
      if (more) copy();
      copy_commit();
    }
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free

  const uint32_t stage_rows = k.base + warp * staging_bytes(W);
  const int first_key = block.keys.start + warp * 16;
  const auto store = [&](const float (&acc)[W / 8][4], const Tensor4& to, float* part, bool wide, bool wanted) {
    if (!wanted) return;
    if (part) {
      part += ((int64_t(block.split) * p.G + block.prefix) * p.Hk + kv) * p.P * p.D;
      return store_rows<float, W>(a, acc, stage_rows, p.D % 4 == 0,
                                  [&](int i) { return first_key + i < p.P ? part + (first_key + i) * p.D : nullptr; });
    }
    const int64_t batch = of_prefix ? block.prefix : block.row.batch, token = of_prefix ? 0 : block.row.token;
    const int64_t end = of_prefix ? p.P : a.call.packed ? block.row.keys : a.call.T;
    const auto at = [&](int i) { return batch * to.batch + kv * to.head + (token + first_key + i) * to.token; };
    if (to.type == Type::f32) {
      store_rows<float, W>(a, acc, stage_rows, wide,
                           [&](int i) { return first_key + i < end ? static_cast<float*>(to.data) + at(i) : nullptr; });
    } else if constexpr (sizeof(T) == 2) {
      store_rows<T, W>(a, acc, stage_rows, wide,
                       [&](int i) { return first_key + i < end ? static_cast<T*>(to.data) + at(i) : nullptr; });
    }
  };
  if constexpr (WithK) {
#pragma unroll
    for (int d = 0; d < W / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[0][d][e] *= a.scale;
    store(dk[0], of_prefix ? p.dprefix_k : p.dk, of_prefix ? a.part_dk : nullptr,
          of_prefix ? a.wide_dprefix_k : a.wide_dk, of_prefix ? p.dprefix_k.data != nullptr : need_k);
  }
  if constexpr (WithV)
    store(dv[0], of_prefix ? p.dprefix_v : p.dv, of_prefix ? a.part_dv : nullptr,
          of_prefix ? a.wide_dprefix_v : a.wide_dv, need_v);
  if (need_bias) {
    for (int i = threadIdx.x; i < a.group * N; i += THREADS) {
      const int64_t head = kv * a.group + i / N, key = block.keys.start + i % N;
      if (key < p.P) a.part_dbias[((int64_t(block.split) * p.G + block.prefix) * p.H + head) * p.P + key] = dbias[i];
    }
  }
}

}  // namespace ctk::cuda
