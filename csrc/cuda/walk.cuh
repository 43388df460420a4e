// The keys that a tile of lanes walks, and which lane sees which of them.
//
// Visibility is a word per lane and block of keys, bit n for key n of the block: spans, patterns, dropped tokens, the
// prefix's length, causality and windows all meet there. A block that no lane sees is skipped, one that all lanes see
// whole needs no mask at all; both follow from the tables, before anything of the block is loaded. Own keys belong to
// one row: they are walked row by row, in blocks that start at the row's first key, so that the order in which a lane's
// sums are taken does not depend on its neighbours.
#pragma once
#include "setup.cuh"
#include "shapes.h"
#include "shared.cuh"

namespace ctk::cuda {

constexpr float LOG2E = 1.4426950408889634f;

// N keys. row < 0: of the prefix, else of that row's own.
struct Step {
  int row = -1, start = 0;
  uint64_t any = 0;   // keys that some lane sees; others are not read
  bool full = false;  // all lanes see all N
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
  return {bias, p.alibi ? static_cast<const float*>(p.alibi)[head] * LOG2E : 0.0f};
}

// Own keys start .. start + 63 of a row that are valid and that its context rule leaves visible.
__device__ __forceinline__ uint64_t own_bits(const Args& a, const RowInfo& row, int start) {
  uint64_t bits = low_bits(row.keys - start);
  if (a.own_context) {  // context positions, of which the words may start anywhere
    const int64_t position = a.call.p.P + start, word = position / BLOCK;
    const int shift = int(position % BLOCK);
    const uint64_t* words = a.bits + int64_t(row.index) * a.words;
    const uint64_t low = word < a.words ? words[word] : ~0ull, high = word + 1 < a.words ? words[word + 1] : ~0ull;
    bits &= low >> shift | (shift ? high << (64 - shift) : 0);
  }
  return bits;
}

// What one lane sees of the N keys of a step.
template <int N, bool General>
__device__ __forceinline__ uint64_t lane_word(const Args& a, const Step& step, const LaneInfo& lane, int prefix_len) {
  const Params& p = a.call.p;
  if (lane.row < 0) return 0;
  uint64_t bits;
  int position = lane.position;  // on the axis of the step's keys
  if (step.row < 0) {
    bits = a.bits[int64_t(lane.index) * a.words + step.start / BLOCK] >> (step.start % BLOCK);
    bits &= low_bits(min(prefix_len - step.start, N));
    position += prefix_len;
  } else {
    bits = lane.row == step.row ? step.any : 0;
    if (p.causal) bits &= low_bits(position + 1 - step.start);
  }
  if (General && p.window > 0 && (step.row >= 0 || p.window_prefix))
    bits &= ~low_bits(clamp(position - p.window + 1 - step.start, 0, 64));
  return bits;
}

// The steps of N keys of a tile, or the part of them that is this split's.
template <int N>
class Walk {
 public:
  __device__ Walk(const Args& a, const TileInfo& tile, int index, int split) : a_(a), split_(split), tile_(tile) {
    lane_ = index * a.tile_lanes;
    seen_ = a.seen + int64_t(index) * a.prefix_blocks;
    const int share = (a.prefix_blocks + a.key_splits - 1) / a.key_splits * BLOCK;
    key_ = split * share;
    key_end_ = min(key_ + share, tile.prefix_len);
    row_ = tile.row_begin - 1;
  }

  // False: there is no further step.
  __device__ bool next(Step* step) {
    while (key_ < key_end_) {
      const Seen seen = seen_[key_ / BLOCK];
      const uint64_t all = low_bits(N);
      *step = {-1, key_, seen.any >> (key_ % BLOCK) & all, (seen.all >> (key_ % BLOCK) & all) == all};
      key_ += seen.any ? N : BLOCK;  // N divides BLOCK, and a hidden word is met at its start
      if (step->any) return true;
    }
    for (;;) {
      while (own_ >= own_end_) {
        if (++row_ >= tile_.row_end) return false;
        enter_row();
      }
      const uint64_t any = own_bits(a_, info_, own_) & low_bits(min(own_end_ - own_, N));
      *step = {row_, own_, any, false};
      own_ += N;
      if (any && count_++ % a_.key_splits == split_) return true;
    }
  }

 private:
  // Own keys of a row that its lanes in this tile may see.
  __device__ void enter_row() {
    const Params& p = a_.call.p;
    info_ = a_.rows[row_];
    const int first = max(lane_ / a_.group - info_.first, 0);
    const int last = min((lane_ + tile_.lanes - 1) / a_.group - info_.first, info_.queries - 1);
    own_end_ = p.causal ? min(info_.keys, info_.offset + last + 1) : info_.keys;
    own_ = p.window > 0 ? clamp(info_.offset + first - p.window + 1, 0, info_.keys) / N * N : 0;
    if (first > last) own_end_ = own_;
  }

  const Args& a_;
  int split_, lane_;
  TileInfo tile_;
  const Seen* seen_;
  int key_, key_end_;
  int row_, own_ = 0, own_end_ = 0, count_ = 0;
  RowInfo info_;
};

// Tokens of one batch element and head, as `Step` and the copies below address them.
struct Source {
  const char* data;
  int64_t token;  // in bytes
};

template <class T>
__device__ __forceinline__ Source source(const Tensor4& t, int64_t batch, int64_t head, int64_t token) {
  return {static_cast<const char*>(t.data) + (batch * t.batch + head * t.head + token * t.token) * int64_t(sizeof(T)),
          t.token * int64_t(sizeof(T))};
}

// The keys of a step in `prefix` or, from its row's first token on, in `own`.
template <class T>
__device__ __forceinline__ Source source_of(const Args& a, const Step& step, const Tensor4& own, const Tensor4& prefix,
                                            int prefix_index, int kv) {
  if (step.row < 0) return source<T>(prefix, prefix_index, kv, step.start);
  const RowInfo& row = a.rows[step.row];
  return source<T>(own, row.batch, kv, row.token + step.start);
}

// Starts copying N tokens into a tile, zeros for those that nobody sees and in the columns behind D.
template <class T, int W, int N, int THREADS>
__device__ __forceinline__ void copy_keys(const Args& a, Shared<T, W> to, const Source& from, uint64_t any) {
  constexpr int CHUNKS = Shared<T, W>::CHUNKS;
#pragma unroll
  for (int i = 0; i < (N * CHUNKS + THREADS - 1) / THREADS; ++i) {
    const int at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
    if (N * CHUNKS % THREADS && row >= N) break;
    const bool valid = (any >> row & 1) && chunk < a.chunks;
    copy_async(to.chunk(row, chunk), from.data + (valid ? row * from.token + chunk * 16 : 0), valid);
  }
}

// The same for N lanes of q or dout from `first` on, where `use(i)` says which of them are wanted.
template <class T, int W, int N, int THREADS, class Use>
__device__ __forceinline__ void copy_lanes(const Args& a, Shared<T, W> to, const Tensor4& from, int first, int kv,
                                           const Use& use) {
  constexpr int CHUNKS = Shared<T, W>::CHUNKS;
#pragma unroll
  for (int i = 0; i < (N * CHUNKS + THREADS - 1) / THREADS; ++i) {
    const int at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
    if (N * CHUNKS % THREADS && row >= N) break;
    const int lane = first + row;
    const Slot slot = a.slot_table[lane / a.group];
    const bool valid = slot.row >= 0 && chunk < a.chunks && use(row, slot);
    const Source token = source<T>(from, slot.batch, kv * a.group + lane % a.group, slot.token);
    copy_async(to.chunk(row, chunk), valid ? token.data + chunk * 16 : static_cast<const char*>(from.data), valid);
  }
}

}  // namespace ctk::cuda
