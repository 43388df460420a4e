// The keys that a tile of lanes walks, and which lane sees which of them.
//
// Visibility is a word per lane and block of keys, bit n for key n of the block: spans, patterns, dropped tokens, the
// prefix's length, causality and windows are all in it. A block that no lane sees is skipped, and one that all lanes
// see needs no mask at all; the tables tell which, before anything of the block is loaded. Own keys belong to one row:
// they are walked row by row, in blocks that start at the row's first key, so that the order in which a lane's sums are
// taken does not depend on its neighbours.
#pragma once
#include "setup.cuh"
#include "shared.cuh"

namespace ctk::cuda {

constexpr float LOG2E_F = float(LOG2E);

// N keys from `start` on: of the prefix, or own keys of a row.
struct Step {
  int start = 0;
  uint64_t any = 0;   // keys that some lane sees; others are not read
  bool full = false;  // all lanes see all of them
};

struct alignas(16) LaneInfo {
  int row;  // < 0: nothing there
  int index, position, unused;
};
static_assert(sizeof(LaneInfo) == LANE_INFO_BYTES);

// What the general kernels add to the logits of a lane.
struct alignas(16) LaneTerms {
  const float* bias;  // of prefix key 0; null: none
  float slope;        // of ALiBi, in units of log 2
};
static_assert(sizeof(LaneTerms) == LANE_TERMS_BYTES);

__device__ __forceinline__ LaneInfo lane_info(const Args& a, int lane, bool valid) {
  if (!valid) return {-1, 0, 0, 0};
  const Slot slot = a.slot_table[lane / a.group];
  if (slot.row < 0) return {-1, 0, 0, 0};
  return {slot.row, a.rows[slot.row].index, slot.position, 0};
}

__device__ __forceinline__ LaneTerms lane_terms(const Args& a, int lane, int kv, int prefix) {
  const Params& p = a.call.p;
  const int head = kv * a.group + lane % a.group;
  const float* bias = static_cast<const float*>(p.bias);
  if (bias) bias += prefix * p.bias_prefix + head * p.bias_head;
  return {bias, p.alibi ? static_cast<const float*>(p.alibi)[head] * LOG2E_F : 0.0f};
}

// Own keys start .. start + 63 of a row that are valid and that its context rule leaves visible.
__device__ __forceinline__ uint64_t own_bits(const Args& a, const RowInfo& row, int start) {
  uint64_t bits = low_bits(row.keys - start);
  if (a.own_context) {  // context positions; the block may start inside a word
    const int64_t position = a.call.p.P + start, word = position / BLOCK;
    const int shift = int(position % BLOCK);
    const uint64_t* words = a.bits + int64_t(row.index) * a.words;
    const uint64_t low = word < a.words ? words[word] : ~0ull, high = word + 1 < a.words ? words[word + 1] : ~0ull;
    bits &= low >> shift | (shift ? high << (64 - shift) : 0);
  }
  return bits;
}

// What a lane sees of the N prefix keys of a step.
template <int N, bool General>
__device__ __forceinline__ uint64_t prefix_word(const Args& a, int start, const LaneInfo& lane, int prefix_len) {
  const Params& p = a.call.p;
  if (lane.row < 0) return 0;
  uint64_t bits = a.bits[int64_t(lane.index) * a.words + start / BLOCK] >> (start % BLOCK);
  bits &= low_bits(min(prefix_len - start, N));
  if (General && p.window > 0 && p.window_prefix)
    bits &= ~low_bits(clamp(prefix_len + lane.position - p.window + 1 - start, 0, 64));
  return bits;
}

// What a lane sees of own keys of `row`, of which `any` are there.
template <bool General>
__device__ __forceinline__ uint64_t own_word(const Args& a, int start, uint64_t any, int row, const LaneInfo& lane) {
  const Params& p = a.call.p;
  if (lane.row != row) return 0;
  if (p.causal) any &= low_bits(lane.position + 1 - start);
  if (General && p.window > 0) any &= ~low_bits(clamp(lane.position - p.window + 1 - start, 0, 64));
  return any;
}

// The prefix keys of a tile that some lane sees, N at a time, or the part of them that is this split's.
template <int N>
class PrefixWalk {
 public:
  __device__ PrefixWalk(const Args& a, const TileInfo& tile, int index, int split) {
    const int share = (a.prefix_blocks + a.key_splits - 1) / a.key_splits * BLOCK;
    seen_ = a.seen + int64_t(index) * a.prefix_blocks;
    key_ = split * share, end_ = max(min(split * share + share, tile.prefix_len), 0);
  }

  // False: there is no further step.
  __device__ __forceinline__ bool next(Step* step) {
    while (key_ < end_) {
      const Seen seen = seen_[key_ / BLOCK];
      const uint64_t all = low_bits(N);
      *step = {int(key_), seen.any >> (key_ % BLOCK) & all, (seen.all >> (key_ % BLOCK) & all) == all};
      key_ += seen.any ? N : BLOCK;  // N divides BLOCK, and a hidden word is met at its start
      if (step->any) return true;
    }
    return false;
  }

  // Whether the next N keys are visible to all lanes; if so, they become the step.
  __device__ __forceinline__ bool next_is_full(Step* step) {
    if (key_ >= end_) return false;
    const uint64_t all = seen_[key_ / BLOCK].all;
    if (N == BLOCK ? all != ~0ull : (~(all >> (key_ % BLOCK)) & low_bits(N)) != 0) return false;
    step->start = key_;
    key_ += N;
    return true;
  }

 private:
  const Seen* seen_;
  uint32_t key_, end_;
};

// The own keys of a tile's rows, row by row, or the part of them that is this split's. It reads values again from
// the tables instead of keeping them: registers are scarce where it is used.
template <int N>
class OwnWalk {
 public:
  int row;  // of the step, as an index into the rows

  __device__ explicit OwnWalk(const Args& a) : row(a.tile_table[Program().tile].row_begin - 1), a_(a) {}

  __device__ __forceinline__ const RowInfo& info() const { return a_.rows[row]; }

  // False: there is no further step.
  __device__ __forceinline__ bool next(Step* step) {
    for (;;) {
      while (key_ >= end_) {
        if (++row >= a_.tile_table[Program().tile].row_end) return false;
        enter_row();
      }
      *step = {key_, own_bits(a_, info(), key_) & low_bits(min(end_ - key_, N)), false};
      key_ += N;
      if (step->any && count_++ % a_.key_splits == Program().split) return true;
    }
  }

 private:
  // Own keys of a row that its lanes in this tile may see, in blocks from the row's first key on.
  __device__ __forceinline__ void enter_row() {
    const Params& p = a_.call.p;
    const RowInfo info = a_.rows[row];
    const int tile = Program().tile, lane = tile * a_.tile_lanes;
    const int first = max(lane / a_.group - info.first, 0);
    const int last = min((lane + a_.tile_table[tile].lanes - 1) / a_.group - info.first, info.queries - 1);
    end_ = p.causal ? min(info.keys, info.offset + last + 1) : info.keys;
    key_ = p.window > 0 ? clamp(info.offset + first - p.window + 1, 0, info.keys) / N * N : 0;
    if (first > last) end_ = key_;
  }

  const Args& a_;
  int key_ = 0, end_ = 0, count_ = 0;
};

// Tokens of one head.
struct Source {
  const char* data;  // of the first
  int64_t token;     // from one to the next, in bytes
};

template <class T>
__device__ __forceinline__ Source source(const Tensor4& t, int64_t batch, int64_t head, int64_t token) {
  return {static_cast<const char*>(t.data) + (batch * t.batch + head * t.head + token * t.token) * int64_t(sizeof(T)),
          t.token * int64_t(sizeof(T))};
}

// Copies N tokens of a head into a tile, zeros after D. A thread copies the same chunk of several tokens, if there are
// enough threads for the chunks of 8 tokens or more.
template <class T, int W, int N, int THREADS>
class TokenCopy {
 public:
  __device__ __forceinline__ explicit TokenCopy(const Args& a)
      : chunks_(a.chunks), to_(COLUMN ? opaque(Shared<T, W>{0}.chunk(first_row(), first_chunk())) : 0) {}

  // Start address of this thread in a head, for `start`.
  __device__ __forceinline__ Source from(const Tensor4& t, int64_t batch, int64_t head, int64_t token) const {
    Source x = source<T>(t, batch, head, token);
    // optimisation barrier: hoisted out of a loop over rows, this thread's offset would occupy registers
    if (COLUMN) x.data += opaque(uint32_t(first_row())) * x.token + opaque(uint32_t(first_chunk())) * 16;
    x.data = opaque(x.data);
    return x;
  }

  // The same for a head of which only one block is read.
  __device__ __forceinline__ Source from_once(Tensor4 t, int64_t batch, int64_t head, int64_t token) const {
    t.token = opaque(t.token);
    return from(t, batch, head, token);
  }

  // Starts copying tokens first .. first + N - 1, zeros for those that are not in `any` (All: all are).
  template <bool All>
  __device__ __forceinline__ void start(Shared<T, W> to, const Source& from, uint32_t first, uint64_t any) const {
    const char* token = from.data + first * uint64_t(from.token);
    if constexpr (COLUMN) {
      const bool there = first_chunk() < chunks_;
      any >>= first_row();
#pragma unroll
      for (int i = 0; i < N; i += ROWS) {
        if (N % ROWS && first_row() + i >= N) break;
        copy_async(to.base + to_ + i * Shared<T, W>::ROW_BYTES, token, there && (All || any >> i & 1));
        token += ROWS * from.token;
      }
    } else {
      int row = first_row(), chunk = first_chunk();
#pragma unroll 1  // unrolled, the addresses of all pieces would occupy registers
      for (int at = threadIdx.x; at < N * CHUNKS; at += THREADS) {
        copy_async(to.chunk(row, chunk), token + row * from.token + chunk * 16,
                   chunk < chunks_ && (All || any >> row & 1));
        row += ROWS, chunk += THREADS % CHUNKS;
        if (chunk >= CHUNKS) chunk -= CHUNKS, ++row;
      }
    }
  }

 private:
  static constexpr int CHUNKS = Shared<T, W>::CHUNKS, ROWS = THREADS / CHUNKS;
  static constexpr bool COLUMN = THREADS % CHUNKS == 0 && ROWS % 8 == 0;  // the permutation repeats after 8 rows
  static __device__ __forceinline__ int first_row() { return threadIdx.x / CHUNKS; }
  static __device__ __forceinline__ int first_chunk() { return threadIdx.x % CHUNKS; }
  int chunks_;
  uint32_t to_;
};

// Starts copying q of N lanes from lane `first` on into a tile, zeros where there is none and after D.
template <class T, int W, int N, int THREADS>
__device__ __forceinline__ void copy_queries(const Args& a, Shared<T, W> to, int first, int kv) {
  constexpr int CHUNKS = Shared<T, W>::CHUNKS;
#pragma unroll 1
  for (int at = threadIdx.x; at < N * CHUNKS; at += THREADS) {
    const int row = at / CHUNKS, chunk = at % CHUNKS, lane = first + row;
    const Slot slot = a.slot_table[lane / a.group];
    const Source token = source<T>(a.call.p.q, slot.batch, kv * a.group + lane % a.group, slot.token);
    copy_async(to.chunk(row, chunk), token.data + chunk * 16, slot.row >= 0 && chunk < a.chunks);
  }
}

// Copies q and dout of N lanes into two tiles, zeros where their state says so and after D.
template <class T, int W, int N, int THREADS>
class LaneCopy {
 public:
  __device__ __forceinline__ explicit LaneCopy(const Args& a)
      : q_(static_cast<const char*>(a.call.p.q.data)),
        dout_(static_cast<const char*>(a.call.p.dout.data)),
        chunks_(a.chunks),
        to_(COLUMN ? opaque(Shared<T, W>{0}.chunk(first_lane(), first_chunk())) : 0) {
    if (COLUMN) q_ += first_chunk() * 16, dout_ += first_chunk() * 16;
    q_ = opaque(q_), dout_ = opaque(dout_);
  }

  // Lanes of other rows than `row` are filled with zeros; row < 0: none are.
  __device__ __forceinline__ void start(Shared<T, W> q, Shared<T, W> dout, const LaneState* state, int row) const {
    if constexpr (COLUMN) {
      constexpr int COUNT = N / ROWS;
      static_assert(N % ROWS == 0);
      uint4 from[COUNT];  // q, dout, bytes, row
#pragma unroll
      for (int i = 0; i < COUNT; ++i) from[i] = reinterpret_cast<const uint4*>(state + first_lane() + i * ROWS)[1];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const bool valid = from[i].z && first_chunk() < chunks_ && (row < 0 || int(from[i].w) == row);
        const uint32_t to = to_ + i * ROWS * Shared<T, W>::ROW_BYTES;
        copy_async(q.base + to, q_ + uint64_t(from[i].x) * 16, valid);
        copy_async(dout.base + to, dout_ + uint64_t(from[i].y) * 16, valid);
      }
    } else {
#pragma unroll 1
      for (int at = threadIdx.x; at < N * CHUNKS; at += THREADS) {
        const int lane = at / CHUNKS, chunk = at % CHUNKS;
        const LaneState& from = state[lane];
        const bool valid = from.bytes && chunk < chunks_ && (row < 0 || from.row == row);
        copy_async(q.chunk(lane, chunk), q_ + uint64_t(from.q + chunk) * 16, valid);
        copy_async(dout.chunk(lane, chunk), dout_ + uint64_t(from.dout + chunk) * 16, valid);
      }
    }
  }

 private:
  static constexpr int CHUNKS = Shared<T, W>::CHUNKS, ROWS = THREADS / CHUNKS;
  static constexpr bool COLUMN = THREADS % CHUNKS == 0 && ROWS % 8 == 0 && N * CHUNKS % THREADS == 0;
  static __device__ __forceinline__ int first_lane() { return threadIdx.x / CHUNKS; }
  static __device__ __forceinline__ int first_chunk() { return threadIdx.x % CHUNKS; }
  const char *q_, *dout_;
  int chunks_;
  uint32_t to_;
};

}  // namespace ctk::cuda
