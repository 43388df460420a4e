// The tables that all kernels of a pass read, built on the device in two launches:
//
//   setup_rows    a warp per row: its place among the lanes, and its slots; its blocks of own keys
//                 a warp per prefix: which slots its rows have
//                 a warp per two words of the mask: 2 x 64 context positions of a row, visible or not
//   setup_tiles   a block per tile of lanes: its rows; a thread per block of prefix keys: what the tile sees of them
//
// `visible_positions` in csrc/mask.h states which context positions a row sees; here are its words.
//
// The place of a row follows from all rows before it. Each warp adds those up by itself, so that neither a scan nor an
// order of blocks is needed. Values that index memory are clamped, since the host does not read them.
#pragma once
#include "shapes.h"

namespace ctk::cuda {

constexpr uint32_t WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ int64_t read(const Index& x, int64_t i, int64_t otherwise) {
  if (!x.data) return otherwise;
  return x.wide ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
}

__device__ __forceinline__ int clamp(int64_t x, int64_t low, int64_t high) { return int(max(low, min(x, high))); }

struct RowSize {
  int queries, keys, batch, token, prefix;
};

__device__ inline RowSize size_of_row(const Args& a, int b) {
  const Call& call = a.call;
  RowSize row{};
  row.prefix = clamp(read(call.prefix_index, b, 0), 0, a.runs - 1);
  if (call.packed) {
    row.token = clamp(read(call.cu_seqlens, b, 0), 0, call.S);
    row.queries = row.keys = max(clamp(read(call.cu_seqlens, b + 1, 0), 0, call.S) - row.token, 0);
  } else {
    row.batch = b;
    row.keys = clamp(read(call.seq_lens, b, call.T), 0, call.T);
    row.queries = call.T > call.S ? int(call.S) : row.keys;
  }
  return row;
}

// There are fewer slots and blocks than this. Sums stop here: offsets of packed rows that do not ascend could add up to
// more.
constexpr int MOST = (1 << 30) - 1;

__device__ __forceinline__ int add(int a, int b) { return min(a + b, MOST); }

__device__ __forceinline__ int sum_over_warp(int x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = add(x, __shfl_xor_sync(WHOLE_WARP, x, step));
  return x;
}

__device__ inline void set_up_row(const Args& a, int b) {
  const Call& call = a.call;
  const int thread = threadIdx.x % 32, B = int(call.p.B);
  RowSize row = size_of_row(a, b);
  int before_prefix = 0, before = 0, rank = 0, own = 0;
  for (int other = thread; other < B; other += 32) {
    const RowSize x = size_of_row(a, other);
    const bool same = x.prefix == row.prefix;
    before_prefix = add(before_prefix, x.prefix < row.prefix ? x.queries : 0);
    before = add(before, same && other < b ? x.queries : 0);
    rank += x.prefix < row.prefix || (same && other < b);
    own = add(own, other < b ? div_up(x.keys, BLOCK) : 0);
  }
  before_prefix = sum_over_warp(before_prefix), before = sum_over_warp(before);
  rank = sum_over_warp(rank), own = sum_over_warp(own);

  const int run = min(run_start(before_prefix, row.prefix, slot_unit(a.group)), a.slots);
  const int first = min(run + before, a.slots);
  row.queries = min(row.queries, a.slots - first);
  const int offset = call.T > call.S && !call.packed ? row.keys - int(call.S) : 0;
  if (thread == 0) {
    const int prefix_len = call.p.G ? clamp(read(call.prefix_lens, row.prefix, call.p.P), 0, call.p.P) : 0;
    a.rows[rank] = {first, row.queries, row.batch, row.token, row.keys, offset, b, prefix_len};
  }
  for (int i = thread; i < row.queries; i += 32) a.slot_table[first + i] = {rank, row.batch, row.token + i, offset + i};

  // padded rows have all their blocks, so that gradients of padding are written, too
  const int per_row = int(div_up(call.T, BLOCK)), blocks = call.packed ? div_up(row.keys, BLOCK) : per_row;
  const int first_block = call.packed ? min(own, a.own_blocks) : b * per_row;
  for (int i = thread; i < blocks && first_block + i < a.own_blocks; i += 32)
    a.own_table[first_block + i] = {rank, i * BLOCK};
  if (b == B - 1)
    for (int i = first_block + blocks + thread; i < a.own_blocks; i += 32) a.own_table[i] = {-1, 0};
}

__device__ inline void set_up_run(const Args& a, int prefix) {
  const int thread = threadIdx.x % 32, unit = slot_unit(a.group);
  int before = 0, mine = 0;
  for (int b = thread; b < a.call.p.B; b += 32) {
    const RowSize row = size_of_row(a, b);
    before = add(before, row.prefix < prefix ? row.queries : 0);
    mine = add(mine, row.prefix == prefix ? row.queries : 0);
  }
  before = sum_over_warp(before), mine = sum_over_warp(mine);
  const int first = min(run_start(before, prefix, unit), a.slots), end = min(first + mine, a.slots);
  const int next = prefix + 1 < a.runs ? min(run_start(add(before, mine), prefix + 1, unit), a.slots) : a.slots;
  if (thread == 0) {
    a.run_first[prefix] = first, a.run_end[prefix] = end;
    if (prefix + 1 == a.runs) a.run_first[a.runs] = a.slots;
  }
  for (int slot = end + thread; slot < next; slot += 32) a.slot_table[slot] = {-1, 0, 0, 0};
}

__device__ inline void set_up_bits(const Args& a, int64_t pair) {
  const Call& call = a.call;
  const int thread = threadIdx.x % 32;
  const int64_t word = 2 * pair + thread / 16;
  const bool there = word < call.p.B * a.words;
  const int b = there ? int(word / a.words) : 0;
  const int at = 4 * (thread % 16);  // of four positions of the word
  ContextRule rule = call.p.rule;
  if (call.seed) rule.seed = *call.seed;
  ContextRow row;
  row.hidden_start = read(call.hidden, 2 * b, 0), row.hidden_end = read(call.hidden, 2 * b + 1, 0);
  row.keep = call.keep ? call.keep + b * rule.length : nullptr;
  row.id = uint32_t(read(call.row_ids, b, b));
  uint64_t bits = visible_positions<4>(rule, row, word % a.words * BLOCK + at) << at;
#pragma unroll
  for (int step = 8; step; step /= 2) bits |= __shfl_xor_sync(WHOLE_WARP, bits, step);
  if (there && thread % 16 == 0) a.bits[word] = bits;
}

__device__ __forceinline__ void setup_rows(const Args& a) {
  int64_t job = int64_t(blockIdx.x) * SETUP_WARPS + threadIdx.x / 32;
  if (job < a.call.p.B) return set_up_row(a, int(job));
  job -= a.call.p.B;
  if (job < a.runs) return set_up_run(a, int(job));
  job -= a.runs;
  if (2 * job < a.call.p.B * a.words) set_up_bits(a, job);
}

// Grid (tiles, blocks of SETUP_THREADS words of the prefix).
__device__ __forceinline__ void setup_tiles(const Args& a) {
  const int tile = blockIdx.x, word = blockIdx.y * SETUP_THREADS + threadIdx.x;
  const int lane = tile * a.tile_lanes, slot = lane / a.group;
  TileInfo info{};
  info.row_begin = a.slot_table[slot].row;
  if (info.row_begin >= 0) {
    // the prefix whose slots these are
    int low = 0, high = a.runs;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (a.run_first[middle] <= slot) low = middle;
      else high = middle;
    }
    info.prefix = low;
    info.lanes = min(a.tile_lanes, a.run_end[low] * a.group - lane);
    info.row_end = a.slot_table[(lane + info.lanes - 1) / a.group].row + 1;
    info.prefix_len = a.rows[info.row_begin].prefix_len;
  }
  if (word == 0) a.tile_table[tile] = info;
  if (word >= a.prefix_blocks) return;

  Seen seen{0, ~0ull};
  const Params& p = a.call.p;
  const bool near = p.window > 0 && p.window_prefix;
  for (int r = max(info.row_begin, 0); r < info.row_end; ++r) {
    const RowInfo row = a.rows[r];
    if (row.queries == 0) continue;  // it reads no key
    const uint64_t bits = a.bits[int64_t(row.index) * a.words + word] & low_bits(info.prefix_len - word * BLOCK);
    uint64_t any = bits, all = bits;
    if (near) {  // a query at own position i sees prefix keys from prefix_len + i - window + 1 on
      const int64_t reach = int64_t(info.prefix_len) + row.offset - p.window + 1 - int64_t(word) * BLOCK;
      const int first = max(slot, row.first),
                last = min((lane + info.lanes - 1) / a.group, row.first + row.queries - 1);
      any &= ~low_bits(clamp(reach + first - row.first, 0, 64));
      all &= ~low_bits(clamp(reach + last - row.first, 0, 64));
    }
    seen.any |= any, seen.all &= all;
  }
  if (info.lanes == 0) seen.all = 0;
  a.seen[int64_t(tile) * a.prefix_blocks + word] = seen;
}

}  // namespace ctk::cuda
