// Tile sizes of the kernels by element size and padded head dimension: one table, read by the host and by the
// templates.
//
// Limits: 99 KiB of shared memory (sm_86, sm_89, sm_120), 255 registers per thread. A warp of the forward kernel has 32
// lanes where registers allow, so that a key fragment serves two products; 16 elsewhere.
#pragma once
#include "args.h"

namespace ctk::cuda {

// Padded head dimensions. Others use the next larger one, whose columns after D are zeros.
constexpr int WIDTHS[] = {64, 80, 96, 128, 256, 512};

// The last one has kernels of its own (slices.cuh). There a program keeps whole tokens of one side; those of the other
// side pass through two buffers in slices of so many bytes.
constexpr int SLICED = 512, SLICE_BYTES = 512;
static_assert(SLICED == MAX_HEAD_DIM);
CTK_HOST_DEVICE constexpr int slice_width(int element_bytes) { return SLICE_BYTES / element_bytes; }
CTK_HOST_DEVICE constexpr int slices_of(int64_t columns, int element_bytes) {
  return int(div_up(columns, int64_t(slice_width(element_bytes))));
}

CTK_HOST_DEVICE constexpr int width_of(int64_t D) {
  for (int width : WIDTHS)
    if (D <= width) return width;
  return 0;
}

// Bytes of shared memory in which a warp stages 16 rows of fp32 results.
CTK_HOST_DEVICE constexpr int staging_bytes(int width) { return 16 * (width * 4 + 16); }

CTK_HOST_DEVICE constexpr int at_least(int a, int b) { return a > b ? a : b; }

// Bytes of the tiles of a program that keeps `kept` tokens and has room for `passing` more. In the end its results are
// staged in the same memory.
CTK_HOST_DEVICE constexpr int tile_bytes(int element_bytes, int width, int kept, int passing, int warps) {
  const int tokens = (width == SLICED ? kept : kept + passing) * width * element_bytes;
  const int staged = warps * staging_bytes(width == SLICED ? slice_width(element_bytes) : width);
  return at_least(width == SLICED ? tokens + passing * SLICE_BYTES : tokens, staged);
}

// Per lane: what its threads look up for a block of keys that is not visible as a whole, and what the general kernels
// add to its logits (LaneInfo and LaneTerms in walk.cuh).
constexpr int LANE_INFO_BYTES = 16, LANE_TERMS_BYTES = 16;

// Blocks of the small kernels: their threads, and how many lanes they take. setup_rows has a warp per row, per prefix,
// and per two words of the mask; setup_tiles a thread per word of the prefix; pack a thread per 16 bytes; delta, the
// merge and the sum of dq take lanes, other sums a thread per number.
constexpr int SETUP_THREADS = 128, SETUP_WARPS = SETUP_THREADS / 32;
constexpr int PACK_THREADS = 256;
constexpr int LANE_THREADS = 128, DELTA_LANES = 16, MERGE_LANES = LANE_THREADS / 32;

// Blocks of sum_parts: those that sum up dq, dprefix_k, dprefix_v and dbias, in this order; 0 where nothing was cut.
struct SumBlocks {
  int64_t dq, dprefix_k, dprefix_v, dbias;
  CTK_HOST_DEVICE int64_t total() const { return dq + dprefix_k + dprefix_v + dbias; }
};

CTK_HOST_DEVICE SumBlocks sum_blocks(const Args& a) {
  const Params& p = a.call.p;
  const int64_t keys = p.G * p.Hk * p.P, biases = (p.dbias_head ? p.H : 1) * (p.dbias_prefix ? p.G : 1);
  return {p.dq.data && a.key_splits > 1 ? div_up(a.lanes, MERGE_LANES) * p.Hk : 0,
          a.part_dk ? div_up(keys * p.D, LANE_THREADS) : 0, a.part_dv ? div_up(keys * p.Dv, LANE_THREADS) : 0,
          a.part_dbias ? div_up(p.P, LANE_THREADS) * biases : 0};
}

struct ForwardShape {
  int lanes, warps, keys;
  CTK_HOST_DEVICE constexpr int lanes_per_warp() const { return lanes / warps; }
  CTK_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
};

// general: a kernel that knows every option. What it adds to the logits takes the registers of a second group of lanes.
CTK_HOST_DEVICE constexpr ForwardShape forward_shape(int element_bytes, int width, bool general) {
  if (element_bytes == 2) {
    const int keys = width <= 96 ? 64 : 32;
    return general || width > 128 ? ForwardShape{64, 4, keys} : ForwardShape{128, 4, keys};
  }
  if (width <= 96) return {64, 4, 64};
  return width <= 128 ? ForwardShape{64, 4, 32} : ForwardShape{32, 2, 32};
}

// Bytes of the tiles of q, k, v.
CTK_HOST_DEVICE constexpr int forward_tiles(int element_bytes, int width, bool general) {
  const ForwardShape s = forward_shape(element_bytes, width, general);
  return tile_bytes(element_bytes, width, s.lanes, 2 * s.keys, s.warps);
}

CTK_HOST_DEVICE constexpr int forward_shared(int element_bytes, int width, bool general) {
  return forward_tiles(element_bytes, width, general) +
         forward_shape(element_bytes, width, general).lanes * (LANE_INFO_BYTES + LANE_TERMS_BYTES);
}

struct QueryShape {
  int lanes, warps, keys, stages;
  CTK_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
};

CTK_HOST_DEVICE constexpr QueryShape query_shape(int element_bytes, int width) {
  if (element_bytes == 2) {
    if (width <= 96) return {64, 4, 64, 2};
    if (width == SLICED) return {32, 2, 32, 1};
    return width <= 128 ? QueryShape{64, 4, 64, 1} : QueryShape{64, 4, 32, 1};
  }
  if (width == SLICED) return {16, 1, 32, 1};
  if (width <= 96) return {64, 4, 32, 1};
  return width <= 128 ? QueryShape{64, 4, 32, 1} : QueryShape{32, 2, 16, 1};
}

// Bytes of the tiles of q, dout, k, v.
CTK_HOST_DEVICE constexpr int query_tiles(int element_bytes, int width) {
  const QueryShape s = query_shape(element_bytes, width);
  return tile_bytes(element_bytes, width, 2 * s.lanes, 2 * s.stages * s.keys, s.warps);
}

CTK_HOST_DEVICE constexpr int query_shared(int element_bytes, int width) {
  return query_tiles(element_bytes, width) +
         query_shape(element_bytes, width).lanes * (LANE_INFO_BYTES + LANE_TERMS_BYTES);
}

// Gradients of keys: a block of `keys` keys walks the tiles of the backward pass in steps of `lanes` lanes.
struct KeyShape {
  int keys, warps, lanes, stages;
  CTK_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
};

CTK_HOST_DEVICE constexpr KeyShape key_shape(int element_bytes, int width) {
  if (element_bytes == 2) {
    if (width <= 64) return {64, 4, 64, 2};
    if (width == SLICED) return {32, 2, 16, 1};
    return width <= 128 ? KeyShape{64, 4, 32, 2} : KeyShape{64, 4, 16, 1};
  }
  if (width <= 96) return {64, 4, 32, 1};
  return width <= 128 ? KeyShape{64, 4, 16, 1} : KeyShape{16, 1, 16, 1};
}

// From D = 256 on dk and dv together would not fit the registers: two launches, one for each.
constexpr bool keys_apart(int width) { return width > 128; }

// Per lane: states and words of the mask of this step and the next two.
constexpr int LANE_STAGE_BYTES = 3 * (int(sizeof(LaneState)) + 8);

// Bytes of the tiles of k, v, q, dout.
CTK_HOST_DEVICE constexpr int key_tiles(int element_bytes, int width) {
  const KeyShape s = key_shape(element_bytes, width);
  return tile_bytes(element_bytes, width, 2 * s.keys, 2 * s.stages * s.lanes, s.warps);
}

CTK_HOST_DEVICE constexpr int key_shared(int element_bytes, int width) {
  const KeyShape s = key_shape(element_bytes, width);
  return key_tiles(element_bytes, width) + s.lanes * LANE_STAGE_BYTES;
}

// The bias gradient also needs a tile of logit gradients, and a sum per key and head.
CTK_HOST_DEVICE constexpr int key_bias_shared(int element_bytes, int width, int group) {
  const KeyShape s = key_shape(element_bytes, width);
  return 4 * (s.lanes * (s.keys + 1) + group * s.keys);
}

// Shared memory of a block on the architecture that has the least. With a bias gradient it is enough for groups of up
// to 32 heads.
constexpr int SHARED_LIMIT = 99 * 1024;

constexpr bool shapes_fit(int element_bytes) {
  for (int width : WIDTHS)
    if (MOST_TILE_LANES % forward_shape(element_bytes, width, false).lanes ||
        MOST_TILE_LANES % forward_shape(element_bytes, width, true).lanes ||
        MOST_TILE_LANES % query_shape(element_bytes, width).lanes ||
        forward_shared(element_bytes, width, false) > SHARED_LIMIT ||
        forward_shared(element_bytes, width, true) > SHARED_LIMIT ||
        query_shared(element_bytes, width) > SHARED_LIMIT ||
        key_shared(element_bytes, width) + key_bias_shared(element_bytes, width, 32) > SHARED_LIMIT)
      return false;
  return true;
}
static_assert(shapes_fit(2) && shapes_fit(4));

}  // namespace ctk::cuda
