// dq: a program takes a tile of lanes and walks their keys as the forward pass does, with the saved lse instead of a
// running maximum.
//
//     dq <- 0
//     for each block of keys:                                       a warp has 16 lanes; N keys
//       s  <- q k^T;  dp <- dout v^T                                tensor cores, [16, N] in registers
//       p  <- 2^(s - lse), 0 where the lane does not see the key
//       ds <- p (dp - delta) (1 - tanh^2)                           the last factor with a softcap
//       dq <- dq + ds k
//     dq <- scale dq
//
// k and v of the next block arrive while this one is computed, where two stages of them fit.
#pragma once
#include "tile.cuh"

namespace ctk::cuda {

template <class T, int W, bool General>
__device__ __forceinline__ void backward_query(const Args& a) {
  constexpr QueryShape SHAPE = query_shape(sizeof(T), W);
  constexpr int N = SHAPE.keys, THREADS = SHAPE.threads(), STAGES = SHAPE.stages;
  static_assert(SHAPE.lanes == 16 * SHAPE.warps);
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
  const Tile q{shared_address(tiles)}, dout{q.base + Tile::bytes(SHAPE.lanes)};
  const uint32_t stages = dout.base + Tile::bytes(SHAPE.lanes);

  const LaneState* state = a.state + int64_t(kv) * a.lanes + first_lane;
  for (int i = threadIdx.x; i < SHAPE.lanes; i += THREADS) {
    lanes[i] = lane_info(a, first_lane + i, i < tile.lanes);
    if (General) terms[i] = lane_terms(a, first_lane + i, kv, tile.prefix);
  }
  // what arrives for lanes that saw nothing must reach nothing
  const auto alive = [&](int i, const Slot&) { return state[i].high != INFINITY; };
  copy_lanes<T, W, SHAPE.lanes, THREADS>(a, q, p.q, first_lane, kv, alive);
  copy_lanes<T, W, SHAPE.lanes, THREADS>(a, dout, p.dout, first_lane, kv, alive);

  const LaneState mine[2] = {state[warp * 16 + thread / 4], state[warp * 16 + thread / 4 + 8]};
  const bool used = warp * 16 < tile.lanes;
  Walk<N> walk(a, tile, tile_index, split);
  Step step;
  bool more = walk.next(&step);
  int stage = 0;
  const auto copy = [&] {
    const Tile k{stages + stage * 2 * Tile::bytes(N)}, v{k.base + Tile::bytes(N)};
    copy_keys<T, W, N, THREADS>(a, k, source_of<T>(a, step, p.k, p.prefix_k, tile.prefix, kv), step.any);
    copy_keys<T, W, N, THREADS>(a, v, source_of<T>(a, step, p.v, p.prefix_v, tile.prefix, kv), step.any);
  };
  if (more) copy();
  copy_commit();

  float dq[1][W / 8][4] = {};
  while (more) {
    copy_wait<0>();
    __syncthreads();  // this block is here, and nobody reads the stage of the last one any more
    const Step now = step;
    const Tile k{stages + stage * 2 * Tile::bytes(N)}, v{k.base + Tile::bytes(N)};
    more = walk.next(&step);
    if (STAGES == 2) {
      stage ^= 1;
      if (more) copy();
      copy_commit();
    }
    uint64_t words[1][2];
    bool active = used;
    if (!now.full && used) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        words[0][h] = lane_word<N, General>(a, now, lanes[warp * 16 + thread / 4 + 8 * h], tile.prefix_len);
      active = __any_sync(WARP, (words[0][0] | words[0][1]) != 0);
    }
    if (active) {
      float s[1][N / 8][4] = {}, ds[1][N / 8][4] = {};
      multiply_rows<T, W, 1, N / 8>(s, q, warp * 16, k, a.call.tf32);
      multiply_rows<T, W, 1, N / 8>(ds, dout, warp * 16, v, a.call.tf32);
      if constexpr (General) {
        logit_gradients<N>(a, s, ds, mine, words, now, tile.prefix_len, lanes + warp * 16, terms + warp * 16);
      } else {
        if (!now.full) hide<1, N>(s, words);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = exp2_fast(fmaf(s[0][n][e], a.factor, -mine[e / 2].high));
            ds[0][n][e] = x * (ds[0][n][e] - mine[e / 2].delta);
          }
      }
      if (now.row < 0) multiply_columns<T, W, 1, N / 8>(dq, ds, k, a.call.tf32);
      else multiply_columns_of<T, W, 1, N / 8>(dq, ds, k, lanes_of_row<1>(lanes + warp * 16, now.row), a.call.tf32);
    }
    if (STAGES == 1) {
      __syncthreads();
      if (more) copy();
      copy_commit();
    }
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free

#pragma unroll
  for (int d = 0; d < W / 8; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[0][d][e] *= a.scale;
  const uint32_t stage_rows = q.base + warp * staging_bytes(W);
  const int row = warp * 16;
  if (a.key_splits == 1) {
    store_rows<T, W>(a, dq[0], stage_rows, a.wide_dq, [&](int i) {
      return row + i < tile.lanes ? lane_token<T>(a, p.dq, first_lane + row + i, kv) : nullptr;
    });
  } else {
    float* part = a.part + ((int64_t(split) * p.Hk + kv) * a.lanes + first_lane + row) * p.D;
    store_rows<float, W>(a, dq[0], stage_rows, p.D % 4 == 0, [&](int i) { return part + i * p.D; });
  }
}

}  // namespace ctk::cuda
