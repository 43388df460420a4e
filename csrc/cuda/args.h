// What the CUDA kernels receive: one struct by value, the same for every kernel of a pass. Plain C++, for host and
// device.
//
// A lane is a query of one head (and not a thread of a warp). Queries and the heads of a KV group form one axis of
// lanes, head fastest: lane = slot * group + head. A slot is a valid query. Rows follow one another in the order of the
// prefix that they read, and the rows of each prefix start a new tile:
//
//     rows          | row 0    | row 1 | row 2            |
//     slots         0 1 2 3 4  5 6 7   8 9 ...
//     lanes (x 2)   |------- tile 0 -------|------- tile 1 ...
#pragma once
#include <cstdint>

#include "../params.h"

namespace ctk::cuda {

constexpr int BLOCK = 64;             // keys per word of the mask, and per entry of the tables
constexpr int MOST_TILE_LANES = 128;  // lanes of the largest tile; those of every shape divide it (shapes.h)

template <class A, class B>
CTK_HOST_DEVICE constexpr auto div_up(A a, B b) {
  return (a + b - 1) / b;
}

// The rows of each prefix start at a multiple of so many slots: its first lane starts a tile, however large tiles are.
CTK_HOST_DEVICE constexpr int slot_unit(int group) {
  const int even = group & -group;  // the largest power of two that divides the group
  return even < MOST_TILE_LANES ? MOST_TILE_LANES / even : 1;
}

// The first slot of a prefix's rows, if all earlier prefixes have `before` slots: a multiple of `unit`, and far enough
// on for them, however their slots are shared out. That of prefix `runs` bounds the number of slots.
template <class Int>
CTK_HOST_DEVICE constexpr Int run_start(Int before, Int prefix, Int unit) {
  return (before / unit + prefix) * unit;
}

// A contiguous vector of int32 or int64 (wide) on the device; null: absent.
struct Index {
  const void* data = nullptr;
  bool wide = false;
};

// One call of the op. Pointers are device pointers; nothing here depends on values that only the device knows.
struct Call {
  Params p;                        // p.rows is null and p.max_own unused: the set-up kernels find the rows
  int64_t S = 0, T = 0;            // tokens of q and of k, v in each batch element; both N for packed rows
  bool packed = false;             // rows lie one after another in batch element 0, at cu_seqlens [B+1]
  Index cu_seqlens;                // [B+1]
  Index seq_lens;                  // [B]
  Index prefix_index;              // [B]
  Index prefix_lens;               // [G]
  Index hidden;                    // [B, 2]
  Index row_ids;                   // [B]
  const uint8_t* keep = nullptr;   // [B, C] contiguous; null: everything kept
  const uint64_t* seed = nullptr;  // in the place of p.rule.seed: a captured graph reads it in every replay
  bool tf32 = false;               // fp32 products in TF32 instead of exactly
};

// A row, in the order of the lanes.
struct RowInfo {
  int32_t first;       // its first slot
  int32_t queries;     // valid queries
  int32_t batch;       // index into the batch dimension of q, k, v
  int32_t token;       // its first token there
  int32_t keys;        // valid own keys
  int32_t offset;      // own position of query 0
  int32_t index;       // of the row in the call
  int32_t prefix_len;  // valid keys of the prefix that it reads
};

// A query. row < 0: nothing there.
struct Slot {
  int32_t row;    // index into the rows
  int32_t batch;  // where its token lies in q
  int32_t token;
  int32_t position;  // own position, from which causality counts
};

// A tile of lanes; lanes = 0: nothing to do.
struct TileInfo {
  int32_t lanes;
  int32_t row_begin, row_end;
  int32_t prefix, prefix_len;
};

// Which of BLOCK prefix keys some lane of a tile sees, and which all of its lanes see.
struct Seen {
  uint64_t any, all;
};

// BLOCK own keys of a row, from key `start` on; row < 0: nothing there.
struct OwnBlock {
  int32_t row, start;
};

// What the backward pass needs of a lane. A lane that saw no key has high = +inf and bytes = 0: then p = 0, and zeros
// are read.
struct alignas(16) LaneState {
  float high, delta;  // lse in units of log 2 as high + low; <out, dout> - dlse
  float low;
  int32_t index;       // of the row in the call
  uint32_t q, dout;    // offsets of its q and dout from the tensors' data, in units of 16 bytes
  int32_t bytes;       // to read of each 16: 16, or 0 for zeros
  int32_t row;         // index into the rows; < 0: nothing there
  int32_t position;    // own position of the query
  int32_t prefix_len;  // of the prefix that the row reads
  int32_t unused[2];
};

// Copies a [batches, heads, tokens, columns] tensor into 16-byte aligned memory, converting fp32 to the rows' type.
struct Pack {
  Tensor4 from;
  void* to;
  int64_t heads, tokens, elements;  // elements: of the copy, batches * heads * tokens * stride
  int32_t stride;                   // of a token of the copy, columns rounded up or more; zeros after them
  bool wide;                        // tokens can be read 16 bytes at a time
  int16_t columns;
};
constexpr int MAX_PACKS = 7;

struct Args {
  Call call;
  int32_t group, slots, lanes, tiles, tile_lanes;
  int32_t runs;             // prefixes, at least 1
  int32_t words;            // of the mask per row
  int32_t prefix_blocks;    // ceil(P / BLOCK)
  int32_t own_blocks;       // entries of the own block table
  int32_t chunks;           // 16-byte pieces of a token that are read: of q and k; up to D = 256 also of v and dout
  int32_t key_splits;       // ranges of keys of the forward and dq kernels
  int32_t tile_splits;      // ranges of tiles of the prefix gradients
  int32_t prefix_programs;  // of the kernel of key gradients; programs of own keys follow
  bool own_context;         // the context reaches into own keys

  // rows of the results can be written 16 bytes at a time
  bool wide_out, wide_dq, wide_dk, wide_dv, wide_dprefix_k, wide_dprefix_v;

  // logits in units of log 2: product * factor, or tanh(product * factor) * cap
  float factor, cap, scale;

  // tables, in the workspace
  RowInfo* rows;         // [B]
  int32_t* run_first;    // [runs + 1] first slot of each prefix's rows
  int32_t* run_end;      // [runs] one past its last slot
  Slot* slot_table;      // [slots]
  OwnBlock* own_table;   // [own_blocks]
  uint64_t* bits;        // [B, words] visible context positions of row `index`; positions from P on are own keys
  TileInfo* tile_table;  // [tiles]
  Seen* seen;            // [tiles, prefix_blocks]

  // partial results, in the workspace; null where nothing is split
  float* part;        // [key_splits, Hk, lanes, Dv or D] of out or dq
  float* part_max;    // [key_splits, Hk, lanes] in units of log 2
  float* part_sum;    // [key_splits, Hk, lanes]
  float* part_dk;     // [tile_splits, G, Hk, P, D]
  float* part_dv;     // [tile_splits, G, Hk, P, Dv]
  float* part_dbias;  // [tile_splits, G, H, P]; never null if the bias gradient is wanted
  LaneState* state;   // [Hk, lanes]
  Pack packs[MAX_PACKS];
  int32_t value_chunks;  // 16-byte pieces of a token of v, out and dout that hold data
};

}  // namespace ctk::cuda
