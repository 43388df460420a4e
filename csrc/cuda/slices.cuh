// Head dimensions above 256: forward and backward, in kernels that know every option.
//
// Neither 512 columns of results fit the registers of a warp, nor two tiles of whole tokens the shared memory of a
// block. So a program computes one slice of the columns of its result, and logits as sums over slices of the
// contraction:
//
//     program (lanes, slice r):  keeps q                            whole tokens, [lanes, D]
//       for each block of keys:
//         s <- sum over slices i of q_i k_i^T                       k_0, k_1, ..., v_r pass through two buffers
//         p <- softmax step of s;  o_r <- o_r + p v_r               [16, slice] in the registers of a warp
//
// dq keeps q and dout and lets v_0, v_1, ..., then k pass, the slice r of k last, since dq_r needs it once ds is known.
// dk keeps k and v and lets dout and q pass, dv keeps k and lets q and dout_r pass. While one slice is multiplied, the
// next one arrives. D and Dv need not be equal.
//
// A slice has 512 bytes of a token: 256 numbers of 16 bits or 128 of 32. At D = Dv = 512 there are 2 slices (fp32: 4),
// and as often are k read from the L2 cache and logits computed, where v is read once: the forward pass takes 1.5 times
// the products of one that had the room (fp32: 2.5). The least shared memory that an architecture gives a block is 99
// KiB:
//
//     forward   64 lanes of q (64 KiB; fp32: 32 lanes)                and two slices of 32 keys (32 KiB)
//     dq        32 lanes of q and dout (64 KiB; fp32: 16 lanes)       and two slices of 32 keys (32 KiB)
//     dk, dv    32 keys of k and v (64 KiB; fp32: 16 keys)            and two slices of 16 lanes (16 KiB)
#pragma once
#include "backward_keys.cuh"
#include "backward_query.cuh"
#include "forward.cuh"

namespace ctk::cuda {

template <class T>
constexpr int SLICE = slice_width(sizeof(T));
template <class T>
using SliceTile = Shared<T, SLICE<T>>;

// Starts copying a slice of N tokens into a tile, zeros where token(i) is null and after `chunks` pieces of a token.
template <class T, int N, int THREADS, class Token>
__device__ __forceinline__ void copy_slice(SliceTile<T> to, int slice, int chunks, const Token& token) {
  constexpr int CHUNKS = SLICE_BYTES / 16;
#pragma unroll 1
  for (int at = threadIdx.x; at < N * CHUNKS; at += THREADS) {
    const int row = at / CHUNKS, chunk = slice * CHUNKS + at % CHUNKS;
    const char* from = token(row);
    copy_async(to.chunk(row, at % CHUNKS), from + chunk * 16, from && chunk < chunks);
  }
}

// acc += rows of a times rows of b. The sum over a slice is taken by itself: shorter sums round less.
template <class T, int N>
__device__ __forceinline__ void add_slice(float (&acc)[1][N][4], SliceTile<T> a, SliceTile<T> b, bool tf32) {
  float sum[1][N][4];
  multiply_rows<T, SLICE<T>, 1, N>(sum, RowsA<T, SLICE<T>>(a, threadIdx.x / 32 * 16), RowsB<T, SLICE<T>>(b), tf32);
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[0][n][e] += sum[0][n][e];
}

template <int N>
__device__ __forceinline__ void clear_tile(float (&x)[1][N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) clear(x[0][n]);
}

// N keys: of the prefix (row < 0), or own keys of a row.
struct KeyStep : Step {
  int row = -1;
};

// The keys that a tile of lanes walks, prefix first, and their slices on the way to two buffers.
template <class T, int N, int THREADS>
class KeySlices {
 public:
  __device__ KeySlices(const Args& a, const TileInfo& tile, const Program& at, int kv, uint32_t buffers)
      : a_(a), prefix_(a, tile, at.tile, at.split), own_(a), index_(tile.prefix), kv_(kv), buffers_(buffers) {}

  // False: there is no further step.
  __device__ __forceinline__ bool next(KeyStep* step) {
    step->row = -1;
    if (prefix_.next(step)) return true;
    const bool there = own_.next(step);
    step->row = own_.row;
    return there;
  }

  __device__ __forceinline__ SliceTile<T> buffer(int i) const { return {buffers_ + i * SliceTile<T>::bytes(N)}; }

  // Starts copying a slice of k or v.
  __device__ __forceinline__ void fetch(const KeyStep& step, bool values, int slice, int to) const {
    const Params& p = a_.call.p;
    const RowInfo& row = a_.rows[max(step.row, 0)];
    const Source from = step.row < 0 ? source<T>(values ? p.prefix_v : p.prefix_k, index_, kv_, step.start)
                                     : source<T>(values ? p.v : p.k, row.batch, kv_, row.token + step.start);
    copy_slice<T, N, THREADS>(buffer(to), slice, values ? a_.value_chunks : a_.chunks,
                              [&](int i) { return step.any >> i & 1 ? from.data + i * from.token : nullptr; });
  }

 private:
  const Args& a_;
  PrefixWalk<N> prefix_;
  OwnWalk<N> own_;
  int index_, kv_;
  uint32_t buffers_;
};

// words <- which keys of a step each of a thread's lanes sees. Returns whether any lane of the warp sees any.
template <int N>
__device__ __forceinline__ bool find_key_words(uint64_t (&words)[1][2], const Args& a, const KeyStep& step,
                                               const LaneInfo* lanes, int prefix_len) {
  const uint64_t any = find_words<1>(words, lanes, [&](const LaneInfo& lane) {
    return step.row < 0 ? prefix_word<N, true>(a, step.start, lane, prefix_len)
                        : own_word<true>(a, step.start, step.any, step.row, lane);
  });
  return __any_sync(WHOLE_WARP, any != 0);
}

// acc += p times the rows of b, which are the keys of a step. Own keys of a row reach its lanes alone.
template <class T, int K>
__device__ __forceinline__ void add_columns(float (&acc)[1][SLICE<T> / 8][4], const float (&p)[1][K][4], SliceTile<T> b,
                                            const KeyStep& step, const LaneInfo* lanes, bool tf32) {
  const ColumnsB<T, SLICE<T>> columns(b);
  if (step.row < 0) multiply_columns<T, SLICE<T>, 1, K>(acc, p, columns, tf32);
  else multiply_columns_of<T, SLICE<T>, 1, K>(acc, p, columns, lanes_of_row<1>(lanes, step.row), tf32);
}

template <class T>
__device__ __forceinline__ void forward_slices(const Args& a) {
  constexpr ForwardShape SHAPE = forward_shape(sizeof(T), SLICED, true);
  constexpr int N = SHAPE.keys, THREADS = SHAPE.threads();
  static_assert(SHAPE.lanes_per_warp() == 16);
  const Params& p = a.call.p;
  const Program at;
  const int kv = at.kv % int(p.Hk), mine = at.kv / int(p.Hk), slices = slices_of(p.D, sizeof(T));
  const TileInfo tile = a.tile_table[at.tile];
  if (tile.lanes == 0) return;
  const int first_lane = at.tile * SHAPE.lanes, warp = threadIdx.x / 32;

  extern __shared__ __align__(1024) char memory[];
  using Tile = SliceTile<T>;
  const uint32_t base = shared_address(memory);
  const auto q = [&](int slice) { return Tile{base + slice * Tile::bytes(SHAPE.lanes)}; };
  LaneInfo* lanes = reinterpret_cast<LaneInfo*>(memory + forward_tiles(sizeof(T), SLICED, true));
  LaneTerms* terms = reinterpret_cast<LaneTerms*>(lanes + SHAPE.lanes);
  for (int i = threadIdx.x; i < SHAPE.lanes; i += THREADS) {
    lanes[i] = lane_info(a, first_lane + i, i < tile.lanes);
    terms[i] = lane_terms(a, first_lane + i, kv, tile.prefix);
  }
  for (int slice = 0; slice < slices; ++slice)
    copy_slice<T, SHAPE.lanes, THREADS>(q(slice), slice, a.chunks, [&](int i) {
      return reinterpret_cast<const char*>(lane_token<const T>(a, p.q, first_lane + i, kv));
    });
  __syncthreads();

  const LaneInfo* my_lanes = lanes + warp * 16;
  KeySlices<T, N, THREADS> keys(a, tile, at, kv, base + SHAPE.lanes * SLICED * int(sizeof(T)));
  Softmax<1> softmax;
  float o[1][SLICE<T> / 8][4] = {}, s[1][N / 8][4];
  KeyStep now, next;
  int buffer = 0;
  bool more = keys.next(&now);
  if (more) keys.fetch(now, false, 0, buffer);
  copy_commit();
  while (more) {
    uint64_t words[1][2];
    const bool active = find_key_words<N>(words, a, now, my_lanes, tile.prefix_len);
    clear_tile(s);
    for (int slice = 0; slice < slices; ++slice, buffer ^= 1) {
      copy_wait<0>();
      __syncthreads();  // this slice of k is here, and nobody reads the other buffer any more
      const bool last = slice + 1 == slices;
      keys.fetch(now, last, last ? mine : slice + 1, buffer ^ 1);
      copy_commit();
      if (active) add_slice<T>(s, q(slice), keys.buffer(buffer), a.call.tf32);
    }
    copy_wait<0>();
    __syncthreads();  // v is here, and nobody reads k any more
    more = keys.next(&next);
    if (more) keys.fetch(next, false, 0, buffer ^ 1);
    copy_commit();
    if (active) {
      const LaneTerms* my_terms = terms + warp * 16;
      if (now.row < 0) to_logits<true, 1, N>(a, s, now.start, tile.prefix_len, my_lanes, my_terms);
      else to_logits<false, 1, N>(a, s, now.start, 0, my_lanes, my_terms);
      hide<1, N>(s, words);
      softmax.step(s, o, 1.0f);
      add_columns<T>(o, s, keys.buffer(buffer), now, my_lanes, a.call.tf32);
    }
    buffer ^= 1;
    now = next;
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free
  store_out<T, SLICE<T>>(a, softmax, o, base, SHAPE.lanes, kv, mine * SLICE<T>);
}

template <class T>
__device__ __forceinline__ void backward_query_slices(const Args& a) {
  constexpr QueryShape SHAPE = query_shape(sizeof(T), SLICED);
  constexpr int N = SHAPE.keys, THREADS = SHAPE.threads();
  const Params& p = a.call.p;
  const Program at;
  const int kv = at.kv % int(p.Hk), mine = at.kv / int(p.Hk);
  const int slices = slices_of(p.D, sizeof(T)), value_slices = slices_of(p.Dv, sizeof(T));
  const TileInfo tile = a.tile_table[at.tile];
  if (tile.lanes == 0) return;
  const int first_lane = at.tile * SHAPE.lanes, warp = threadIdx.x / 32, thread = threadIdx.x % 32;

  extern __shared__ __align__(1024) char memory[];
  using Tile = SliceTile<T>;
  constexpr int TOKENS = SHAPE.lanes * SLICED * int(sizeof(T));
  const uint32_t base = shared_address(memory);
  const auto q = [&](int slice) { return Tile{base + slice * Tile::bytes(SHAPE.lanes)}; };
  const auto dout = [&](int slice) { return Tile{base + TOKENS + slice * Tile::bytes(SHAPE.lanes)}; };
  LaneInfo* lanes = reinterpret_cast<LaneInfo*>(memory + query_tiles(sizeof(T), SLICED));
  LaneTerms* terms = reinterpret_cast<LaneTerms*>(lanes + SHAPE.lanes);
  const LaneState* state = a.state + int64_t(kv) * a.lanes + first_lane;
  for (int i = threadIdx.x; i < SHAPE.lanes; i += THREADS) {
    lanes[i] = lane_info(a, first_lane + i, i < tile.lanes);
    terms[i] = lane_terms(a, first_lane + i, kv, tile.prefix);
  }
  for (int slice = 0; slice < slices; ++slice)
    copy_slice<T, SHAPE.lanes, THREADS>(q(slice), slice, a.chunks, [&](int i) {
      return state[i].bytes ? static_cast<const char*>(p.q.data) + uint64_t(state[i].q) * 16 : nullptr;
    });
  for (int slice = 0; slice < value_slices; ++slice)
    copy_slice<T, SHAPE.lanes, THREADS>(dout(slice), slice, a.value_chunks, [&](int i) {
      return state[i].bytes ? static_cast<const char*>(p.dout.data) + uint64_t(state[i].dout) * 16 : nullptr;
    });
  __syncthreads();

  const LaneState states[2] = {state[warp * 16 + thread / 4], state[warp * 16 + thread / 4 + 8]};
  const LaneInfo* my_lanes = lanes + warp * 16;
  const LaneTerms* my_terms = terms + warp * 16;
  KeySlices<T, N, THREADS> keys(a, tile, at, kv, base + 2 * TOKENS);
  // all slices of v, then those of k, the slice of this program last
  const auto slice_of_k = [&](int i) { return (mine + 1 + i - value_slices) % slices; };
  const auto fetch = [&](const KeyStep& step, int i, int to) {
    keys.fetch(step, i < value_slices, i < value_slices ? i : slice_of_k(i), to);
  };
  float dq[1][SLICE<T> / 8][4] = {}, s[1][N / 8][4], ds[1][N / 8][4];
  KeyStep now, next;
  int buffer = 0;
  bool more = keys.next(&now);
  if (more) fetch(now, 0, buffer);
  copy_commit();
  while (more) {
    uint64_t words[1][2];
    const bool active = find_key_words<N>(words, a, now, my_lanes, tile.prefix_len);
    clear_tile(s), clear_tile(ds);
    const int count = value_slices + slices;
    for (int i = 0; i < count; ++i, buffer ^= 1) {
      copy_wait<0>();
      __syncthreads();  // this slice is here, and nobody reads the other buffer any more
      if (i + 1 < count) fetch(now, i + 1, buffer ^ 1);
      else if ((more = keys.next(&next))) fetch(next, 0, buffer ^ 1);
      copy_commit();
      if (!active) continue;
      const Tile tokens = keys.buffer(buffer);
      if (i < value_slices) add_slice<T>(ds, dout(i), tokens, a.call.tf32);
      else add_slice<T>(s, q(slice_of_k(i)), tokens, a.call.tf32);
      if (i + 1 < count) continue;
      if (now.row < 0)
        logit_gradients<true, N>(a, s, ds, states, words, now.start, tile.prefix_len, my_lanes, my_terms);
      else logit_gradients<false, N>(a, s, ds, states, words, now.start, 0, my_lanes, my_terms);
      add_columns<T>(dq, ds, tokens, now, my_lanes, a.call.tf32);
    }
    now = next;
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free
  store_dq<T, SLICE<T>>(a, dq, base, tile.lanes, first_lane, kv, at.split, mine * SLICE<T>);
}

// dk, or dv.
template <class T, bool K>
__device__ __forceinline__ void backward_keys_slices(const Args& a) {
  constexpr KeyShape SHAPE = key_shape(sizeof(T), SLICED);
  constexpr int N = SHAPE.keys, L = SHAPE.lanes, THREADS = SHAPE.threads();
  constexpr int TILE = query_shape(sizeof(T), SLICED).lanes;  // of the tables in the backward pass
  static_assert(N == 16 * SHAPE.warps && L <= THREADS && TILE % L == 0);
  const Params& p = a.call.p;
  const int kv = blockIdx.y % int(p.Hk), mine = blockIdx.y / int(p.Hk), warp = threadIdx.x / 32;
  const int slices = slices_of(p.D, sizeof(T)), value_slices = slices_of(p.Dv, sizeof(T));
  KeyBlock block;
  if (!find_key_block<N, L>(a, blockIdx.x, &block)) return;
  const bool of_prefix = block.row < 0;
  const Tensor4& to = K ? of_prefix ? p.dprefix_k : p.dk : of_prefix ? p.dprefix_v : p.dv;
  const bool need_bias = K && of_prefix && p.dbias && mine == 0;
  if (!to.data && !need_bias) return;

  extern __shared__ __align__(1024) char memory[];
  using Tile = SliceTile<T>;
  constexpr int TOKENS = N * SLICED * int(sizeof(T));
  const uint32_t base = shared_address(memory), buffers = base + 2 * TOKENS;
  LaneState* states = reinterpret_cast<LaneState*>(memory + key_tiles(sizeof(T), SLICED));  // [2][L]
  uint16_t* words = reinterpret_cast<uint16_t*>(states + 2 * L);                            // [warps][L], 16 keys each
  float* gradients = reinterpret_cast<float*>(memory + key_shared(sizeof(T), SLICED));      // [L][N + 1]
  float* dbias = gradients + L * (N + 1);                                                   // [group][N]
  const auto k = [&](int slice) { return Tile{base + slice * Tile::bytes(N)}; };
  const auto v = [&](int slice) { return Tile{base + TOKENS + slice * Tile::bytes(N)}; };
  const auto tokens_in = [&](int buffer) { return Tile{buffers + buffer * Tile::bytes(L)}; };

  const auto keep = [&](const Tile& tile, const Tensor4& prefix, const Tensor4& own, int slice, int chunks) {
    const RowInfo& row = a.rows[max(block.row, 0)];
    const Source from = of_prefix ? source<T>(prefix, block.prefix, kv, block.start)
                                  : source<T>(own, row.batch, kv, row.token + block.start);
    copy_slice<T, N, THREADS>(tile, slice, chunks,
                              [&](int i) { return block.any >> i & 1 ? from.data + i * from.token : nullptr; });
  };
  for (int slice = 0; slice < slices; ++slice) keep(k(slice), p.prefix_k, p.k, slice, a.chunks);
  for (int slice = 0; K && slice < value_slices; ++slice) keep(v(slice), p.prefix_v, p.v, slice, a.value_chunks);
  if (need_bias)
    for (int i = threadIdx.x; i < a.group * N; i += THREADS) dbias[i] = 0.0f;

  // Slices of L lanes. dk: all of dout, then those of q, the slice of this program last. dv: all of q, then one of
  // dout.
  const int before = K ? value_slices : slices, count = before + (K ? slices : 1);
  const auto is_q = [&](int i) { return K == (i >= before); };
  const auto slice_at = [&](int i) { return i < before ? i : K ? (mine + 1 + i - before) % slices : mine; };
  const auto fetch = [&](int ring, int i, int buffer) {
    const bool of_q = is_q(i);
    copy_slice<T, L, THREADS>(tokens_in(buffer), slice_at(i), of_q ? a.chunks : a.value_chunks, [&](int lane) {
      const LaneState& from = states[ring * L + lane];
      const bool there = from.bytes && (of_prefix || from.row == block.row);
      const char* data = static_cast<const char*>(of_q ? p.q.data : p.dout.data);
      return there ? data + uint64_t(of_q ? from.q : from.dout) * 16 : nullptr;
    });
  };
  const auto copy_states = [&](int ring, int step) {
    const char* from = reinterpret_cast<const char*>(a.state + int64_t(kv) * a.lanes + int64_t(step) * L);
    for (int i = threadIdx.x * 16; i < L * int(sizeof(LaneState)); i += THREADS * 16)
      copy_async(shared_address(states + ring * L) + i, from + i, true);
  };
  const auto after = [&](int step) {
    bool full;
    do ++step;
    while (step < block.end && !find_seen<N, L, TILE>(a, block, step, &full));
    return step;
  };
  int now = after(block.begin - 1), ring = 0, buffer = 0;
  if (now < block.end) copy_states(ring, now);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  if (now < block.end) fetch(ring, 0, buffer);
  copy_commit();

  float acc[1][SLICE<T> / 8][4] = {}, s[1][L / 8][4], ds[1][L / 8][4];
  while (now < block.end) {
    const int next = after(now);
    clear_tile(s), clear_tile(ds);
    for (int i = 0; i < count; ++i, buffer ^= 1) {
      copy_wait<0>();
      __syncthreads();  // this slice is here, and nobody reads the other buffer or the last step's words any more
      if (i == 0 && int(threadIdx.x) < L) {  // which of the keys this lane sees
        const LaneState& lane = states[ring * L + threadIdx.x];
        const LaneInfo info{lane.row, lane.index, lane.position, 0};
        const uint64_t word = of_prefix ? prefix_word<N, true>(a, block.start, info, lane.prefix_len)
                                        : own_word<true>(a, block.start, block.any, block.row, info);
#pragma unroll
        for (int w = 0; w < SHAPE.warps; ++w) words[w * L + threadIdx.x] = uint16_t(word >> (16 * w));
      }
      if (i == 0 && next < block.end) copy_states(ring ^ 1, next);
      if (i + 1 < count) fetch(ring, i + 1, buffer ^ 1);
      else if (next < block.end) fetch(ring ^ 1, 0, buffer ^ 1);
      copy_commit();
      const Tile tokens = tokens_in(buffer);
      if (is_q(i)) add_slice<T>(s, k(slice_at(i)), tokens, a.call.tf32);
      else if (K) add_slice<T>(ds, v(slice_at(i)), tokens, a.call.tf32);
      if (i + 1 < count) continue;
      key_probabilities<true, N, L>(a, block, kv, now * L, states + ring * L, words + warp * L, false, K, need_bias,
                                    gradients, s, ds);
      multiply_columns<T, SLICE<T>, 1, L / 8>(acc, K ? ds : s, ColumnsB<T, SLICE<T>>(tokens), a.call.tf32);
      if (need_bias) sum_bias_gradients<N, L, THREADS>(a, now * L, gradients, dbias);
    }
    now = next, ring ^= 1;
  }
  copy_wait<0>();
  __syncthreads();  // the tiles are free

  if (K)
#pragma unroll
    for (int d = 0; d < SLICE<T> / 8; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[0][d][e] *= a.scale;
  float* part = !of_prefix ? nullptr : K ? a.part_dk : a.part_dv;
  const bool wide = K ? of_prefix ? a.wide_dprefix_k : a.wide_dk : of_prefix ? a.wide_dprefix_v : a.wide_dv;
  if (to.data)
    store_keys<T, SLICE<T>>(a, block, kv, acc[0], base + warp * staging_bytes(SLICE<T>), to, part, wide, K ? p.D : p.Dv,
                            mine * SLICE<T>);
  if (need_bias) store_bias<N, THREADS>(a, block, kv, dbias);
}

}  // namespace ctk::cuda
