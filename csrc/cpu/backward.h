// Backward pass. With p = 2^(s - lse), delta = <out, dout> - dlse, all blocks [keys][TILE]:
//
//   s  <- k q         dp <- v dout        ds <- p (dp - delta)        (times the softcap's slope)
//   dv <- dv + p dout     dk <- dk + ds q     dq <- dq + k^T ds     dbias <- dbias + sum over lanes of ds
//
// Every product is done once. A unit of work owns the gradients it accumulates, in registers and cache: either a chunk
// of prefix keys of one KV head, for which it walks all query tiles, or the own keys of one row. dq of a lane is the
// sum over its units; each unit writes its share to a slot of a bounded buffer, and a second step adds the slots in
// order. Nothing depends on which worker runs what, so the bits do not depend on the number of workers. To bound the
// buffer, the work is cut into phases over KV heads and rows.

constexpr int64_t SHARE_BYTES = 8 << 20;  // bound on the buffer of dq shares
constexpr int64_t ENOUGH_UNITS = 24;      // units per phase that balance a few dozen workers' load

template <typename C>
struct BackwardTile {
  Lanes<C> lanes;
  C *q, *dout;               // [padded D][TILE]
  C *q_rows, *dout_rows;     // [TILE][padded D]
  C* dq;                     // [padded D][TILE]
  C* rows;                   // [TILE][padded D]
  alignas(64) C lse[TILE];   // base 2; +inf where the lane has no probabilities (padding, no visible key)
  alignas(64) C rest[TILE];  // what rounding to the compute type takes off lse in base 2
  alignas(64) C delta[TILE];
};

template <typename C>
class Backward {
 public:
  Backward(const Params& p, int64_t keys, Arena* arena) : p_(p), padded_(round_up(p.D, LANES<C>)) {
    s_ = arena->take<C>(KEY_BLOCK * TILE);
    dp_ = arena->take<C>(KEY_BLOCK * TILE);
    slope_ = arena->take<C>(p.softcap ? KEY_BLOCK * TILE : 0);
    k_ = arena->take<C>(keys * p.D);
    v_ = arena->take<C>(keys * p.D);
    dk_ = arena->take<C>(keys * padded_);
    dv_ = arena->take<C>(keys * padded_);
    tile_.q = arena->take<C>(padded_ * TILE);
    tile_.dout = arena->take<C>(padded_ * TILE);
    tile_.dq = arena->take<C>(padded_ * TILE);
    tile_.rows = arena->take<C>(TILE * padded_);
    tile_.q_rows = arena->take<C>(TILE * padded_);
    tile_.dout_rows = arena->take<C>(TILE * padded_);
  }

  static int64_t bytes(const Params& p, int64_t keys) {
    const int64_t padded = round_up(p.D, LANES<C>);
    return 3 * Arena::bytes(KEY_BLOCK * TILE, sizeof(C)) + 2 * Arena::bytes(keys * p.D, sizeof(C)) +
           2 * Arena::bytes(keys * padded, sizeof(C)) + 6 * Arena::bytes(TILE * padded, sizeof(C));
  }

  // Prefix keys [begin, end) of one head: all tiles. Adds to dprefix_k, dprefix_v, dbias; dq shares go to `share`,
  // which holds [lanes of the phase][padded D] from lane `first_lane` on.
  void prefix(const RowOrder& order, const std::vector<Tile>& tiles, int64_t prefix, int64_t kv_head, int64_t begin,
              int64_t end, C* share, int64_t first_lane) {
    const int64_t k_at = prefix * p_.prefix_k.batch + kv_head * p_.prefix_k.head;
    const int64_t v_at = prefix * p_.prefix_v.batch + kv_head * p_.prefix_v.head;
    const KeyRows<C> k = key_rows(p_.prefix_k, k_at, begin, end, p_.D, p_.q.type, k_);
    const KeyRows<C> v = key_rows(p_.prefix_v, v_at, begin, end, p_.D, p_.q.type, v_);
    const Logits<C> logits(p_, kv_head);
    clear(end - begin, p_.dprefix_k.data, p_.dprefix_v.data);
    for (const Tile& which : tiles) {
      load_tile(order, which, kv_head);
      for (int64_t at = begin; at < end; at += KEY_BLOCK)
        if (prefix_block(p_, tile_.lanes, at, std::min(at + KEY_BLOCK, end), &block_))
          step(logits, false, k, v, begin, p_.dprefix_k.data, p_.dprefix_v.data, share);
      write_share(share, which.first - first_lane);
    }
    add_prefix(p_.dprefix_k, dk_, C(p_.scale), prefix, kv_head, begin, end);
    add_prefix(p_.dprefix_v, dv_, C(1), prefix, kv_head, begin, end);
  }

  // The own keys of one row. Writes dk, dv of all its keys.
  void own(const RowOrder& order, const std::vector<Tile>& tiles, const Row& row, int64_t kv_head, C* share,
           int64_t first_lane) {
    const int64_t k_at = row.batch * p_.k.batch + kv_head * p_.k.head + row.token * p_.k.token;
    const int64_t v_at = row.batch * p_.v.batch + kv_head * p_.v.head + row.token * p_.v.token;
    const KeyRows<C> k = key_rows(p_.k, k_at, 0, row.keys, p_.D, p_.q.type, k_);
    const KeyRows<C> v = key_rows(p_.v, v_at, 0, row.keys, p_.D, p_.q.type, v_);
    const Logits<C> logits(p_, kv_head);
    clear(row.keys, p_.dk.data, p_.dv.data);
    for (const Tile& which : tiles) {
      load_tile(order, which, kv_head);
      for (int64_t at = 0; at < row.keys; at += KEY_BLOCK)
        if (own_block(p_, tile_.lanes, tile_.lanes.pieces[0], at, std::min(at + KEY_BLOCK, row.keys), &block_))
          step(logits, true, k, v, 0, p_.dk.data, p_.dv.data, share);
      write_share(share, which.first - first_lane);
    }
    store_own(p_.dk, row, kv_head, dk_, C(p_.scale));
    store_own(p_.dv, row, kv_head, dv_, C(1));
  }

 private:
  void clear(int64_t keys, const void* dk, const void* dv) {
    if (dk) std::fill_n(dk_, keys * padded_, C(0));
    if (dv) std::fill_n(dv_, keys * padded_, C(0));
  }

  void load_tile(const RowOrder& order, const Tile& which, int64_t kv_head) {
    Lanes<C>& lanes = tile_.lanes;
    lanes.set(p_, order, which, kv_head);
    load_lanes<C>(p_, p_.q, kv_head, lanes, tile_.q_rows, padded_);
    load_lanes<C>(p_, p_.dout, kv_head, lanes, tile_.dout_rows, padded_);
    load_lanes<C>(p_, p_.out, kv_head, lanes, tile_.rows, padded_);
    std::fill_n(tile_.dq, padded_ * TILE, C(0));
    std::fill_n(tile_.lse, TILE, std::numeric_limits<C>::infinity());
    std::fill_n(tile_.rest, TILE, C(0));
    std::fill_n(tile_.delta, TILE, C(0));
    lanes.each([&](int l, const Row& row) {
      C* dout = tile_.dout_rows + l * padded_;
      const C lse = static_cast<const C*>(p_.lse.data)[lanes.offset(p_.lse, kv_head, p_, l, row)];
      if (lse == -std::numeric_limits<C>::infinity()) {  // saw nothing: whatever dout holds must not reach a key
        std::fill_n(dout, p_.D, C(0));
        return;
      }
      tile_.lse[l] = C(double(lse) * LOG2E);
      tile_.rest[l] = C(double(lse) * LOG2E - double(tile_.lse[l]));
      Vec<C> products{};
      for (int64_t d = 0; d < padded_; d += LANES<C>) products += load(tile_.rows + l * padded_ + d) * load(dout + d);
      C delta = sum_of<C>(products);
      if (p_.dlse.data) delta -= static_cast<const C*>(p_.dlse.data)[lanes.offset(p_.dlse, kv_head, p_, l, row)];
      tile_.delta[l] = delta;
    });
    transpose(tile_.q_rows, padded_, tile_.q, TILE, lanes.vectors * LANES<C>, padded_);
    transpose(tile_.dout_rows, padded_, tile_.dout, TILE, lanes.vectors * LANES<C>, padded_);
  }

  // One block of keys against the tile. Key j's gradients are accumulated in row j - first of dk_ and dv_.
  void step(const Logits<C>& logits, bool own, KeyRows<C> k, KeyRows<C> v, int64_t first, const void* dk,
            const void* dv, const void* dq) {
    const int count = block_.count, vectors = tile_.lanes.vectors;
    const C *k_rows[KEY_BLOCK], *v_rows[KEY_BLOCK];
    C *s_rows[KEY_BLOCK], *dp_rows[KEY_BLOCK], *dk_rows[KEY_BLOCK], *dv_rows[KEY_BLOCK];
    for (int n = 0; n < count; ++n) {
      const int64_t j = block_.index[n];
      k_rows[n] = k.base + j * k.stride, v_rows[n] = v.base + j * v.stride;
      s_rows[n] = s_ + n * TILE, dp_rows[n] = dp_ + n * TILE;
      dk_rows[n] = dk_ + (j - first) * padded_, dv_rows[n] = dv_ + (j - first) * padded_;
    }
    const bool needs_ds = dk || dq || (p_.dbias && !own);
    // s <- k q, then the logits
    times_rows<C>(count, k_rows, p_.D, tile_.q, TILE, s_rows, vectors, 3, false);
    logits.apply(tile_.lanes, block_, own, s_, p_.softcap ? slope_ : nullptr);
    // dp <- v dout
    if (needs_ds) times_rows<C>(count, v_rows, p_.D, tile_.dout, TILE, dp_rows, vectors, 3, false);
    for (int at = 0; at < vectors * LANES<C>; at += LANES<C>) probabilities(at, logits.coefficient, needs_ds);
    if (p_.dbias && !own) add_bias(logits.kv_head);
    if (p_.softcap && needs_ds) apply_slope(vectors);
    const int d_vectors = int(padded_ / LANES<C>);
    // dv <- dv + p dout
    if (dv) times_rows<C>(count, s_rows, tile_.lanes.count, tile_.dout_rows, padded_, dv_rows, d_vectors, MAX_NV, true);
    // dk <- dk + ds q
    if (dk) times_rows<C>(count, dp_rows, tile_.lanes.count, tile_.q_rows, padded_, dk_rows, d_vectors, MAX_NV, true);
    // dq <- dq + k^T ds
    if (dq) {
      alignas(64) C one[TILE], keep[TILE];
      std::fill_n(one, TILE, C(1));
      std::memset(keep, 0xFF, sizeof keep);
      times_cols<C>(p_.D, k_rows, count, dp_, TILE, tile_.dq, TILE, vectors, one, keep);
    }
  }

  // s -> p and dp -> ds for the vector of lanes at `at`.
  CTK_INLINE void probabilities(int at, C coefficient, bool needs_ds) {
    const Vec<C> lse = load(tile_.lse + at), rest = load(tile_.rest + at), delta = load(tile_.delta + at);
    for (int n = 0; n < block_.count; ++n) {
      const int i = n * TILE + at;
      const Vec<C> p = exp2_of(load(s_ + i) * coefficient - lse - rest);
      store(s_ + i, p);
      if (needs_ds) store(dp_ + i, p * (load(dp_ + i) - delta));
    }
  }

  // The bias is added after the softcap, so its gradient is summed before this.
  void apply_slope(int vectors) {
    for (int n = 0; n < block_.count; ++n)
      for (int at = n * TILE; at < n * TILE + vectors * LANES<C>; at += LANES<C>)
        store(dp_ + at, load(dp_ + at) * load(slope_ + at));
  }

  void add_bias(int64_t kv_head) {
    const int64_t group = p_.H / p_.Hk;
    C* base = static_cast<C*>(p_.dbias) + tile_.lanes.prefix() * p_.dbias_prefix + kv_head * group * p_.dbias_head;
    for (int n = 0; n < block_.count; ++n)
      for (int l = 0; l < tile_.lanes.count; ++l)
        base[tile_.lanes.head[l] * p_.dbias_head + block_.index[n]] += dp_[n * TILE + l];
  }

  void write_share(C* share, int64_t lane) {
    if (!share) return;
    transpose(tile_.dq, TILE, tile_.rows, padded_, padded_, tile_.lanes.vectors * LANES<C>);
    std::copy_n(tile_.rows, tile_.lanes.count * padded_, share + lane * padded_);
  }

  void add_prefix(const Tensor4& t, const C* grad, C factor, int64_t prefix, int64_t kv_head, int64_t begin,
                  int64_t end) {
    if (!t.data) return;
    C* dst = static_cast<C*>(t.data) + prefix * t.batch + kv_head * t.head + begin * t.token;
    for (int64_t j = 0; j < end - begin; ++j)
      for (int64_t d = 0; d < p_.D; ++d) dst[j * t.token + d] += factor * grad[j * padded_ + d];
  }

  void store_own(const Tensor4& t, const Row& row, int64_t kv_head, const C* grad, C factor) {
    if (!t.data) return;
    const int64_t at = row.batch * t.batch + kv_head * t.head + row.token * t.token;
    for (int64_t j = 0; j < row.keys; ++j) store_row(t, at + j * t.token, grad + j * padded_, p_.D, factor);
  }

  const Params& p_;
  const int64_t padded_;
  C *s_, *dp_, *slope_;  // [KEY_BLOCK][TILE]
  C *k_, *v_;            // converted keys [keys][D]
  C *dk_, *dv_;          // [keys][padded D]
  BackwardTile<C> tile_;
  KeyBlock block_;
};

// Prefix keys per unit: enough units, key gradients that stay in the second-level cache, whole blocks.
template <typename C>
int64_t chunk_keys(const Params& p) {
  const int64_t most = std::max<int64_t>(KEY_BLOCK, (256 << 10) / (2 * int64_t(sizeof(C)) * round_up(p.D, LANES<C>)));
  const int64_t wanted = p.P * p.Hk / ENOUGH_UNITS;
  return round_up(std::clamp<int64_t>(wanted, KEY_BLOCK, most), KEY_BLOCK);
}

template <typename C>
class BackwardPlan {
 public:
  BackwardPlan(const Params& p, const Pool& pool)
      : p_(p), pool_(pool), order_(order_rows(p)), chunk_(chunk_keys<C>(p)), padded_(round_up(p.D, LANES<C>)) {
    slots_ = (p.P + chunk_ - 1) / chunk_;
    arenas_.resize(pool.workers);
  }

  void run() {
    const bool dq = p_.dq.data, prefix = dq || p_.dprefix_k.data || p_.dprefix_v.data || p_.dbias;
    const bool own = dq || p_.dk.data || p_.dv.data;
    const int64_t most_heads = std::clamp<int64_t>(ENOUGH_UNITS / std::max<int64_t>(slots_, 1), 1, p_.Hk);
    const int64_t lane_bytes = most_heads * slots_ * padded_ * int64_t(sizeof(C));
    const int64_t all = order_.lanes();
    const int64_t most_lanes = !dq || !slots_ ? all : std::clamp<int64_t>(SHARE_BYTES / lane_bytes, TILE, all);
    if (dq) own_shares_.reset(new C[most_heads * all * padded_]);
    if (dq) shares_.reset(new C[most_heads * slots_ * most_lanes * padded_]);
    for (first_head_ = 0; first_head_ < p_.Hk; first_head_ += most_heads) {
      heads_ = std::min(most_heads, p_.Hk - first_head_);
      if (own) differentiate_own();
      for (int64_t begin = 0; begin < all; begin += most_lanes) {
        const int64_t end = std::min(begin + most_lanes, all);
        if (prefix) differentiate_prefix(begin, end);
        if (dq) reduce(begin, end);
      }
    }
  }

 private:
  // A chunk of one prefix, and the tiles of the phase that read it.
  struct Unit {
    const std::vector<Tile>* tiles;
    int64_t prefix, begin, end, slot;
  };

  void differentiate_own() {
    each(p_.B * heads_, [&](Backward<C>& worker, int64_t i) {
      const int64_t at = i / heads_, head = i % heads_;
      const std::vector<Tile> tiles = make_tiles(order_, order_.start[at], order_.start[at + 1], LANES<C>, false);
      C* share = own_shares_ ? own_shares_.get() + head * order_.lanes() * padded_ : nullptr;
      worker.own(order_, tiles, p_.rows[order_.row[at]], first_head_ + head, share, 0);
    });
  }

  // Lanes [first, last) against all prefix keys that they may see.
  void differentiate_prefix(int64_t first, int64_t last) {
    std::vector<std::unique_ptr<std::vector<Tile>>> tiles;
    std::vector<Unit> units;
    for (int64_t begin = first, end; begin < last; begin = end) {
      const Row& row = p_.rows[order_.row[order_.position_of(begin)]];
      end = std::min(order_.end_of_prefix(p_, begin), last);
      tiles.push_back(std::make_unique<std::vector<Tile>>(make_tiles(order_, begin, end, LANES<C>, true)));
      for (int64_t at = 0; at < row.prefix_len; at += chunk_)
        units.push_back({tiles.back().get(), row.prefix, at, std::min(at + chunk_, row.prefix_len), at / chunk_});
    }
    each(int64_t(units.size()) * heads_, [&](Backward<C>& worker, int64_t i) {
      const Unit& unit = units[i / heads_];
      const int64_t head = i % heads_;
      C* share = shares_ ? shares_.get() + (head * slots_ + unit.slot) * (last - first) * padded_ : nullptr;
      worker.prefix(order_, *unit.tiles, unit.prefix, first_head_ + head, unit.begin, unit.end, share, first);
    });
  }

  // dq of lanes [first, last) <- scale * (own share + prefix shares in the order of the slots)
  void reduce(int64_t first, int64_t last) {
    const int64_t group = p_.H / p_.Hk, lanes = last - first, blocks = (lanes + TILE - 1) / TILE;
    each(blocks * heads_, [&](Backward<C>&, int64_t i) {
      const int64_t begin = first + i / heads_ * TILE, end = std::min(begin + TILE, last), head = i % heads_;
      C line[256];
      int64_t at = order_.position_of(begin);
      for (int64_t lane = begin; lane < end; ++lane) {
        while (order_.start[at + 1] <= lane) ++at;
        const Row& row = p_.rows[order_.row[at]];
        std::copy_n(own_shares_.get() + (head * order_.lanes() + lane) * padded_, p_.D, line);
        const C* share = shares_.get() + (head * slots_ * lanes + lane - first) * padded_;
        for (int64_t slot = 0; slot * chunk_ < row.prefix_len; ++slot)
          for (int64_t d = 0; d < p_.D; ++d) line[d] += share[slot * lanes * padded_ + d];
        const int64_t in_row = lane - order_.start[at];
        const int64_t offset = row.batch * p_.dq.batch + (row.token + in_row / group) * p_.dq.token +
                               ((first_head_ + head) * group + in_row % group) * p_.dq.head;
        store_row(p_.dq, offset, line, p_.D, C(p_.scale));
      }
    });
  }

  // f(worker, item) for every item; workers take the next item when they are free.
  template <typename F>
  void each(int64_t items, F f) {
    std::atomic<int64_t> next{0};
    const int64_t keys = std::max({std::min(chunk_, p_.P), p_.max_own, int64_t(1)});
    pool_.run([&](int id) {
      if (next.load() >= items) return;
      if (!arenas_[id]) arenas_[id] = std::make_unique<Arena>(Backward<C>::bytes(p_, keys));
      arenas_[id]->clear();
      Backward<C> worker(p_, keys, arenas_[id].get());
      for (int64_t i; (i = next.fetch_add(1)) < items;) f(worker, i);
    });
  }

  const Params& p_;
  const Pool& pool_;
  const RowOrder order_;
  const int64_t chunk_, padded_;
  int64_t slots_;                       // chunks of a prefix
  int64_t first_head_ = 0, heads_ = 0;  // KV heads of the phase
  std::unique_ptr<C[]> own_shares_;     // [heads][lanes][padded D]
  std::unique_ptr<C[]> shares_;         // [heads][slots][lanes of the phase][padded D]
  std::vector<std::unique_ptr<Arena>> arenas_;
};

template <typename C>
void backward_as(const Params& p, const Pool& pool) {
  BackwardPlan<C>(p, pool).run();
}
