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

// Stores dq of a tile of lanes, or its parts where keys are cut into ranges: W columns from `first` on.
template <class T, int W>
__device__ __forceinline__ void store_dq(const Args& a, float (&dq)[1][W / 8][4], uint32_t memory, int lanes,
                                         int first_lane, int kv, int split, int first) {
  const Params& p = a.call.p;
  const int warp = threadIdx.x / 32, row = warp * 16, columns = int(p.D) - first;
#pragma unroll
  for (int d = 0; d < W / 8; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[0][d][e] *= a.scale;
  const uint32_t stage = memory + warp * staging_bytes(W);
  if (a.key_splits == 1) {
    store_rows<T, W>(dq[0], stage, columns, a.wide_dq, [&](int i) {
      T* to = row + i < lanes ? lane_token<T>(a, p.dq, first_lane + row + i, kv) : nullptr;
      return to ? to + first : nullptr;
    });
  } else {
    float* part = a.part + ((int64_t(split) * p.Hk + kv) * a.lanes + first_lane + row) * p.D + first;
    store_rows<float, W>(dq[0], stage, columns, p.D % 4 == 0, [&](int i) { return part + i * p.D; });
  }
}

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

  extern __shared__ __align__(1024) char memory[];
  using Tile = Shared<T, W>;
  LaneInfo* lanes = reinterpret_cast<LaneInfo*>(memory + query_tiles(sizeof(T), W));
  LaneTerms* terms = reinterpret_cast<LaneTerms*>(lanes + SHAPE.lanes);
  const Tile q{shared_address(memory)}, dout{q.base + Tile::bytes(SHAPE.lanes)};
  const uint32_t stages = dout.base + Tile::bytes(SHAPE.lanes);

  const LaneState* state = a.state + int64_t(kv) * a.lanes + first_lane;
  for (int i = threadIdx.x; i < SHAPE.lanes; i += THREADS) {
    lanes[i] = lane_info(a, first_lane + i, i < tile.lanes);
    if (General) terms[i] = lane_terms(a, first_lane + i, kv, tile.prefix);
  }
  LaneCopy<T, W, SHAPE.lanes, THREADS>(a).start(q, dout, state, -1);

  const LaneState mine[2] = {state[warp * 16 + thread / 4], state[warp * 16 + thread / 4 + 8]};
  const bool used = warp * 16 < tile.lanes;
  const LaneInfo* my_lanes = lanes + warp * 16;
  const RowsA<T, W> left_q(q, warp * 16), left_dout(dout, warp * 16);
  const TokenCopy<T, W, N, THREADS> copy(a);
  // k and v of a stage
  const auto tile_k = [&](int stage) { return Tile{stages + stage * 2 * Tile::bytes(N)}; };
  const auto tile_v = [&](int stage) { return Tile{tile_k(stage).base + Tile::bytes(N)}; };

  const RowsB<T, W> rows(tile_k(0));
  const ColumnsB<T, W> columns(tile_k(0));
  constexpr uint32_t STAGE = 2 * Tile::bytes(N), V = Tile::bytes(N);  // offsets from k of stage 0

  float dq[1][W / 8][4] = {}, s[1][N / 8][4], ds[1][N / 8][4];
  Step step;
  int stage = 0;
  {
    const Source from_k = copy.from(p.prefix_k, tile.prefix, kv, 0), from_v = copy.from(p.prefix_v, tile.prefix, kv, 0);
    PrefixWalk<N> walk(a, tile, tile_index, split);
    bool more = walk.next(&step);
    const auto start = [&] {
      if (more) {
        copy.template start<false>(tile_k(stage), from_k, step.start, step.any);
        copy.template start<false>(tile_v(stage), from_v, step.start, step.any);
      }
      copy_commit();
    };
    start();
    while (more) {
      bool full = false;
      if constexpr (!General) full = step.full;
      if (full) {  // nothing to hide, as long as full blocks follow
        bool ahead;
        do {
          copy_wait<0>();
          __syncthreads();  // this block is here, and nobody reads the stage of the last one any more
          const uint32_t at = stage * STAGE;
          ahead = walk.next_is_full(&step);
          stage ^= STAGES - 1;
          if (STAGES == 2 && ahead) {
            copy.template start<true>(tile_k(stage), from_k, step.start, 0);
            copy.template start<true>(tile_v(stage), from_v, step.start, 0);
          }
          copy_commit();
          multiply_rows<T, W, 1, N / 8>(s, left_q, rows.moved(at), false);
          multiply_rows<T, W, 1, N / 8>(ds, left_dout, rows.moved(at + V), false);
          probability_gradients<N>(a, s, ds, mine);
          multiply_columns<T, W, 1, N / 8>(dq, ds, columns.moved(at), false);
          if (STAGES == 1) {
            __syncthreads();
            if (ahead) {
              copy.template start<true>(tile_k(0), from_k, step.start, 0);
              copy.template start<true>(tile_v(0), from_v, step.start, 0);
            }
            copy_commit();
          }
        } while (ahead);
        more = walk.next(&step);
        start();
        continue;
      }
      copy_wait<0>();
      __syncthreads();  // this block is here, and nobody reads the stage of the last one any more
      const uint32_t at = stage * STAGE;
      const int first = step.start;
      more = walk.next(&step);
      stage ^= STAGES - 1;
      if (STAGES == 2) start();
      if (used) {
        uint64_t words[1][2];
        find_words<1>(words, my_lanes,
                      [&](const LaneInfo& lane) { return prefix_word<N, General>(a, first, lane, tile.prefix_len); });
        multiply_rows<T, W, 1, N / 8>(s, left_q, rows.moved(at), a.call.tf32);
        multiply_rows<T, W, 1, N / 8>(ds, left_dout, rows.moved(at + V), a.call.tf32);
        if constexpr (General) {
          logit_gradients<true, N>(a, s, ds, mine, words, first, tile.prefix_len, my_lanes, terms + warp * 16);
        } else {
          hide<1, N>(s, words);
          probability_gradients<N>(a, s, ds, mine);
        }
        multiply_columns<T, W, 1, N / 8>(dq, ds, columns.moved(at), a.call.tf32);
      }
      if (STAGES == 1) {
        __syncthreads();
        start();
      }
    }
  }

  OwnWalk<N> walk(a);
  const Tile k = tile_k(0), v = tile_v(0);
  while (walk.next(&step)) {
    __syncthreads();  // nobody reads the last step's k and v any more
    const RowInfo& row = walk.info();
    copy.template start<false>(k, copy.from_once(p.k, row.batch, kv, row.token), step.start, step.any);
    copy.template start<false>(v, copy.from_once(p.v, row.batch, kv, row.token), step.start, step.any);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    uint64_t words[1][2];
    const uint64_t any = find_words<1>(words, my_lanes, [&](const LaneInfo& lane) {
      return own_word<General>(a, step.start, step.any, walk.row, lane);
    });
    if (!__any_sync(WHOLE_WARP, any != 0)) continue;
    multiply_rows<T, W, 1, N / 8>(s, left_q, rows, a.call.tf32);
    multiply_rows<T, W, 1, N / 8>(ds, left_dout, rows.moved(V), a.call.tf32);
    if constexpr (General) {
      logit_gradients<false, N>(a, s, ds, mine, words, step.start, 0, my_lanes, terms + warp * 16);
    } else {
      hide<1, N>(s, words);
      probability_gradients<N>(a, s, ds, mine);
    }
    multiply_columns_of<T, W, 1, N / 8>(dq, ds, columns, lanes_of_row<1>(my_lanes, walk.row), a.call.tf32);
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free

  store_dq<T, W>(a, dq, q.base, tile.lanes, first_lane, kv, split, 0);
}

}  // namespace ctk::cuda
