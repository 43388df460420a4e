// Backward pass. With p = 2^(s - lse), delta = <out, dout> - dlse, all blocks [keys][TILE]:
//
//   s  <- k q         dp <- v dout        ds <- p (dp - delta)        (times the softcap's slope)
//   dv <- dv + p dout     dk <- dk + ds q     dq <- dq + k^T ds     dbias <- dbias + sum over lanes of ds
//
// Every product is done once. A unit of work owns the gradients it accumulates, in registers and cache: either a chunk
// of prefix keys of one KV head, for which it walks all query tiles, or the own keys of one row. dq of a lane is the
// sum over its units; each unit of the prefix leaves its share in a bounded buffer, a second step adds the shares in
// order, and the unit of the row adds its own. Nothing depends on which worker runs what, so the bits do not depend on
// the number of workers. To bound the buffers, the work is cut into phases over KV heads and rows. A phase packs its
// query tiles once, for all chunks.
//
// Where a key has most of a lane's probability, dp - delta cancels there, and what is left is the rounding of `out` in
// delta. But over the keys of a lane, ds adds up to dlse (with sinks: ds_sum). So all units add up ds and p of a lane,
// and leave out pairs with p > HEAVY, at most four per lane. They are corrected, and added, in the end:
//
//   ds <- ds + p / sum of p (dlse - sum of ds)
//
// Products multiply what a lane does not see by 0, which a NaN or infinity survives. So a block with keys, queries or
// output gradients that are not finite is done carefully: their rows leave the product, and are added to what sees them
// one by one.

constexpr int64_t PHASE_BYTES = 8 << 20;  // bound on packed tiles and dq shares of a phase
constexpr int64_t ENOUGH_UNITS = 24;      // units per phase that balance a few dozen workers' load
constexpr double HEAVY = 0.25;            // below, dp - delta cancels by a third at most

// Sums over keys, for one lane.
template <typename C>
struct LaneSum {
  C ds, p;
};

// A pair that is left out at first.
template <typename C>
struct Heavy {
  int64_t lane, key;  // a lane of the head; a key of the prefix or of the row
  C ds, p, slope;     // slope: of the softcap

  // all: over all keys of the lane, of what ds lacks there, and of p.
  C corrected(const LaneSum<C>& all) const { return ds + p / all.p * all.ds; }
};

// What the units of the prefix leave of one head's lanes for those of the rows, and these for the last step.
template <typename C>
struct HeadLanes {
  int64_t lanes, chunk, chunks;
  LaneSum<C>* sums;                 // [chunks][lanes]
  C* dq;                            // [lanes][depth.padded], of prefix keys, without scale; null: not needed
  LaneSum<C>* all;                  // [lanes], what Heavy::corrected takes
  std::vector<Heavy<C>>* heavy;     // [G][chunks], in order
  std::vector<Heavy<C>> by_lane;    // all of them, in the order of lanes, then keys
  std::vector<int64_t> lane_start;  // [lanes + 1], into by_lane

  // Fills by_lane.
  void sort(int64_t lists) {
    lane_start.assign(lanes + 1, 0);
    for (int64_t i = 0; i < lists; ++i)
      for (const Heavy<C>& h : heavy[i]) ++lane_start[h.lane + 1];
    std::partial_sum(lane_start.begin(), lane_start.end(), lane_start.begin());
    by_lane.resize(lane_start.back());
    std::vector<int64_t> next(lane_start.begin(), lane_start.end() - 1);
    for (int64_t i = 0; i < lists; ++i)
      for (const Heavy<C>& h : heavy[i]) by_lane[next[h.lane]++] = h;
  }
};

// A tile of queries and the gradients of their outputs, as operands.
template <typename U>
struct BackwardTile {
  using C = C_of<U>;
  TileLanes<C> lanes;
  int64_t first;                           // lane of the head
  bool careful;                            // something of a lane is not finite
  std::vector<int> broken_q, broken_dout;  // lanes, in order
  U *q, *dout;                             // [depth.units | value_depth.units][TILE]
  U *q_rows, *dout_rows;     // [TILE / WIDTH][depth.padded | value_depth.padded], pairs of lanes; broken ones: 0
  alignas(64) C lse[TILE];   // base 2; +inf where the lane has no probabilities (padding, no visible key)
  alignas(64) C rest[TILE];  // what rounding to the compute type takes off lse in base 2
  alignas(64) C delta[TILE];

  void place(const Depth<U>& depth, const Depth<U>& value_depth, Arena* arena) {
    q = arena->take<U>(depth.units * TILE), dout = arena->take<U>(value_depth.units * TILE);
    q_rows = arena->take<U>(TILE / WIDTH<U> * depth.padded);
    dout_rows = arena->take<U>(TILE / WIDTH<U> * value_depth.padded);
  }
};

// What one worker needs: buffers for one block of keys and the gradients of one unit.
template <typename U>
class Backward {
 public:
  using C = C_of<U>;

  Backward(const Params& p, int64_t keys, Arena* arena)
      : p_(p), depth_(p.D), value_depth_(p.Dv), needs_ds_(needs_ds(p)) {
    const int64_t columns = WIDTH<U> > 1 ? units_of<U>(KEY_BLOCK) : 0, rows = WIDTH<U> > 1 ? KEY_BLOCK : 0;
    s_ = arena->take<C>(KEY_BLOCK * TILE);
    dp_ = arena->take<C>(KEY_BLOCK * TILE);
    hidden_ = arena->take<C>(KEY_BLOCK * TILE);
    slope_ = arena->take<C>(p.softcap ? KEY_BLOCK * TILE : 0);
    p_rows_ = arena->take<U>(rows * TILE / WIDTH<U>);
    ds_rows_ = arena->take<U>(rows * TILE / WIDTH<U>);
    ds_columns_ = arena->take<U>(columns * TILE);
    k_columns_ = arena->take<U>(columns * depth_.padded);
    const int64_t packed = FIXED_KEYS ? round_up(keys, KEY_BLOCK) : 0;
    packed_k_ = arena->take<Element<U>>(packed * depth_.elements());
    packed_v_ = arena->take<Element<U>>(packed * value_depth_.elements());
    turned_k_ = arena->take<Element<U>>(packed * depth_.padded);
    k_ = arena->take<U>(keys * units_of<U>(p.D));
    v_ = arena->take<U>(keys * units_of<U>(p.Dv));
    const int64_t gradients = FIXED_KEYS ? packed : keys;
    dk_ = arena->take<C>(gradients * depth_.padded);
    dv_ = arena->take<C>(gradients * value_depth_.padded);
    dq_ = arena->take<C>(depth_.padded * TILE);
    line_ = arena->take<C>(depth_.padded);
    rows_ = arena->take<C>(TILE * depth_.padded);
    lane_rows_ = arena->take<Element<U>>(TILE * std::max(depth_.elements(), value_depth_.elements()));
    tile_.place(depth_, value_depth_, arena);
  }

  // Whether any gradient but dv is needed. They share ds, and its sums over all keys.
  static bool needs_ds(const Params& p) { return p.dq.data || p.dk.data || p.dprefix_k.data || p.dbias; }

  // Brings the lanes of a tile into operand form.
  void pack(const RowOrder& order, const Tile& which, int64_t kv_head, BackwardTile<U>* tile) {
    TileLanes<C>& lanes = tile->lanes;
    lanes.set(p_, order, which, kv_head);
    tile->first = which.first;
    pack_rows(p_.q, depth_, kv_head, lanes, nullptr, tile->q, tile->q_rows, &tile->broken_q);
    std::fill_n(tile->lse, TILE, std::numeric_limits<C>::infinity());
    std::fill_n(tile->rest, TILE, C(0));
    std::fill_n(tile->delta, TILE, C(0));
    bool blind[TILE] = {};  // lanes that saw nothing: whatever dout holds must not reach a key
    lanes.each([&](int l, const Row& row) {
      const C lse = static_cast<const C*>(p_.lse.data)[lanes.offset(p_.lse, kv_head, p_, l, row)];
      blind[l] = lse == -std::numeric_limits<C>::infinity();
      if (blind[l]) return;
      tile->lse[l] = C(double(lse) * LOG2E);
      tile->rest[l] = C(double(lse) * LOG2E - double(tile->lse[l]));
      C delta = dot(lanes.offset(p_.out, kv_head, p_, l, row), lanes.offset(p_.dout, kv_head, p_, l, row));
      if (p_.dlse.data) delta -= static_cast<const C*>(p_.dlse.data)[lanes.offset(p_.dlse, kv_head, p_, l, row)];
      tile->delta[l] = delta;
    });
    pack_rows(p_.dout, value_depth_, kv_head, lanes, blind, tile->dout, tile->dout_rows, &tile->broken_dout);
    tile->careful = !tile->broken_q.empty() || !tile->broken_dout.empty() || !all_finite(tile->delta, lanes.count) ||
                    std::any_of(tile->lse, tile->lse + lanes.count, [](C lse) { return lse != lse; });
  }

  // Prefix keys [begin, end) of one head against tiles that read this prefix. Adds to dbias and dprefix_k, dprefix_v,
  // or, if they are `fresh`, writes the latter; the dq of tile i goes to shares + i * depth.padded * TILE,
  // [depth.padded][TILE], and the sums of a lane to sums.
  void prefix(const BackwardTile<U>* tiles, int64_t count, int64_t prefix, int64_t kv_head, int64_t begin, int64_t end,
              bool fresh, C* shares, LaneSum<C>* sums, std::vector<Heavy<C>>* heavy) {
    const int64_t k_at = prefix * p_.prefix_k.batch + kv_head * p_.prefix_k.head;
    const int64_t v_at = prefix * p_.prefix_v.batch + kv_head * p_.prefix_v.head;
    const KeyRows<U> k = key_rows(p_.prefix_k, k_at, begin, end, p_.D, p_.q.type, k_);
    const KeyRows<U> v = key_rows(p_.prefix_v, v_at, begin, end, p_.Dv, p_.q.type, v_);
    const Logits<C> logits(p_, kv_head);
    const bool broken = !finite_keys(k, v, begin, end);
    pack_keys(k, v, begin, end);
    clear(end - begin, p_.dprefix_k.data, p_.dprefix_v.data);
    for (int64_t i = 0; i < count; ++i) {
      C* dq = shares ? shares + i * depth_.padded * TILE : nullptr;
      if (dq) std::fill_n(dq, depth_.padded * TILE, C(0));
      clear_sums();
      for (int64_t at = begin; at < end; at += KEY_BLOCK)
        if (prefix_block(p_, tiles[i].lanes, at, std::min(at + KEY_BLOCK, end), FIXED_KEYS, &block_))
          step(logits, tiles[i], false, broken || tiles[i].careful, k, v, begin, p_.dprefix_k.data, p_.dprefix_v.data,
               dq, heavy);
      for (int l = 0; needs_ds_ && l < tiles[i].lanes.count; ++l) sums[tiles[i].first + l] = {ds_sums_[l], p_sums_[l]};
    }
    add_prefix(p_.dprefix_k, dk_, depth_, C(p_.scale), prefix, kv_head, begin, end, fresh);
    add_prefix(p_.dprefix_v, dv_, value_depth_, C(1), prefix, kv_head, begin, end, fresh);
  }

  // dq of a tile <- the prefix shares in the order of their slots, at dq + l * depth.padded for lane l.
  void add_shares(const BackwardTile<U>& tile, const C* shares, int64_t slots, int64_t slot_stride, C* dq) {
    std::fill_n(dq_, depth_.padded * TILE, C(0));
    for (int64_t slot = 0; slot < slots; ++slot) {
      const C* share = shares + slot * slot_stride;
      for (int64_t i = 0; i < depth_.padded * TILE; i += VECTOR_SIZE<C>)
        store(dq_ + i, load(dq_ + i) + load(share + i));
    }
    transpose(dq_, TILE, rows_, depth_.padded, depth_.padded, tile.lanes.vectors * VECTOR_SIZE<C>);
    std::copy_n(rows_, tile.lanes.count * depth_.padded, dq);
  }

  // The own keys of one row, whose lanes the tiles hold. Writes dk, dv of all its keys, and the dq of its lanes.
  void own(const RowOrder& order, const std::vector<Tile>& tiles, const Row& row, int64_t kv_head,
           const HeadLanes<C>& head) {
    const int64_t k_at = row.batch * p_.k.batch + kv_head * p_.k.head + row.token * p_.k.token;
    const int64_t v_at = row.batch * p_.v.batch + kv_head * p_.v.head + row.token * p_.v.token;
    const KeyRows<U> k = key_rows(p_.k, k_at, 0, row.keys, p_.D, p_.q.type, k_);
    const KeyRows<U> v = key_rows(p_.v, v_at, 0, row.keys, p_.Dv, p_.q.type, v_);
    const Logits<C> logits(p_, kv_head);
    const bool broken = !finite_keys(k, v, 0, row.keys);
    pack_keys(k, v, 0, row.keys);
    clear(row.keys, p_.dk.data, p_.dv.data);
    for (const Tile& which : tiles) {
      pack(order, which, kv_head, &tile_);
      if (p_.dq.data) std::fill_n(dq_, depth_.padded * TILE, C(0));
      clear_sums();
      heavy_.clear();
      for (int64_t at = 0; at < row.keys; at += KEY_BLOCK)
        if (own_block(p_, tile_.lanes, tile_.lanes.pieces[0], at, std::min(at + KEY_BLOCK, row.keys), FIXED_KEYS,
                      &block_))
          step(logits, tile_, true, broken || tile_.careful, k, v, 0, p_.dk.data, p_.dv.data,
               p_.dq.data ? dq_ : nullptr, &heavy_);
      if (p_.dq.data) transpose(dq_, TILE, rows_, depth_.padded, depth_.padded, tile_.lanes.vectors * VECTOR_SIZE<C>);
      if (needs_ds_) correct(row, kv_head, head);
      if (p_.dq.data) store_dq(kv_head, head);
    }
    store_own(p_.dk, row, kv_head, dk_, depth_, C(p_.scale));
    store_own(p_.dv, row, kv_head, dv_, value_depth_, C(1));
  }

  // Adds to dprefix_k and dbias the heavy pairs of prefix keys [begin, ..) that one unit has listed.
  void correct_prefix(const RowOrder& order, int64_t prefix, int64_t kv_head, const std::vector<Heavy<C>>& heavy,
                      const LaneSum<C>* all) {
    const int64_t group = p_.H / p_.Hk;
    for (const Heavy<C>& h : heavy) {
      const int64_t at = order.position_of(h.lane), in_row = h.lane - order.start[at];
      const int64_t q_head = kv_head * group + in_row % group;
      const C ds = h.corrected(all[h.lane]);
      if (p_.dbias) static_cast<C*>(p_.dbias)[prefix * p_.dbias_prefix + q_head * p_.dbias_head + h.key] += ds;
      if (!p_.dprefix_k.data) continue;
      const Row& row = p_.rows[order.row[at]];
      const Tensor4 &q = p_.q, &dk = p_.dprefix_k;
      load_row(line_, q, row.batch * q.batch + q_head * q.head + (row.token + in_row / group) * q.token, p_.D, q.type);
      C* to = static_cast<C*>(dk.data) + prefix * dk.batch + kv_head * dk.head + h.key * dk.token;
      for (int64_t d = 0; d < p_.D; ++d) to[d] += C(p_.scale) * h.slope * ds * line_[d];
    }
  }

 private:
  bool finite_keys(KeyRows<U> k, KeyRows<U> v, int64_t begin, int64_t end) const {
    bool finite = true;
    for (int64_t j = begin; j < end && finite; ++j)
      finite = all_finite(reinterpret_cast<const Element<U>*>(k[j]), p_.D) &&
               all_finite(reinterpret_cast<const Element<U>*>(v[j]), p_.Dv);
    return finite;
  }

  // Brings the keys [begin, end) of a unit into the form that matrix units take.
  void pack_keys(KeyRows<U> k, KeyRows<U> v, int64_t begin, int64_t end) {
    if constexpr (FIXED_KEYS) {
      pack_key_rows(k, begin, end, depth_, packed_k_);
      pack_key_rows(v, begin, end, value_depth_, packed_v_);
      for (int64_t at = begin; p_.dq.data && at < end; at += KEY_BLOCK)
        pack_key_columns(k, at, std::min(at + KEY_BLOCK, end), depth_, true, k_columns_,
                         turned_k_ + (at - begin) * depth_.padded);
    }
  }

  void clear_sums() { std::fill_n(ds_sums_, TILE, C(0)), std::fill_n(p_sums_, TILE, C(0)); }

  // What ds adds up to over the keys of a lane.
  C sum_of_ds(int64_t kv_head, int l, const Row& row) const {
    const Tensor4& t = p_.ds_sum.data ? p_.ds_sum : p_.dlse;
    return t.data ? static_cast<const C*>(t.data)[tile_.lanes.offset(t, kv_head, p_, l, row)] : C(0);
  }

  // Adds the heavy pairs of a row's tile to dk and dq (in rows_).
  void correct(const Row& row, int64_t kv_head, const HeadLanes<C>& head) {
    const int64_t chunks = head.chunk ? (row.prefix_len + head.chunk - 1) / head.chunk : 0;
    const auto add = [&](C* to, C factor) {
      for (int64_t d = 0; d < p_.D; ++d) to[d] += factor * line_[d];
    };
    const auto add_key = [&](const Heavy<C>& h, const Tensor4& k, int64_t at) {
      load_row(line_, k, at + kv_head * k.head + h.key * k.token, p_.D, p_.q.type);
      add(rows_ + (h.lane - tile_.first) * depth_.padded, h.slope * h.corrected(head.all[h.lane]));
    };
    for (int l = 0; l < tile_.lanes.count; ++l) {
      const int64_t lane = tile_.first + l;
      C ds = 0, p = 0;
      for (int64_t i = 0; i < chunks; ++i)
        ds += head.sums[i * head.lanes + lane].ds, p += head.sums[i * head.lanes + lane].p;
      ds += ds_sums_[l], p += p_sums_[l];
      head.all[lane] = {sum_of_ds(kv_head, l, row) - ds, p};
      for (int64_t i = head.lane_start[lane]; p_.dq.data && i < head.lane_start[lane + 1]; ++i)
        add_key(head.by_lane[i], p_.prefix_k, row.prefix * p_.prefix_k.batch);
    }
    for (const Heavy<C>& h : heavy_) {
      if (p_.dq.data) add_key(h, p_.k, row.batch * p_.k.batch + row.token * p_.k.token);
      if (!p_.dk.data) continue;
      load_row(line_, p_.q, tile_.lanes.offset(p_.q, kv_head, p_, int(h.lane - tile_.first), row), p_.D, p_.q.type);
      add(dk_ + h.key * depth_.padded, h.slope * h.corrected(head.all[h.lane]));
    }
  }

  // dq <- scale * (of prefix keys + of own keys)
  void store_dq(int64_t kv_head, const HeadLanes<C>& head) {
    const TileLanes<C>& lanes = tile_.lanes;
    lanes.each([&](int l, const Row& row) {
      C* line = rows_ + l * depth_.padded;
      const C* prefix = head.dq + (tile_.first + l) * depth_.padded;
      for (int64_t d = 0; d < depth_.padded; d += VECTOR_SIZE<C>) store(line + d, load(line + d) + load(prefix + d));
      store_row(p_.dq, lanes.offset(p_.dq, kv_head, p_, l, row), line, p_.D, C(p_.scale));
    });
  }

  void clear(int64_t keys, const void* dk, const void* dv) {
    if (dk) std::fill_n(dk_, keys * depth_.padded, C(0));
    if (dv) std::fill_n(dv_, keys * value_depth_.padded, C(0));
  }

  // Lanes of `t` as columns and as pairs of lanes; those marked in `blank` (if given) as zeros. `broken`: those that
  // are not finite; among the pairs they are zeros, too.
  void pack_rows(const Tensor4& t, const Depth<U>& depth, int64_t kv_head, const TileLanes<C>& lanes, const bool* blank,
                 U* columns, U* pairs, std::vector<int>* broken) {
    // numbers need no pairing: they are loaded where the rows belong
    Element<U>* rows = WIDTH<U> == 1 ? reinterpret_cast<Element<U>*>(pairs) : lane_rows_;
    const int64_t elements = depth.elements();
    load_lanes<U>(p_, t, depth, kv_head, lanes, rows);
    for (int l = 0; blank && l < lanes.count; ++l)
      if (blank[l]) std::fill_n(rows + l * elements, elements, Element<U>(0));
    to_columns<U>(rows, depth, lanes.vectors, columns);
    broken->clear();
    for (int l = 0; l < lanes.count; ++l)
      if (!all_finite(rows + l * elements, depth.D)) {
        broken->push_back(l);
        std::fill_n(rows + l * elements, elements, Element<U>(0));
      }
    lane_pairs<U>(rows, elements, lanes.vectors * VECTOR_SIZE<C>, depth.padded, pairs);
    if (FIXED_KEYS && lanes.vectors % 2)  // matrix units sum two vectors of lanes at once
      std::memset(pairs + lanes.vectors * VECTOR_SIZE<C> / WIDTH<U> * depth.padded, 0,
                  VECTOR_SIZE<C> / WIDTH<U> * depth.padded * sizeof(U));
  }

  // <out, dout> of a lane
  C dot(int64_t out_at, int64_t dout_at) const {
    Vec<C> products{};
    int64_t d = 0;
    for (; d + VECTOR_SIZE<C> <= p_.Dv; d += VECTOR_SIZE<C>)
      products += load_vector<C>(p_.out, out_at + d) * load_vector<C>(p_.dout, dout_at + d);
    C sum = sum_of<C>(products), out[VECTOR_SIZE<C>], dout[VECTOR_SIZE<C>];
    load_row(out, p_.out, out_at + d, p_.Dv - d, p_.out.type);
    load_row(dout, p_.dout, dout_at + d, p_.Dv - d, p_.dout.type);
    for (int64_t i = 0; d + i < p_.Dv; ++i) sum += out[i] * dout[i];
    return sum;
  }

  // One block of keys against a tile. Key j's gradients are accumulated in row j - first of dk_ and dv_.
  void step(const Logits<C>& logits, const BackwardTile<U>& tile, bool own, bool careful, KeyRows<U> k, KeyRows<U> v,
            int64_t first, const void* dk, const void* dv, C* dq, std::vector<Heavy<C>>* heavy) {
    const int count = block_.count, vectors = tile.lanes.vectors;
    const int64_t key = block_.index[0] - first, columns = vectors * VECTOR_SIZE<C>, steps = (count + STEP - 1) / STEP;
    const U *k_rows[KEY_BLOCK], *v_rows[KEY_BLOCK];
    for (int n = 0; n < count; ++n) k_rows[n] = k[block_.index[n]], v_rows[n] = v[block_.index[n]];
    // x <- keys b
    const auto times_keys = [&](const U* const* rows, const Element<U>* packed, const U* b, C* x,
                                const Depth<U>& depth) {
      if constexpr (FIXED_KEYS)
        tile_product(steps * STEP, columns, depth.elements() / STEP, packed + key * depth.elements(), depth.elements(),
                     b, TILE, x, TILE, false);
      else {
        C* x_rows[KEY_BLOCK];
        for (int n = 0; n < count; ++n) x_rows[n] = x + n * TILE;
        times_heads<U>(count, rows, units_of<U>(depth.D), b, x_rows, vectors);
      }
    };
    // s <- k q, then the logits
    times_keys(k_rows, packed_k_, tile.q, s_, depth_);
    logits.apply(tile.lanes, block_, own, s_, p_.softcap ? slope_ : nullptr);
    // dp <- v dout
    if (needs_ds_) times_keys(v_rows, packed_v_, tile.dout, dp_, value_depth_);
    if (careful) {
      std::fill_n(hidden_, KEY_BLOCK * TILE, C(0));
      logits.hide(tile.lanes, block_, own, hidden_);
      for (int n = 0; n < count; ++n)  // padding: of infinite keys its zeros make NaN
        std::fill(hidden_ + n * TILE + tile.lanes.count, hidden_ + (n + 1) * TILE, -std::numeric_limits<C>::infinity());
    }
    for (int at = 0; at < vectors * VECTOR_SIZE<C>; at += VECTOR_SIZE<C>)
      if (probabilities(tile, at, logits.coefficient, careful)) take_heavy(tile, at, heavy);
    if (p_.dbias && !own) add_bias(tile.lanes, logits.kv_head);
    if (p_.softcap && needs_ds_) apply_slope(vectors, careful);
    std::vector<int> broken;
    if (careful) {
      if (dv) add_lanes(s_, p_.dout, tile, tile.broken_dout, logits.kv_head, first, dv_, value_depth_);
      if (dk) add_lanes(dp_, p_.q, tile, tile.broken_q, logits.kv_head, first, dk_, depth_);
      if (dq) broken = take_broken(k_rows, count, p_.D);
    }
    // sums of keys += x rows
    const auto add_rows = [&](const C* x, const U* pairs, const U* rows, C* sums, const Depth<U>& depth) {
      if constexpr (FIXED_KEYS)
        tile_product(round_up(count, 16), depth.padded, (vectors + 1) / 2, reinterpret_cast<const Element<U>*>(pairs),
                     TILE, rows, depth.padded, sums + key * depth.padded, depth.padded, true);
      else {
        const U* lane_rows[KEY_BLOCK];
        C* gradients[KEY_BLOCK];
        for (int n = 0; n < count; ++n) {
          if constexpr (WIDTH<U> == 1) lane_rows[n] = x + n * TILE;
          else lane_rows[n] = pairs + n * (TILE / WIDTH<U>);
          gradients[n] = sums + (block_.index[n] - first) * depth.padded;
        }
        times_rows<U>(count, lane_rows, units_of<U>(tile.lanes.count), rows, depth.padded, gradients,
                      int(depth.padded / VECTOR_SIZE<C>), MAX_NV, true);
      }
    };
    if (dv) to_pairs<U>(s_, count, vectors, p_rows_, nullptr);
    if (dk || dq) to_pairs<U>(dp_, count, vectors, ds_rows_, ds_columns_);
    if (dv) add_rows(s_, p_rows_, tile.dout_rows, dv_, value_depth_);
    if (dk) add_rows(dp_, ds_rows_, tile.q_rows, dk_, depth_);
    // dq <- dq + k^T ds
    if (dq) {
      const U* ds = ds_columns_;
      if constexpr (WIDTH<U> == 1) ds = dp_;
      if constexpr (FIXED_KEYS) {
        const Element<U>* block = turned_k_ + key / KEY_BLOCK * KEY_BLOCK * depth_.padded;
        tile_product(depth_.padded, columns, steps, block + key % KEY_BLOCK, KEY_BLOCK, ds, TILE, dq, TILE, true);
      } else {
        alignas(64) C one[TILE], keep[TILE];
        std::fill_n(one, TILE, C(1));
        std::memset(keep, 0xFF, sizeof keep);
        const U* k_columns[KEY_BLOCK];
        key_columns<U>(k_rows, count, p_.D, k_columns_, k_columns);
        times_cols<U>(p_.D, k_columns, units_of<U>(count), ds, TILE, dq, TILE, vectors, one, keep);
      }
    }
    for (int n : broken)
      for (int l = 0; l < tile.lanes.count; ++l)
        for (int64_t d = 0; hidden_[n * TILE + l] == 0 && d < p_.D; ++d)
          dq[d * TILE + l] += value_of(reinterpret_cast<const Element<U>*>(k[block_.index[n]])[d]) * dp_[n * TILE + l];
  }

  // Sums of keys += x row, for lanes whose row of `t` is not finite, where they see the key.
  void add_lanes(const C* x, const Tensor4& t, const BackwardTile<U>& tile, const std::vector<int>& broken,
                 int64_t kv_head, int64_t first, C* sums, const Depth<U>& depth) {
    if (broken.empty()) return;
    std::vector<C> values(depth.D);
    tile.lanes.each([&](int l, const Row& row) {
      if (!std::binary_search(broken.begin(), broken.end(), l)) return;
      load_row(values.data(), t, tile.lanes.offset(t, kv_head, p_, l, row), depth.D, t.type);
      for (int n = 0; n < block_.count; ++n)
        for (int64_t d = 0; hidden_[n * TILE + l] == 0 && d < depth.D; ++d)
          sums[(block_.index[n] - first) * depth.padded + d] += x[n * TILE + l] * values[d];
    });
  }

  // x at i of a block, and 0 where a lane does not see the key: what is there may be NaN.
  CTK_INLINE Vec<C> only_seen(Vec<C> x, int i, bool careful) const {
    return careful ? load(hidden_ + i) == C(0) ? x : Vec<C>{} : x;
  }

  // s -> p and dp -> ds for the vector of lanes at `at`, and their sums. Whether a pair is heavy.
  CTK_INLINE bool probabilities(const BackwardTile<U>& tile, int at, C coefficient, bool careful) {
    const Vec<C> lse = load(tile.lse + at), rest = load(tile.rest + at), delta = load(tile.delta + at);
    const bool needs_ds = needs_ds_;
    Vec<C> top{}, p_sum{}, ds_sum{};
    for (int n = 0; n < block_.count; ++n) {
      const int i = n * TILE + at;
      const Vec<C> p = only_seen(exp2_of(load(s_ + i) * coefficient - lse - rest), i, careful);
      store(s_ + i, p);
      if (!needs_ds) continue;
      const Vec<C> ds = only_seen(p * (load(dp_ + i) - delta), i, careful);
      store(dp_ + i, ds);
      top = max<C>(p, top), p_sum += p, ds_sum += ds;
    }
    store(p_sums_ + at, load(p_sums_ + at) + p_sum);
    store(ds_sums_ + at, load(ds_sums_ + at) + ds_sum);
    return any_of<C>((Ints<C>)(top > C(HEAVY)));
  }

  // Moves the heavy pairs of the vector at `at` to the list.
  void take_heavy(const BackwardTile<U>& tile, int at, std::vector<Heavy<C>>* heavy) {
    for (int n = 0; n < block_.count; ++n) {
      if (!any_of<C>((Ints<C>)(load(s_ + n * TILE + at) > C(HEAVY)))) continue;
      for (int i = n * TILE + at, l = at; l < std::min(at + VECTOR_SIZE<C>, tile.lanes.count); ++l, ++i)
        if (s_[i] > C(HEAVY)) {
          heavy->push_back({tile.first + l, block_.index[n], dp_[i], s_[i], p_.softcap ? slope_[i] : C(1)});
          dp_[i] = C(0);
        }
    }
  }

  // The bias is added after the softcap, so its gradient is summed before this.
  void apply_slope(int vectors, bool careful) {
    for (int n = 0; n < block_.count; ++n)
      for (int at = n * TILE; at < n * TILE + vectors * VECTOR_SIZE<C>; at += VECTOR_SIZE<C>)
        store(dp_ + at, only_seen(load(dp_ + at) * load(slope_ + at), at, careful));
  }

  void add_bias(const TileLanes<C>& lanes, int64_t kv_head) {
    const int64_t group = p_.H / p_.Hk;
    C* base = static_cast<C*>(p_.dbias) + lanes.prefix() * p_.dbias_prefix + kv_head * group * p_.dbias_head;
    for (int n = 0; n < block_.count; ++n)
      for (int l = 0; l < lanes.count; ++l) base[lanes.head[l] * p_.dbias_head + block_.index[n]] += dp_[n * TILE + l];
  }

  void add_prefix(const Tensor4& t, const C* grad, const Depth<U>& depth, C factor, int64_t prefix, int64_t kv_head,
                  int64_t begin, int64_t end, bool fresh) {
    if (!t.data) return;
    C* dst = static_cast<C*>(t.data) + prefix * t.batch + kv_head * t.head + begin * t.token;
    for (int64_t j = 0; j < end - begin; ++j) {
      const C* from = grad + j * depth.padded;
      C* to = dst + j * t.token;
      for (int64_t d = 0; d < depth.D; ++d) to[d] = fresh ? factor * from[d] : to[d] + factor * from[d];
    }
  }

  void store_own(const Tensor4& t, const Row& row, int64_t kv_head, const C* grad, const Depth<U>& depth, C factor) {
    if (!t.data) return;
    const int64_t at = row.batch * t.batch + kv_head * t.head + row.token * t.token;
    for (int64_t j = 0; j < row.keys; ++j) store_row(t, at + j * t.token, grad + j * depth.padded, depth.D, factor);
  }

  const Params& p_;
  const Depth<U> depth_, value_depth_;
  const bool needs_ds_;
  C *s_, *dp_, *slope_;  // [KEY_BLOCK][TILE]
  C* hidden_;            // [KEY_BLOCK][TILE], -inf where a lane does not see a key, else 0; in careful blocks
  alignas(64) C ds_sums_[TILE], p_sums_[TILE];
  std::vector<Heavy<C>> heavy_;                  // of the row's tile
  U *p_rows_, *ds_rows_;                         // [KEY_BLOCK][TILE / WIDTH], pairs of lanes
  U *ds_columns_, *k_columns_;                   // [units(KEY_BLOCK)][TILE | depth.padded], pairs of keys
  U *k_, *v_;                                    // converted keys [keys][units(D | Dv)]
  Element<U>*packed_k_, *packed_v_, *turned_k_;  // for matrix units, [keys][elements()] and KEY_BLOCK by KEY_BLOCK
                                                 // [depth.padded][KEY_BLOCK]
  C *dk_, *dv_;                                  // [keys][depth.padded | value_depth.padded]
  C* dq_;                                        // [depth.padded][TILE]
  C* line_;                                      // [D]
  C* rows_;                                      // [TILE][depth.padded]
  Element<U>* lane_rows_;                        // [TILE][elements() of either depth]
  BackwardTile<U> tile_;                         // of one row
  KeyBlock block_;
  TileRegisters registers_;
};
