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
template <int M>
struct Softmax {
  float top[M][2];    // largest logit so far, in units of log 2
  float total[M][2];  // this thread's share of the sum

  __device__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) top[m][h] = -INFINITY, total[m][h] = 0.0f;
  }

  // s <- 2^(s * factor - top), and o rescaled to the new top.
  template <int N, int D>
  __device__ __forceinline__ void step(float (&s)[M][N][4], float (&o)[M][D][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float high = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < N; ++n) high = fmaxf(high, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        high = fmaxf(high, __shfl_xor_sync(WARP, high, 1));
        high = fmaxf(high, __shfl_xor_sync(WARP, high, 2));
        const float before = top[m][h];
        top[m][h] = fmaxf(before, high * factor);
        const float base = top[m][h] == -INFINITY ? 0.0f : top[m][h];  // -inf - -inf would be NaN
        const float alpha = exp2_fast(before - base);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[m][n][e] = exp2_fast(fmaf(s[m][n][e], factor, -base));
            sum += s[m][n][e];
          }
        total[m][h] = fmaf(total[m][h], alpha, sum);
#pragma unroll
        for (int d = 0; d < D; ++d) o[m][d][2 * h] *= alpha, o[m][d][2 * h + 1] *= alpha;
      }
  }
};

template <class T, int W, bool General>
__device__ __forceinline__ void forward(const Args& a) {
  constexpr ForwardShape SHAPE = forward_shape(sizeof(T), W);
  constexpr int N = SHAPE.keys, THREADS = SHAPE.threads(), M = SHAPE.lanes_per_warp() / 16;
  const int tile_index = blockIdx.x, kv = blockIdx.y, split = blockIdx.z;
  const TileInfo tile = a.tile_table[tile_index];
  if (tile.lanes == 0) return;
  const int first_lane = tile_index * SHAPE.lanes, warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const Params& p = a.call.p;

  extern __shared__ __align__(128) char memory[];
  using Tile = Shared<T, W>;
  LaneInfo* lanes = reinterpret_cast<LaneInfo*>(memory);
  LaneTerms* terms = reinterpret_cast<LaneTerms*>(lanes + SHAPE.lanes);
  char* tiles = reinterpret_cast<char*>(terms + SHAPE.lanes);
  const Tile q{shared_address(tiles)}, k{q.base + Tile::bytes(SHAPE.lanes)}, v{k.base + Tile::bytes(N)};

  for (int i = threadIdx.x; i < SHAPE.lanes; i += THREADS) {
    lanes[i] = lane_info(a, first_lane + i, i < tile.lanes);
    if (General) terms[i] = lane_terms(a, first_lane + i, kv, tile.prefix);
  }
  copy_lanes<T, W, SHAPE.lanes, THREADS>(a, q, p.q, first_lane, kv, [](int, const Slot&) { return true; });
  const bool used = warp * 16 * M < tile.lanes;

  Walk<N> walk(a, tile, tile_index, split);
  Step step;
  bool more = walk.next(&step);
  if (more) copy_keys<T, W, N, THREADS>(a, k, source_of<T>(a, step, p.k, p.prefix_k, tile.prefix, kv), step.any);
  copy_commit();

  Softmax<M> softmax;
  float o[M][W / 8][4] = {};
  while (more) {
    copy_wait<0>();
    __syncthreads();  // k of this block is here, and nobody reads v of the last one any more
    copy_keys<T, W, N, THREADS>(a, v, source_of<T>(a, step, p.v, p.prefix_v, tile.prefix, kv), step.any);
    copy_commit();
    const Step now = step;
    more = walk.next(&step);

    uint64_t words[M][2];
    bool active = used;
    if (!now.full && used) {
      bool any = false;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const LaneInfo lane = lanes[(warp * M + m) * 16 + thread / 4 + 8 * h];
          words[m][h] = lane_word<N, General>(a, now, lane, tile.prefix_len);
          any = any || words[m][h];
        }
      active = __any_sync(WARP, any);
    }
    float s[M][N / 8][4] = {};
    if (active) {
      multiply_rows<T, W, M, N / 8>(s, q, warp * 16 * M, k, a.call.tf32);
      if constexpr (General) to_logits<M, N>(a, s, now, tile.prefix_len, lanes + warp * 16 * M, terms + warp * 16 * M);
      if (!now.full) hide<M, N>(s, words);
    }

    copy_wait<0>();
    __syncthreads();  // v is here, and nobody reads k any more
    if (more) copy_keys<T, W, N, THREADS>(a, k, source_of<T>(a, step, p.k, p.prefix_k, tile.prefix, kv), step.any);
    copy_commit();
    if (!active) continue;
    softmax.template step<N / 8, W / 8>(s, o, General ? 1.0f : a.factor);
    if (now.row < 0) multiply_columns<T, W, M, N / 8>(o, s, v, a.call.tf32);
    else multiply_columns_of<T, W, M, N / 8>(o, s, v, lanes_of_row<M>(lanes + warp * 16 * M, now.row), a.call.tf32);
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free: results pass through them on their way to rows of 16 bytes

  const uint32_t stage = q.base + warp * staging_bytes(W);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = (warp * M + m) * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& total = softmax.total[m][h];
      total += __shfl_xor_sync(WARP, total, 1);
      total += __shfl_xor_sync(WARP, total, 2);
      const int i = row + thread / 4 + 8 * h;
      if (a.key_splits == 1) {
        const float scale = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
        for (int d = 0; d < W / 8; ++d) o[m][d][2 * h] *= scale, o[m][d][2 * h + 1] *= scale;
        if (thread % 4 == 0 && i < tile.lanes) store_lse(a, first_lane + i, kv, softmax.top[m][h], total);
      } else if (thread % 4 == 0) {
        const int64_t at = (int64_t(split) * p.Hk + kv) * a.lanes + first_lane + i;
        a.part_max[at] = softmax.top[m][h], a.part_sum[at] = total;
      }
    }
    if (a.key_splits == 1) {
      store_rows<T, W>(a, o[m], stage, a.wide_out, [&](int i) {
        return row + i < tile.lanes ? lane_token<T>(a, p.out, first_lane + row + i, kv) : nullptr;
      });
    } else {
      float* part = a.part + ((int64_t(split) * p.Hk + kv) * a.lanes + first_lane + row) * p.D;
      store_rows<float, W>(a, o[m], stage, p.D % 4 == 0, [&](int i) { return part + i * p.D; });
    }
  }
}

}  // namespace ctk::cuda
