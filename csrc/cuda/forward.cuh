// Forward pass: a program takes a tile of lanes and walks the keys that the tile sees, prefix first, then each row's
// own.
//
//     m <- -inf, l <- 0, o <- 0
//     for each block of keys:                                       a warp has 16 M lanes; N keys
//       s  <- q k^T                                                 tensor cores, [16 M, N] in registers
//       s  <- -inf where the lane does not see the key              only in blocks that are not visible as a whole
//       m' <- max(m, max s);  p <- 2^(s - m');  o <- o 2^(m - m');  l <- l 2^(m - m') + sum p
//       o  <- o + p v                                               p goes to the tensor cores from the registers
//     out <- o / l,  lse <- ln 2 (m + log2 l)
//
// k and v have a tile each in shared memory. While a warp multiplies q k^T, v of the same block arrives, and while it
// computes p v, k of the next: two barriers per block, and small enough for two programs per multiprocessor.
// Where tiles are few, the keys are cut into ranges with a program each, and `merge_out` makes one softmax of them.
#pragma once
#include "tile.cuh"

namespace ctk::cuda {

// What a thread keeps of its lanes' softmax: lane g + 8 h of each of M groups of 16.
//
// `top` follows the largest logit only when that has grown by more than SLACK. So o is hardly ever rescaled, and
// probabilities are at most 2^SLACK, which every type holds.
template <int M>
struct Softmax {
  static constexpr float SLACK = 8.0f;

  float top[M][2];    // what logits are compared with, in units of log 2; -inf: no key was seen
  float total[M][2];  // this thread's share of the sum

  __device__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) top[m][h] = -INFINITY, total[m][h] = 0.0f;
  }

  // Largest logits of the lanes' keys; whether any lane of the warp needs a new top.
  template <int N>
  __device__ __forceinline__ bool grows(const float (&s)[M][N][4], float factor, float (&high)[M][2]) const {
    bool any = false;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& x = high[m][h];
        x = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < N; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
        x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, 2)) * factor;
        any = any || x > top[m][h] + SLACK;
      }
    return __any_sync(WHOLE_WARP, any != 0);
  }

  // Sets new tops and rescales o. Each lane by itself: no bit of its result may depend on its neighbours.
  template <int D>
  __device__ __forceinline__ void grow(const float (&high)[M][2], float (&o)[M][D][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool higher = high[m][h] > top[m][h] + SLACK;
        const float alpha = higher ? exp2_fast(top[m][h] - high[m][h]) : 1.0f;
        if (higher) top[m][h] = high[m][h];
        total[m][h] *= alpha;
#pragma unroll
        for (int d = 0; d < D; ++d) o[m][d][2 * h] *= alpha, o[m][d][2 * h + 1] *= alpha;
      }
  }

  // s <- 2^(s * factor - top). Masked: a lane may not have seen any key yet.
  template <bool Masked, int N>
  __device__ __forceinline__ void add(float (&s)[M][N][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float base = Masked && top[m][h] == -INFINITY ? 0.0f : top[m][h];  // -inf - -inf would be NaN
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[m][n][e] = exp2_fast(fmaf(s[m][n][e], factor, -base));
            total[m][h] += s[m][n][e];
          }
      }
  }

  // The whole step: p from s.
  template <int N, int D>
  __device__ __forceinline__ void step(float (&s)[M][N][4], float (&o)[M][D][4], float factor) {
    float high[M][2];
    if (grows(s, factor, high)) grow(high, o);
    add<true>(s, factor);
  }
};

// Stores out and lse of a tile of lanes, or their parts where keys are cut into ranges: W columns from `first` on.
template <class T, int W, int M>
__device__ __forceinline__ void store_out(const Args& a, Softmax<M>& softmax, float (&o)[M][W / 8][4], uint32_t memory,
                                          int lanes, int kv, int first) {
  const Params& p = a.call.p;
  const Program at;
  const Thread thread;
  const int lane_count = a.tile_table[at.tile].lanes, first_lane = at.tile * lanes, columns = int(p.Dv) - first;
  const uint32_t stage = memory + thread.warp * staging_bytes(W);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = (thread.warp * M + m) * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& total = softmax.total[m][h];
      total += __shfl_xor_sync(WHOLE_WARP, total, 1);
      total += __shfl_xor_sync(WHOLE_WARP, total, 2);
      const int i = row + thread.in_warp / 4 + 8 * h;
      const bool writes = thread.in_warp % 4 == 0 && first == 0;
      if (a.key_splits == 1) {
        const float scale = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int d = 0; d < W / 8; ++d) o[m][d][2 * h] *= scale, o[m][d][2 * h + 1] *= scale;
        if (writes && i < lane_count) store_lse(a, first_lane + i, kv, softmax.top[m][h], total);
      } else if (writes) {
        const int64_t to = (int64_t(at.split) * p.Hk + kv) * a.lanes + first_lane + i;
        a.part_max[to] = softmax.top[m][h], a.part_sum[to] = total;
      }
    }
    if (a.key_splits == 1) {
      store_rows<T, W>(o[m], stage, columns, a.wide_out, [&](int i) {
        T* to = row + i < lane_count ? lane_token<T>(a, p.out, first_lane + row + i, kv) : nullptr;
        return to ? to + first : nullptr;
      });
    } else {
      float* part = a.part + ((int64_t(at.split) * p.Hk + kv) * a.lanes + first_lane + row) * p.Dv + first;
      store_rows<float, W>(o[m], stage, columns, p.Dv % 4 == 0, [&](int i) { return part + i * p.Dv; });
    }
  }
}

template <class T, int W, bool General>
__device__ __forceinline__ void forward(const Args& a) {
  constexpr ForwardShape SHAPE = forward_shape(sizeof(T), W, General);
  constexpr int N = SHAPE.keys, THREADS = SHAPE.threads(), M = SHAPE.lanes_per_warp() / 16;
  const int warp = threadIdx.x / 32;
  const Params& p = a.call.p;

  extern __shared__ __align__(1024) char memory[];
  using Tile = Shared<T, W>;
  const Tile q{shared_address(memory)}, k{q.base + Tile::bytes(SHAPE.lanes)}, v{k.base + Tile::bytes(N)};
  LaneInfo* lanes = reinterpret_cast<LaneInfo*>(memory + forward_tiles(sizeof(T), W, General));
  LaneTerms* terms = reinterpret_cast<LaneTerms*>(lanes + SHAPE.lanes);

  const LaneInfo* my_lanes = lanes + warp * 16 * M;
  const TokenCopy<T, W, N, THREADS> copy(a);
  const RowsA<T, W> left(q, warp * 16 * M);
  const RowsB<T, W> keys(k);
  const ColumnsB<T, W> values(v);
  Softmax<M> softmax;
  float o[M][W / 8][4] = {}, s[M][N / 8][4];
  Step step;
  {
    const Program at;
    const TileInfo tile = a.tile_table[at.tile];
    if (tile.lanes == 0) return;
    for (int i = threadIdx.x; i < SHAPE.lanes; i += THREADS) {
      lanes[i] = lane_info(a, at.tile * SHAPE.lanes + i, i < tile.lanes);
      if (General) terms[i] = lane_terms(a, at.tile * SHAPE.lanes + i, at.kv, tile.prefix);
    }
    copy_queries<T, W, SHAPE.lanes, THREADS>(a, q, at.tile * SHAPE.lanes, at.kv);
    const bool used = warp * 16 * M < tile.lanes;
    const Source from_k = copy.from(p.prefix_k, tile.prefix, at.kv, 0);
    const Source from_v = copy.from(p.prefix_v, tile.prefix, at.kv, 0);
    PrefixWalk<N> walk(a, tile, at.tile, at.split);
    bool more = walk.next(&step);
    if (more) copy.template start<false>(k, from_k, step.start, step.any);
    copy_commit();
    while (more) {  // k of the step is on its way
      bool full = false;
      if constexpr (!General) full = step.full;
      // Nothing to hide, nothing to choose, and hardly ever a new top. A warp that needs one leaves the loop without
      // the others: every path through a step meets the other warps twice.
      if (full) {
        bool ahead, grows;
        do {
          copy_wait<0>();
          meet<THREADS>();
          copy.template start<true>(v, from_v, step.start, 0);
          copy_commit();
          ahead = walk.next_is_full(&step);
          multiply_rows<T, W, M, N / 8>(s, left, keys, false);
          copy_wait<0>();
          meet<THREADS>();
          if (ahead) copy.template start<true>(k, from_k, step.start, 0);
          copy_commit();
          float high[M][2];
          grows = softmax.grows(s, a.factor, high);
          if (grows) break;
          softmax.template add<false>(s, a.factor);
          multiply_columns<T, W, M, N / 8>(o, s, values, false);
        } while (ahead);
        if (!ahead) {
          more = walk.next(&step);
          if (more) copy.template start<false>(k, from_k, step.start, step.any);
          copy_commit();
        }
        if (!grows) continue;
      } else {
        copy_wait<0>();
        meet<THREADS>();  // k of this step is here, and nobody reads v of the last one any more
        copy.template start<false>(v, from_v, step.start, step.any);
        copy_commit();
        const int start = step.start;
        more = walk.next(&step);
        if (used) {
          uint64_t words[M][2];
          find_words<M>(words, my_lanes,
                        [&](const LaneInfo& lane) { return prefix_word<N, General>(a, start, lane, tile.prefix_len); });
          multiply_rows<T, W, M, N / 8>(s, left, keys, a.call.tf32);
          if constexpr (General) to_logits<true, M, N>(a, s, start, tile.prefix_len, my_lanes, terms + warp * 16 * M);
          hide<M, N>(s, words);
        }
        copy_wait<0>();
        meet<THREADS>();  // v is here, and nobody reads k any more
        if (more) copy.template start<false>(k, from_k, step.start, step.any);
        copy_commit();
        if (!used) continue;
      }
      softmax.step(s, o, General ? 1.0f : a.factor);
      multiply_columns<T, W, M, N / 8>(o, s, values, a.call.tf32);
    }
  }

  OwnWalk<N> walk(a);
  while (walk.next(&step)) {
    __syncthreads();  // nobody reads the last step's k and v any more
    const RowInfo& row = walk.info();
    copy.template start<false>(k, copy.from_once(p.k, row.batch, Program().kv, row.token), step.start, step.any);
    __syncwarp();  // keeps the compiler from computing the addresses of both at once, which would spill
    copy.template start<false>(v, copy.from_once(p.v, row.batch, Program().kv, row.token), step.start, step.any);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    uint64_t words[M][2];
    const uint64_t any = find_words<M>(words, my_lanes, [&](const LaneInfo& lane) {
      return own_word<General>(a, step.start, step.any, walk.row, lane);
    });
    if (!__any_sync(WHOLE_WARP, any != 0)) continue;
    multiply_rows<T, W, M, N / 8>(s, left, keys, a.call.tf32);
    if constexpr (General) to_logits<false, M, N>(a, s, step.start, 0, my_lanes, terms + warp * 16 * M);
    hide<M, N>(s, words);
    softmax.step(s, o, General ? 1.0f : a.factor);
    multiply_columns_of<T, W, M, N / 8>(o, s, values, lanes_of_row<M>(my_lanes, walk.row), a.call.tf32);
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free: results pass through them on their way to rows of 16 bytes

  const Program at;
  store_out<T, W>(a, softmax, o, q.base, SHAPE.lanes, at.kv, 0);
}

}  // namespace ctk::cuda
