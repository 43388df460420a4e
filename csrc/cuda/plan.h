// Which kernels a call launches, on what: the forward and the backward pass as a list of launches. Host C++17 without
// CUDA or torch headers. Sizes of grids and of the workspace follow from shapes alone: no synchronisation, nothing that
// depends on data, so that a call can be captured in a CUDA graph.
//
//     Call call = ...;                                           // args.h; pointers to device memory
//     int64_t bytes = plan_forward(call, device, nullptr).workspace_bytes;
//     Plan plan = plan_forward(call, device, workspace);         // `workspace`: `bytes` bytes, 256-byte aligned
//     for (const Launch& l : plan.launches)                      // in order, on one stream
//       launch kernel(l.name) on l.grid, l.block threads, l.shared bytes, with one argument, plan.args by value
//
// `kernels.h` finds a kernel by its name in a build; kernels that use more than 48 KiB need the attribute for it.
//
// The tables of setup.cuh depend on the rows, the mask and the sizes, not on what q, k, v and the prefix hold. Calls
// that agree in those can share them, a set for forward and one for backward:
//
//     Plan tables = plan_tables(call, device, memory, backward);  // run once; `memory` as `workspace` above
//     Plan plan = plan_forward(call, device, workspace, memory);  // launches no set-up
//
// What the caller prepares:
//   - Call.p: B, H, Hk, D, Dv, G, P; rule; q, k, v, prefix_k, prefix_v (any strides with a contiguous last dimension;
//   the
//     prefix in any of the three types); bias fp32 with its strides; alibi fp32 [H]; scale, softcap, causal, window,
//     window_prefix.
//   - forward: out in q's type, lse fp32 with token stride 1. Tokens of no row get 0 and -inf.
//   - backward: out, lse, dout, dlse (fp32, optional), and the gradients that are wanted, others null: dq, dk, dv in
//     q's type; dprefix_k, dprefix_v contiguous [G, Hk, P, D | Dv] in fp32 or q's type; dbias fp32 [G or 1, H or 1, P]
//     with dbias_prefix, dbias_head = 0 where it is shared. All are written whole.
//   - If there are no queries, `launches` is empty: out and all gradients are 0, lse is -inf.
#pragma once
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "shapes.h"

namespace ctk::cuda {

struct Device {
  int multiprocessors = 108;
};

struct Launch {
  char name[48];
  uint32_t grid[3];
  uint32_t block;
  uint32_t shared;  // dynamic shared memory in bytes
};

struct Plan {
  std::vector<Launch> launches;
  Args args;
  int64_t workspace_bytes = 0;
};

namespace detail {

// a range must be long enough to be worth its partial results, 8 bytes per lane and dimension
constexpr int BLOCKS_PER_SPLIT = 4, TILES_PER_SPLIT = 8, MAX_SPLITS = 32;
constexpr int MOST_FILLERS = 16;
constexpr int GRID_LIMIT = 65535;  // of the second and third dimension

inline const char* name_of(Type t) { return t == Type::bf16 ? "bf16" : t == Type::f16 ? "fp16" : "fp32"; }

// Pieces of the workspace; null pointers while there is none.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += div_up(count * int64_t(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

class Planner {
 public:
  Planner(const Call& call, const Device& device, void* workspace, void* tables, bool backward)
      : arena_(workspace), device_(device), tables_(tables), backward_(backward), a_(plan_.args) {
    a_ = Args{};
    a_.call = call;
    const Params& p = call.p;
    bytes_ = int(size_of(p.q.type));
    width_ = width_of(widest());
    if (!width_ || p.q.type == Type::f64)
      throw std::invalid_argument("D and Dv must be at most 512, and rows no wider than fp32");
    a_.group = int32_t(p.H / p.Hk);
    a_.runs = int32_t(p.G > 1 ? p.G : 1);
    const int64_t context = p.rule.length < p.P + call.T ? p.rule.length : p.P + call.T;
    const bool ruled = p.rule.drop_below || call.hidden.data || call.keep;
    a_.own_context = ruled && context > p.P;
    a_.tile_lanes = backward ? query_shape(bytes_, width_).lanes : forward_shape(bytes_, width_, general()).lanes;
    const int64_t most = call.packed ? call.S : p.B * call.S, unit = slot_unit(a_.group);
    a_.slots = int32_t(a_.runs == 1 ? div_up(most, unit) * unit : run_start<int64_t>(most, a_.runs, unit));
    a_.lanes = a_.slots * a_.group;
    a_.tiles = a_.lanes / a_.tile_lanes;
    a_.prefix_blocks = int32_t(p.G ? div_up(p.P, BLOCK) : 0);
    a_.words = int32_t(div_up(a_.own_context ? context : p.P, BLOCK));
    a_.own_blocks = int32_t(call.packed ? call.T / BLOCK + p.B : p.B * div_up(call.T, BLOCK));
    a_.scale = float(p.scale);
    a_.factor = float(p.softcap > 0 ? p.scale / p.softcap : p.scale * LOG2E);
    a_.cap = float(p.softcap * LOG2E);
    empty_ = most == 0 || p.B == 0;
  }

  // The tables alone, in the workspace.
  Plan tables() {
    if (empty_) return finish();
    take_tables(arena_);
    launch_tables();
    return finish();
  }

  Plan forward() {
    if (empty_) return finish();
    Params& p = a_.call.p;
    set_up();
    a_.wide_out = wide(p.out, p.Dv);
    const ForwardShape shape = forward_shape(bytes_, width_, general());
    split_keys(p.Dv);
    if (a_.key_splits > 1) {
      const int64_t count = a_.key_splits * p.Hk * a_.lanes;
      a_.part_max = arena_.take<float>(count), a_.part_sum = arena_.take<float>(count);
    }
    launch_tiles("forward", a_.tiles, p.Dv, a_.key_splits, shape.threads(), forward_shared(bytes_, width_, general()));
    if (a_.key_splits > 1) launch_typed("merge_out", div_up(a_.lanes, MERGE_LANES), LANE_THREADS);
    else if (fillers()) launch_typed("fill_out", fillers(), LANE_THREADS);
    return finish();
  }

  Plan backward() {
    if (empty_) return finish();
    Params& p = a_.call.p;
    set_up();
    const int64_t batches = a_.call.packed ? 1 : p.B;
    for (const Tensor4& t : {p.dprefix_k, p.dprefix_v})
      if (t.data && t.type != Type::f32 && t.type != p.q.type)
        throw std::invalid_argument("gradients of the prefix must be fp32 or of the rows' type");
    pack(&p.dout, batches, p.H, a_.call.S, p.Dv, read(p.Dv)), pack(&p.out, batches, p.H, a_.call.S, p.Dv, p.Dv);
    launch_packs();
    if (extent(p.q, batches, p.H, a_.call.S, p.D) >= int64_t(16) << 32 ||
        extent(p.dout, batches, p.H, a_.call.S, p.Dv) >= int64_t(16) << 32)
      throw std::invalid_argument("q and dout must span less than 64 GiB each");
    a_.wide_dq = wide(p.dq, p.D), a_.wide_dk = wide(p.dk, p.D), a_.wide_dv = wide(p.dv, p.Dv);
    a_.wide_dprefix_k = wide(p.dprefix_k, p.D), a_.wide_dprefix_v = wide(p.dprefix_v, p.Dv);
    a_.state = arena_.take<LaneState>(p.Hk * a_.lanes);
    launch_typed("delta", div_up(a_.lanes, DELTA_LANES), LANE_THREADS);
    if (p.dq.data) {
      split_keys(p.D);
      const QueryShape shape = query_shape(bytes_, width_);
      launch_tiles("query", a_.tiles, p.D, a_.key_splits, shape.threads(), query_shared(bytes_, width_));
    }
    launch_keys();
    if (const int64_t blocks = sum_blocks(a_).total()) launch_common("sum_parts", blocks, 1, 1, LANE_THREADS);
    return finish();
  }

 private:
  // Plain kernels know spans, patterns, dropout, ragged rows, causality; whatever else is general.
  bool general() const {
    const Params& p = a_.call.p;
    const bool plain = p.softcap == 0 && !p.bias && !p.dbias && !p.alibi && p.window == 0 && p.scale > 0 &&
                       !a_.own_context && bytes_ == 2 && (width_ == 64 || width_ == 128);
    return !plain;
  }

  int64_t widest() const { return a_.call.p.D > a_.call.p.Dv ? a_.call.p.D : a_.call.p.Dv; }

  // Numbers of a token with `columns` that the kernels read. Up to 256, where D and Dv differ, the narrower tokens
  // count as zeros from there on, so that products do not change.
  int64_t read(int64_t columns) const { return width_ == SLICED ? columns : widest(); }

  int64_t chunks(int64_t columns) const { return div_up(columns * bytes_, 16); }

  // Whether tokens of so many columns can be read and written 16 bytes at a time.
  bool wide(const Tensor4& t, int64_t columns) const {
    const int64_t bytes = size_of(t.type);
    return t.data && uint64_t(t.data) % 16 == 0 && (columns * bytes) % 16 == 0 && (t.batch * bytes) % 16 == 0 &&
           (t.head * bytes) % 16 == 0 && (t.token * bytes) % 16 == 0;
  }

  // Bytes from the first number to the end of the last.
  int64_t extent(const Tensor4& t, int64_t batches, int64_t heads, int64_t tokens, int64_t columns) const {
    return ((batches - 1) * t.batch + (heads - 1) * t.head + (tokens - 1) * t.token + columns) * bytes_;
  }

  // The kernels read 16 bytes at a time, `read` numbers of a token; a tensor that does not allow it, or is of another
  // type, is copied once.
  void pack(Tensor4* t, int64_t batches, int64_t heads, int64_t tokens, int64_t columns, int64_t read) {
    if (batches <= 1) t->batch = 0;  // the stride of a dimension of size one may be anything
    if (heads <= 1) t->head = 0;
    if (tokens <= 1) t->token = 0;
    const Type type = a_.call.p.q.type;
    const bool direct = t->type == type && wide(*t, columns) && chunks(columns) == chunks(read);
    if (!batches || !heads || !tokens || direct) return;
    const int64_t stride = chunks(read) * 16 / bytes_, elements = batches * heads * tokens * stride;
    void* to = arena_.take<char>(elements * bytes_);
    a_.packs[packs_++] = {*t, to, heads, tokens, elements, int32_t(stride), wide(*t, columns), int16_t(columns)};
    if (elements > pack_elements_) pack_elements_ = elements;
    *t = {to, type, heads * tokens * stride, tokens * stride, stride};
  }

  void take_tables(Arena& arena) {
    const Params& p = a_.call.p;
    a_.rows = arena.take<RowInfo>(p.B);
    a_.run_first = arena.take<int32_t>(a_.runs + 1);
    a_.run_end = arena.take<int32_t>(a_.runs);
    a_.slot_table = arena.take<Slot>(a_.slots);
    a_.own_table = arena.take<OwnBlock>(a_.own_blocks);
    a_.bits = arena.take<uint64_t>(p.B * a_.words);
    a_.tile_table = arena.take<TileInfo>(a_.tiles);
    a_.seen = arena.take<Seen>(int64_t(a_.tiles) * a_.prefix_blocks);
  }

  void launch_tables() {
    const Params& p = a_.call.p;
    // a warp per row, per prefix, and per two words of the mask
    const int64_t jobs = p.B + a_.runs + div_up(p.B * a_.words, 2), blocks = a_.prefix_blocks ? a_.prefix_blocks : 1;
    launch_common("setup_rows", div_up(jobs, SETUP_WARPS), 1, 1, SETUP_THREADS);
    launch_common("setup_tiles", a_.tiles, div_up(blocks, SETUP_THREADS), 1, SETUP_THREADS);
  }

  // The tables, and inputs in the form that the kernels read.
  void set_up() {
    const Call& call = a_.call;
    Params& p = a_.call.p;
    if (tables_) {
      Arena made(tables_);
      take_tables(made);
    } else {
      take_tables(arena_);
      launch_tables();
    }
    const int64_t batches = call.packed ? 1 : p.B;
    pack(&p.q, batches, p.H, call.S, p.D, read(p.D));
    pack(&p.k, batches, p.Hk, call.T, p.D, read(p.D)), pack(&p.v, batches, p.Hk, call.T, p.Dv, read(p.Dv));
    pack(&p.prefix_k, p.G, p.Hk, p.P, p.D, read(p.D)), pack(&p.prefix_v, p.G, p.Hk, p.P, p.Dv, read(p.Dv));
    a_.chunks = int32_t(chunks(read(p.D))), a_.value_chunks = int32_t(chunks(p.Dv));
    if (!backward_) launch_packs();
  }

  void launch_packs() {
    if (!packs_) return;
    launch_common("pack", div_up(pack_elements_, PACK_THREADS * 16 / bytes_), packs_, 1, PACK_THREADS);
  }

  // As many ranges as run at once, two blocks per multiprocessor. More would take turns and cost more partial results.
  int64_t split_count(int64_t programs, int64_t pieces, int64_t least) const {
    const int64_t wanted = 2 * device_.multiprocessors / (programs > 1 ? programs : 1);
    int64_t splits = pieces / least < wanted ? pieces / least : wanted;
    if (splits > MAX_SPLITS) splits = MAX_SPLITS;
    return splits > 1 ? splits : 1;
  }

  // Tiles that hold lanes; the others pad the rows of each prefix.
  int64_t used_tiles() const {
    const Params& p = a_.call.p;
    const int64_t most = (a_.call.packed ? a_.call.S : p.B * a_.call.S) * a_.group;
    const int64_t used = div_up(most, a_.tile_lanes) + (a_.runs < p.B ? a_.runs : p.B);
    return used < a_.tiles ? used : a_.tiles;
  }

  // Programs for tokens that may belong to no row.
  int64_t fillers() const {
    const Call& call = a_.call;
    if (call.packed) return 1;
    return !call.seq_lens.data ? 0 : call.p.B < MOST_FILLERS ? call.p.B : MOST_FILLERS;
  }

  // Programs of a block of lanes or keys, for results of so many columns: one for each slice.
  int64_t slices(int64_t columns) const { return width_ == SLICED ? slices_of(columns, bytes_) : 1; }

  // Ranges of keys, each with partial results of so many columns.
  void split_keys(int64_t columns) {
    const Params& p = a_.call.p;
    const int64_t own = a_.call.packed ? 0 : a_.call.T / BLOCK;  // a tile walks at least these many own blocks
    a_.key_splits =
        int32_t(split_count(used_tiles() * p.Hk * slices(columns), a_.prefix_blocks + own, BLOCKS_PER_SPLIT));
    if (a_.key_splits == 1) return;
    a_.part = arena_.take<float>(a_.key_splits * p.Hk * a_.lanes * columns);
  }

  // Gradients of keys: programs of prefix keys first, then those of own keys.
  void launch_keys() {
    Params& p = a_.call.p;
    const bool prefix = (p.dprefix_k.data || p.dprefix_v.data || p.dbias) && a_.prefix_blocks;
    const bool own = (p.dk.data || p.dv.data) && a_.own_blocks;
    if (!prefix && !own) return;
    const KeyShape shape = key_shape(bytes_, width_);
    const int64_t per_block = BLOCK / shape.keys;
    if (prefix) {
      const int64_t programs = a_.prefix_blocks * per_block * p.G;
      a_.tile_splits = int32_t(split_count(programs * p.Hk * slices(widest()), a_.tiles / a_.runs, TILES_PER_SPLIT));
      a_.prefix_programs = int32_t(programs * a_.tile_splits);
      const int64_t count = a_.tile_splits * p.G * p.Hk * p.P;
      if (a_.tile_splits > 1 && p.dprefix_k.data) a_.part_dk = arena_.take<float>(count * p.D);
      if (a_.tile_splits > 1 && p.dprefix_v.data) a_.part_dv = arena_.take<float>(count * p.Dv);
      if (p.dbias) a_.part_dbias = arena_.take<float>(a_.tile_splits * p.G * p.H * p.P);
    }
    const int64_t programs = a_.prefix_programs + (own ? a_.own_blocks * per_block : 0);
    const int shared = key_shared(bytes_, width_) + (p.dbias ? key_bias_shared(bytes_, width_, a_.group) : 0);
    if (shared > SHARED_LIMIT)
      throw std::invalid_argument("prefix_bias cannot have a gradient with so many query heads per KV head (H / Hk)");
    const bool k = p.dk.data || p.dprefix_k.data || p.dbias, v = p.dv.data || p.dprefix_v.data;
    if (!keys_apart(width_)) launch_tiles("keys", programs, p.D, 1, shape.threads(), shared);
    if (keys_apart(width_) && k) launch_tiles("keys_dk", programs, p.D, 1, shape.threads(), shared);
    if (keys_apart(width_) && v) launch_tiles("keys_dv", programs, p.Dv, 1, shape.threads(), shared);
  }

  void add(const char* name, int64_t x, int64_t y, int64_t z, int64_t threads, int64_t shared) {
    if (y > GRID_LIMIT || z > GRID_LIMIT) throw std::invalid_argument("more KV heads or prefixes than a grid takes");
    Launch l{};
    std::snprintf(l.name, sizeof l.name, "%s", name);
    l.grid[0] = uint32_t(x), l.grid[1] = uint32_t(y), l.grid[2] = uint32_t(z);
    l.block = uint32_t(threads), l.shared = uint32_t(shared);
    plan_.launches.push_back(l);
  }

  // A kernel that exists once.
  void launch_common(const char* kernel, int64_t x, int64_t y, int64_t z, int64_t threads) {
    char name[48];
    std::snprintf(name, sizeof name, "ctk_%s", kernel);
    add(name, x, y, z, threads, 0);
  }

  // A kernel that exists once per type of the rows.
  void launch_typed(const char* kernel, int64_t x, int64_t threads) {
    char name[48];
    std::snprintf(name, sizeof name, "ctk_%s_%s", kernel, name_of(a_.call.p.q.type));
    add(name, x, a_.call.p.Hk, 1, threads, 0);
  }

  // A kernel that exists once per type, width and variant, for results of so many columns.
  void launch_tiles(const char* kernel, int64_t x, int64_t columns, int64_t z, int64_t threads, int64_t shared) {
    char name[48];
    std::snprintf(name, sizeof name, "ctk_%s_%s_%d_%s", kernel, name_of(a_.call.p.q.type), width_,
                  general() ? "general" : "plain");
    add(name, x, a_.call.p.Hk * slices(columns), z, threads, shared);
  }

  Plan finish() {
    plan_.workspace_bytes = arena_.used();
    return plan_;
  }

  Plan plan_;
  Arena arena_;
  Device device_;
  void* tables_;
  bool backward_, empty_ = false;
  Args& a_;
  int bytes_ = 2, width_ = 64, packs_ = 0;
  int64_t pack_elements_ = 0;
};

}  // namespace detail

// tables: made by plan_tables for a call of the same rows, mask and sizes; null: this pass makes its own.
inline Plan plan_forward(const Call& call, const Device& device, void* workspace, void* tables = nullptr) {
  return detail::Planner(call, device, workspace, tables, false).forward();
}

inline Plan plan_backward(const Call& call, const Device& device, void* workspace, void* tables = nullptr) {
  return detail::Planner(call, device, workspace, tables, true).backward();
}

// Makes the tables of a pass in the workspace.
inline Plan plan_tables(const Call& call, const Device& device, void* workspace, bool backward) {
  return detail::Planner(call, device, workspace, nullptr, backward).tables();
}

}  // namespace ctk::cuda
