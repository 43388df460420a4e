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
  int row = -1, start = 0;  // own keys of a row, or of the prefix (row < 0), from `start` on
  uint64_t any = 0;         // those that are there
  int prefix = 0, split = 0;
  int begin = 0, end = 0;
};

template <int N, int L>
__device__ inline bool find_key_block(const Args& a, int job, KeyBlock* block) {
  constexpr int PER_BLOCK = BLOCK / N;
  const Params& p = a.call.p;
  if (job < a.prefix_programs) {
    const int per_prefix = a.prefix_blocks * PER_BLOCK, rest = job / per_prefix;
    block->prefix = rest % int(p.G), block->split = rest / int(p.G);
    block->start = job % per_prefix * N;
    block->any = low_bits(min(int(p.P) - block->start, N));
    const int first = a.run_first[block->prefix] * a.group / L, last = a.run_end[block->prefix] * a.group;
    const int steps = (last + L - 1) / L - first, share = (steps + a.tile_splits - 1) / a.tile_splits;
    block->begin = first + block->split * share;
    block->end = first + min((block->split + 1) * share, steps);
    return true;
  }
  job -= a.prefix_programs;
  const OwnBlock own = a.own_table[job / PER_BLOCK];
  if (own.row < 0) return false;
  const RowInfo& row = a.rows[own.row];
  const int start = own.start + job % PER_BLOCK * N;
  block->row = own.row, block->start = start, block->any = own_bits(a, row, start) & low_bits(N);
  const int first = p.causal ? max(start - row.offset, 0) : 0;
  const int last = p.window > 0 ? clamp(start + N - 1 + p.window - row.offset, 0, row.queries) : row.queries;
  block->begin = (row.first + first) * a.group / L;
  block->end = first < last ? min(((row.first + last) * a.group + L - 1) / L, a.lanes / L) : block->begin;
  return true;
}

// Whether any of the L lanes of a step sees any of the keys, and whether all see all (of the prefix).
template <int N, int L, int TILE>
__device__ __forceinline__ bool find_seen(const Args& a, const KeyBlock& block, int step, bool* full) {
  const int start = block.start;
  if (block.row < 0) {
    const int tile = step / (TILE / L);
    if (step % (TILE / L) * L >= a.tile_table[tile].lanes) return false;
    const Seen seen = a.seen[int64_t(tile) * a.prefix_blocks + start / BLOCK];
    *full = (~(seen.all >> (start % BLOCK)) & low_bits(N)) == 0;
    return (seen.any >> (start % BLOCK) & low_bits(N)) != 0;
  }
  *full = false;
  return true;
}

// Whether all of the L lanes of a step see all of the keys, which are the prefix's.
template <int N, int L, int TILE>
__device__ __forceinline__ bool is_full(const Args& a, const KeyBlock& block, int step) {
  if (step >= block.end) return false;
  const uint64_t all = a.seen[int64_t(step / (TILE / L)) * a.prefix_blocks + block.start / BLOCK].all;
  return N == BLOCK ? all == ~0ull : (~(all >> (block.start % BLOCK)) & low_bits(N)) == 0;
}

// Products s = k q^T and ds = v dout^T of a warp's keys and L lanes from `first_lane` on -> probabilities, and
// gradients of products: 0 where a lane does not see a key. word: 16 bits per lane, for the warp's keys; all: every one
// is seen. gradients: of logits, for the bias.
template <bool General, int N, int L>
__device__ __forceinline__ void key_probabilities(const Args& a, const KeyBlock& block, int kv, int first_lane,
                                                  const LaneState* lanes, const uint16_t* word, bool all, bool need_k,
                                                  bool need_bias, float* gradients, float (&s)[1][L / 8][4],
                                                  float (&ds)[1][L / 8][4]) {
  const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const bool of_prefix = block.row < 0;
#pragma unroll
  for (int n = 0; n < L / 8; ++n) {
    const int i = 8 * n + thread % 4 * 2;  // this thread's lanes are i and i + 1, its keys g and g + 8 of the warp's
    // bits 0 and 8: keys g and g + 8 of lane i; bits 16 and 24: of lane i + 1
    const uint32_t visible = all ? WHOLE_WARP : *reinterpret_cast<const uint32_t*>(word + i) >> (thread / 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const LaneState& lane = lanes[i + e % 2];
      const bool sees = visible >> (16 * (e % 2) + 8 * (e / 2)) & 1;
      const float delta = need_k ? ds[0][n][e] - lane.delta : 0.0f;
      float derivative = 1.0f, x;
      if constexpr (General) {
        const int key = block.start + warp * 16 + thread / 4 + e / 2 * 8;
        const LaneTerms terms = lane_terms(a, first_lane + i + e % 2, kv, block.prefix);
        const float bias = of_prefix && sees ? bias_of(a, terms, key, int(a.call.p.P)) : 0.0f;
        const int position = lane.position + (of_prefix ? lane.prefix_len : 0);
        x = logit(a, s[0][n][e], bias, terms.slope, position - key, &derivative);
        x = exp2_fast((x - lane.high) - lane.low);
      } else {
        x = exp2_fast(fmaf(s[0][n][e], a.factor, -lane.high));
      }
      s[0][n][e] = sees ? x : 0.0f;
      const float gradient = sees ? x * delta : 0.0f;
      if constexpr (General)
        if (need_bias) gradients[(i + e % 2) * (N + 1) + warp * 16 + thread / 4 + e / 2 * 8] = gradient;
      ds[0][n][e] = sees ? gradient * derivative : 0.0f;  // the derivative is NaN where a hidden key is
    }
  }
}

// Logit gradients of a warp's keys that no lane sees.
template <int N, int L>
__device__ __forceinline__ void clear_bias(float* gradients) {
  const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  for (int i = thread; i < 16 * L; i += 32) gradients[i / 16 * (N + 1) + warp * 16 + i % 16] = 0.0f;
}

// dbias, a sum per key and head, += logit gradients of the lanes of that head, in order.
template <int N, int L, int THREADS>
__device__ __forceinline__ void sum_bias_gradients(const Args& a, int first_lane, const float* gradients,
                                                   float* dbias) {
  __syncthreads();
  const int shift = a.group - first_lane % a.group;
  for (int i = threadIdx.x; i < a.group * N; i += THREADS) {
    float sum = 0.0f;
    for (int lane = (i / N + shift) % a.group; lane < L; lane += a.group) sum += gradients[lane * (N + 1) + i % N];
    dbias[i] += sum;
  }
  __syncthreads();
}

template <int N, int THREADS>
__device__ __forceinline__ void store_bias(const Args& a, const KeyBlock& block, int kv, const float* dbias) {
  const Params& p = a.call.p;
  for (int i = threadIdx.x; i < a.group * N; i += THREADS) {
    const int64_t head = kv * a.group + i / N, key = block.start + i % N;
    if (key < p.P) a.part_dbias[((int64_t(block.split) * p.G + block.prefix) * p.H + head) * p.P + key] = dbias[i];
  }
}

// Stores gradients of a warp's keys, columns from `first` on of `size`: to a tensor, or to the parts of a prefix's sums
// (null: not cut into ranges, or own keys).
template <class T, int W>
__device__ __forceinline__ void store_keys(const Args& a, const KeyBlock& block, int kv, const float (&acc)[W / 8][4],
                                           uint32_t stage, const Tensor4& to, float* part, bool wide, int64_t size,
                                           int first = 0) {
  const Params& p = a.call.p;
  const bool of_prefix = block.row < 0;
  const int first_key = block.start + threadIdx.x / 32 * 16, columns = int(size) - first;
  if (part) {
    part += ((int64_t(block.split) * p.G + block.prefix) * p.Hk + kv) * p.P * size + first;
    return store_rows<float, W>(acc, stage, columns, size % 4 == 0,
                                [&](int i) { return first_key + i < p.P ? part + (first_key + i) * size : nullptr; });
  }
  const RowInfo& row = a.rows[max(block.row, 0)];
  const int64_t batch = of_prefix ? block.prefix : row.batch, token = of_prefix ? 0 : row.token;
  const int64_t end = of_prefix ? p.P : a.call.packed ? row.keys : a.call.T;
  const auto at = [&](int i) { return batch * to.batch + kv * to.head + (token + first_key + i) * to.token + first; };
  if (to.type == Type::f32) {
    store_rows<float, W>(acc, stage, columns, wide,
                         [&](int i) { return first_key + i < end ? static_cast<float*>(to.data) + at(i) : nullptr; });
  } else if constexpr (sizeof(T) == 2) {
    store_rows<T, W>(acc, stage, columns, wide,
                     [&](int i) { return first_key + i < end ? static_cast<T*>(to.data) + at(i) : nullptr; });
  }
}

template <class T, int W, bool General, bool WithK, bool WithV>
__device__ __forceinline__ void backward_keys(const Args& a) {
  constexpr KeyShape SHAPE = key_shape(sizeof(T), W);
  constexpr int N = SHAPE.keys, L = SHAPE.lanes, THREADS = SHAPE.threads(), STAGES = SHAPE.stages;
  constexpr int TILE = query_shape(sizeof(T), W).lanes;  // of the tables in the backward pass
  static_assert(N == 16 * SHAPE.warps && L <= THREADS && TILE % L == 0);
  const int kv = blockIdx.y, warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  const Params& p = a.call.p;
  KeyBlock block;
  if (!find_key_block<N, L>(a, blockIdx.x, &block)) return;
  const bool of_prefix = block.row < 0;
  const bool need_bias = General && WithK && of_prefix && p.dbias;
  const bool need_k = WithK && (of_prefix ? p.dprefix_k.data || need_bias : p.dk.data != nullptr);
  const bool need_v = WithV && (of_prefix ? p.dprefix_v.data != nullptr : p.dv.data != nullptr);
  if (!need_k && !need_v) return;

  extern __shared__ __align__(1024) char memory[];
  using Tile = Shared<T, W>;
  LaneState* states = reinterpret_cast<LaneState*>(memory + key_tiles(sizeof(T), W));  // [3][L]
  uint16_t* words = reinterpret_cast<uint16_t*>(states + 3 * L);                       // [3][4][L], 16 keys of a warp
  const Tile k{shared_address(memory)}, v{k.base + Tile::bytes(N)};
  const uint32_t stages = v.base + Tile::bytes(N);
  float* gradients = reinterpret_cast<float*>(memory + key_shared(sizeof(T), W));  // [L][N + 1], with a bias gradient
  float* dbias = gradients + L * (N + 1);                                          // [group][N]

  {
    const TokenCopy<T, W, N, THREADS> copy(a);
    const RowInfo& row = a.rows[max(block.row, 0)];
    const Source from_k =
        of_prefix ? copy.from(p.prefix_k, block.prefix, kv, 0) : copy.from(p.k, row.batch, kv, row.token);
    const Source from_v =
        of_prefix ? copy.from(p.prefix_v, block.prefix, kv, 0) : copy.from(p.v, row.batch, kv, row.token);
    copy.template start<false>(k, from_k, block.start, block.any);
    copy.template start<false>(v, from_v, block.start, block.any);
  }
  if (need_bias)
    for (int i = threadIdx.x; i < a.group * N; i += THREADS) dbias[i] = 0.0f;

  // Steps of L lanes. While one is computed, q and dout of the next one arrive, and the states of the one after that,
  // which say where its q and dout are.
  constexpr int STATES = L * int(sizeof(LaneState)), STAGE = 2 * Tile::bytes(L), DOUT = Tile::bytes(L);
  struct Place {
    int index, ring, stage;  // the latter two in bytes: which of three places for states, which of two for q and dout
  };
  struct LaneStep : Place {
    bool there = false, full = false;
  };
  const auto after = [&](const LaneStep& last) {
    LaneStep x{{last.index + 1, last.ring == 2 * STATES ? 0 : last.ring + STATES, last.stage ^ (STAGES - 1) * STAGE}};
    for (; x.index < block.end; ++x.index)
      if (find_seen<N, L, TILE>(a, block, x.index, &x.full)) {
        x.there = true;
        break;
      }
    return x;
  };
  const char* all_states = opaque(reinterpret_cast<const char*>(a.state + int64_t(kv) * a.lanes) + threadIdx.x * 16);
  const uint32_t my_states = opaque(shared_address(states) + threadIdx.x * 16);
  const auto copy_states = [&](const Place& x) {
#pragma unroll
    for (int i = 0; i < STATES; i += 16 * THREADS) {
      if (STATES % (16 * THREADS) && i + int(threadIdx.x) * 16 >= STATES) break;
      copy_async(my_states + x.ring + i, all_states + int64_t(x.index) * STATES + i, true);
    }
  };
  // States of a step, from that of lane i on.
  const auto states_of = [&](const Place& x, int i) {
    return reinterpret_cast<const LaneState*>(reinterpret_cast<const char*>(states + i) + x.ring);
  };
  const auto words_of = [&](const Place& x) { return words + x.ring / STATES * 4 * L; };
  const auto tile_q = [&](const Place& x) { return Tile{stages + x.stage}; };
  const auto tile_dout = [&](const Place& x) { return Tile{stages + x.stage + DOUT}; };
  const LaneCopy<T, W, L, THREADS> copy(a);
  const auto copy_tiles = [&](const LaneStep& x) {
    if (x.there) copy.start(tile_q(x), tile_dout(x), states_of(x, 0), block.row);
  };
  // What lane threadIdx.x of a step sees of the keys; its 16 bits for each warp.
  const auto find_word = [&](const LaneStep& x) -> uint64_t {
    if (!x.there || (x.full && !General) || int(threadIdx.x) >= L) return 0;
    const LaneState& lane = *states_of(x, threadIdx.x);
    const LaneInfo info{lane.row, lane.index, lane.position, 0};
    if (of_prefix) return prefix_word<N, General>(a, block.start, info, lane.prefix_len);
    return own_word<General>(a, block.start, block.any, block.row, info);
  };
  const auto store_word = [&](const LaneStep& x, uint64_t word) {
    if (!x.there || (x.full && !General) || int(threadIdx.x) >= L) return;
#pragma unroll
    for (int w = 0; w < SHAPE.warps; ++w) words_of(x)[w * L + threadIdx.x] = uint16_t(word >> (16 * w));
  };
  LaneStep now = after(LaneStep{{block.begin - 1, 2 * STATES, (STAGES - 1) * STAGE}});
  if (now.there) copy_states(now);
  copy_commit();
  LaneStep next = after(now);
  copy_wait<0>();
  __syncthreads();
  copy_tiles(now);
  if (next.there) copy_states(next);
  copy_commit();
  store_word(now, find_word(now));

  const RowsA<T, W> left_k(k, warp * 16), left_v(v, warp * 16);
  const RowsB<T, W> rows(Tile{stages});
  const ColumnsB<T, W> columns(Tile{stages});
  float dk[1][W / 8][4] = {}, dv[1][W / 8][4] = {};
  float s[1][L / 8][4], ds[1][L / 8][4];
  while (now.there) {
    if constexpr (!General) {
      // Nothing to hide as long as this step and the next one are visible as a whole.
      bool ahead = now.full && next.full;
      if (ahead) {
        do {
          copy_wait<0>();
          __syncthreads();
          if (STAGES == 2) copy.start(tile_q(next), tile_dout(next), states_of(next, 0), -1);
          Place later{next.index + 1, next.ring == 2 * STATES ? 0 : next.ring + STATES,
                      next.stage ^ (STAGES - 1) * STAGE};
          ahead = is_full<N, L, TILE>(a, block, later.index);
          if (ahead) copy_states(later);
          copy_commit();
          multiply_rows<T, W, 1, L / 8>(s, left_k, rows.moved(now.stage), false);
          multiply_rows<T, W, 1, L / 8>(ds, left_v, rows.moved(now.stage + DOUT), false);
          const LaneState* lanes = states_of(now, thread % 4 * 2);
#pragma unroll
          for (int n = 0; n < L / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const LaneState& lane = lanes[8 * n + e % 2];
              s[0][n][e] = exp2_fast(fmaf(s[0][n][e], a.factor, -lane.high));
              ds[0][n][e] = s[0][n][e] * (ds[0][n][e] - lane.delta);
            }
          multiply_columns<T, W, 1, L / 8>(dv, s, columns.moved(now.stage + DOUT), false);
          multiply_columns<T, W, 1, L / 8>(dk, ds, columns.moved(now.stage), false);
          if (STAGES == 1) {
            __syncthreads();
            copy.start(tile_q(next), tile_dout(next), states_of(next, 0), -1);
            copy_commit();
          }
          static_cast<Place&>(now) = next;
          static_cast<Place&>(next) = later;
        } while (ahead);
        next = after(now);
        if (next.there) copy_states(next);
        copy_commit();
      }
    }
    copy_wait<0>();
    __syncthreads();  // this step is here, and nobody reads the memory of the last one any more
    if (STAGES == 2) copy_tiles(next);
    const LaneStep later = after(next);
    if (later.there) copy_states(later);
    copy_commit();
    const uint64_t next_word = find_word(next);
    const uint16_t* word = words_of(now) + warp * L;
    const LaneState* lanes = states_of(now, 0);
    const bool all = now.full && !General;
    bool active = true;
    if (!all) active = __any_sync(WHOLE_WARP, 2 * thread < L && reinterpret_cast<const uint32_t*>(word)[thread]);
    if (active) {
      multiply_rows<T, W, 1, L / 8>(s, left_k, rows.moved(now.stage), a.call.tf32);
      if (need_k) multiply_rows<T, W, 1, L / 8>(ds, left_v, rows.moved(now.stage + DOUT), a.call.tf32);
      key_probabilities<General, N, L>(a, block, kv, now.index * L, lanes, word, all, need_k, need_bias, gradients, s,
                                       ds);
      if (need_v) multiply_columns<T, W, 1, L / 8>(dv, s, columns.moved(now.stage + DOUT), a.call.tf32);
      if (need_k) multiply_columns<T, W, 1, L / 8>(dk, ds, columns.moved(now.stage), a.call.tf32);
    } else if (need_bias) {
      clear_bias<N, L>(gradients);
    }
    if (need_bias) sum_bias_gradients<N, L, THREADS>(a, now.index * L, gradients, dbias);
    store_word(next, next_word);
    if (STAGES == 1) {
      __syncthreads();
      copy_tiles(next);
      copy_commit();
    }
    now = next, next = later;
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free

  const uint32_t stage_rows = k.base + warp * staging_bytes(W);
  if constexpr (WithK) {
#pragma unroll
    for (int d = 0; d < W / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[0][d][e] *= a.scale;
    if (of_prefix ? p.dprefix_k.data != nullptr : need_k)
      store_keys<T, W>(a, block, kv, dk[0], stage_rows, of_prefix ? p.dprefix_k : p.dk, of_prefix ? a.part_dk : nullptr,
                       of_prefix ? a.wide_dprefix_k : a.wide_dk, p.D);
  }
  if constexpr (WithV)
    if (need_v)
      store_keys<T, W>(a, block, kv, dv[0], stage_rows, of_prefix ? p.dprefix_v : p.dv, of_prefix ? a.part_dv : nullptr,
                       of_prefix ? a.wide_dprefix_v : a.wide_dv, p.Dv);
  if (need_bias) store_bias<N, THREADS>(a, block, kv, dbias);
}

}  // namespace ctk::cuda
