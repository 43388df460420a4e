// The work of a backward pass: how it is cut into units and phases (backward-inl.h says why), and in which order they
// run.

// Prefix keys per unit: enough units, key gradients that stay in the second-level cache, whole blocks.
template <typename C>
int64_t chunk_keys(const Params& p) {
  const int64_t sizes = round_up(p.D, VECTOR_SIZE<C>) + round_up(p.Dv, VECTOR_SIZE<C>);
  const int64_t most = std::max<int64_t>(KEY_BLOCK, (256 << 10) / (int64_t(sizeof(C)) * sizes));
  const int64_t wanted = p.P * p.Hk / ENOUGH_UNITS;
  return round_up(std::clamp<int64_t>(wanted, KEY_BLOCK, most), KEY_BLOCK);
}

template <typename U>
class BackwardPlan {
 public:
  using C = C_of<U>;

  BackwardPlan(const Params& p, const Pool& pool)
      : p_(p), pool_(pool), order_(order_rows(p)), chunk_(chunk_keys<C>(p)), depth_(p.D), value_depth_(p.Dv) {
    slots_ = (p.P + chunk_ - 1) / chunk_;
    keys_ = std::max({std::min(chunk_, p.P), p.max_own, int64_t(1)});
    Arena size;
    Backward<U>(p, keys_, &size);
    worker_bytes_ = size.used();
  }

  void run() {
    const bool dq = p_.dq.data, ds = Backward<U>::needs_ds(p_), prefix = p_.P && (ds || p_.dprefix_v.data);
    const bool own = ds || p_.dv.data;
    const int64_t all = order_.lanes(), share = depth_.padded * TILE;
    const int64_t most_heads = std::clamp<int64_t>(ENOUGH_UNITS / std::max<int64_t>(slots_, 1), 1, p_.Hk);
    // what a lane takes in a phase: its part of a packed tile, and of the shares
    const int64_t lane_sizes = 2 * (depth_.padded + value_depth_.padded) + (dq ? slots_ : 0) * depth_.padded;
    const int64_t lane_bytes = most_heads * lane_sizes * int64_t(sizeof(C));
    const int64_t most_lanes = std::clamp<int64_t>(PHASE_BYTES / lane_bytes, TILE, std::max<int64_t>(all, TILE));
    const int64_t dq_size = dq ? all * depth_.padded : 0, sums = ds ? slots_ * all : 0, lists = p_.G * slots_;
    Arena lane_memory(most_heads * (Arena::bytes(dq_size, sizeof(C)) + Arena::bytes(sums, sizeof(LaneSum<C>)) +
                                    Arena::bytes(all, sizeof(LaneSum<C>))));
    std::vector<std::vector<Heavy<C>>> heavy(most_heads * lists);
    for (int64_t i = 0; i < most_heads; ++i)
      head_lanes_.push_back({all,
                             chunk_,
                             slots_,
                             lane_memory.take<LaneSum<C>>(sums),
                             lane_memory.take<C>(dq_size),
                             lane_memory.take<LaneSum<C>>(all),
                             heavy.data() + i * lists,
                             {},
                             {}});
    if (prefix) clear_unread();
    for (first_head_ = 0; first_head_ < p_.Hk; first_head_ += most_heads) {
      heads_ = std::min(most_heads, p_.Hk - first_head_);
      int64_t begin = 0;
      do {  // at least once: rows without queries have own keys, too
        cut_tiles(begin, std::min(begin + most_lanes, all));
        const int64_t tiles = int64_t(tiles_.size()), kept_slots = dq ? slots_ : 0;
        BackwardTile<U> sample;
        Arena tile_size;
        sample.place(depth_, value_depth_, &tile_size);
        Arena memory(tiles * heads_ * tile_size.used() + Arena::bytes(kept_slots * heads_ * tiles * share, sizeof(C)));
        packed_.resize(tiles * heads_);
        for (BackwardTile<U>& tile : packed_) tile.place(depth_, value_depth_, &memory);
        shares_ = dq ? memory.take<C>(kept_slots * heads_ * tiles * share) : nullptr;
        if (prefix || dq) pack();
        if (prefix) differentiate();
        if (dq) reduce();
        begin += most_lanes;
      } while (begin < all);
      if (ds) each(heads_, [&](Backward<U>&, int64_t i) { head_lanes_[i].sort(lists); });
      if (own)
        each(p_.B * heads_, [&](Backward<U>& worker, int64_t i) { differentiate_own(worker, i / heads_, i % heads_); });
      if (ds && prefix)
        each(lists * heads_, [&](Backward<U>& worker, int64_t i) { correct(worker, i / heads_, i % heads_); });
      for (std::vector<Heavy<C>>& list : heavy) list.clear();
    }
  }

 private:
  // A chunk of one prefix, and the tiles of the phase that read it.
  struct Unit {
    int64_t first_tile, tiles;
    int64_t prefix, begin, end, slot;
    bool fresh;  // no earlier phase had this prefix
  };

  // Prefix gradients that no unit will write: of prefixes that no query reads, and past the end of shorter ones.
  void clear_unread() {
    std::vector<int64_t> length(p_.G, 0);
    for (int64_t b = 0; b < p_.B; ++b)
      if (p_.rows[b].queries) length[p_.rows[b].prefix] = p_.rows[b].prefix_len;
    for (const Tensor4* t : {&p_.dprefix_k, &p_.dprefix_v})
      for (int64_t i = 0; t->data && i < p_.G * p_.Hk; ++i) {
        C* head = static_cast<C*>(t->data) + i / p_.Hk * t->batch + i % p_.Hk * t->head;
        std::fill(head + length[i / p_.Hk] * t->token, head + p_.P * t->token, C(0));
      }
  }

  // The phase's tiles and units: lanes [first, last) against all prefix keys that they may see.
  void cut_tiles(int64_t first, int64_t last) {
    tiles_.clear(), units_.clear();
    for (int64_t begin = first, end; begin < last; begin = end) {
      const Row& row = p_.rows[order_.row[order_.position_of(begin)]];
      end = std::min(order_.end_of_prefix(p_, begin), last);
      const bool fresh = begin == 0 || order_.end_of_prefix(p_, begin - 1) == begin;
      const std::vector<Tile> some = make_tiles(order_, begin, end, VECTOR_SIZE<C>, true);
      for (int64_t at = 0; at < row.prefix_len; at += chunk_)
        units_.push_back({int64_t(tiles_.size()), int64_t(some.size()), row.prefix, at,
                          std::min(at + chunk_, row.prefix_len), at / chunk_, fresh});
      tiles_.insert(tiles_.end(), some.begin(), some.end());
    }
  }

  void pack() {
    const int64_t tiles = int64_t(tiles_.size());
    each(tiles * heads_, [&](Backward<U>& worker, int64_t i) {
      worker.pack(order_, tiles_[i % tiles], first_head_ + i / tiles, &packed_[i]);
    });
  }

  // Shares of dq are laid out [head][slot][tile].
  C* shares_at(int64_t head, int64_t slot, int64_t tile) const {
    return shares_ ? shares_ + ((head * slots_ + slot) * int64_t(tiles_.size()) + tile) * depth_.padded * TILE
                   : nullptr;
  }

  // All units of the prefix.
  void differentiate() {
    each(int64_t(units_.size()) * heads_, [&](Backward<U>& worker, int64_t i) {
      const Unit& unit = units_[i / heads_];
      const int64_t head = i % heads_;
      HeadLanes<C>& lanes = head_lanes_[head];
      worker.prefix(&packed_[head * int64_t(tiles_.size()) + unit.first_tile], unit.tiles, unit.prefix,
                    first_head_ + head, unit.begin, unit.end, unit.fresh, shares_at(head, unit.slot, unit.first_tile),
                    lanes.sums + unit.slot * lanes.lanes, &lanes.heavy[unit.prefix * slots_ + unit.slot]);
    });
  }

  void differentiate_own(Backward<U>& worker, int64_t at, int64_t head) {
    const std::vector<Tile> tiles = make_tiles(order_, order_.start[at], order_.start[at + 1], VECTOR_SIZE<C>, false);
    worker.own(order_, tiles, p_.rows[order_.row[at]], first_head_ + head, head_lanes_[head]);
  }

  void correct(Backward<U>& worker, int64_t list, int64_t head) {
    const HeadLanes<C>& lanes = head_lanes_[head];
    worker.correct_prefix(order_, list / slots_, first_head_ + head, lanes.heavy[list], lanes.all);
  }

  void reduce() {
    const int64_t tiles = int64_t(tiles_.size());
    each(tiles * heads_, [&](Backward<U>& worker, int64_t i) {
      const int64_t head = i / tiles, tile = i % tiles;
      const int64_t slots = (packed_[i].lanes.prefix_len() + chunk_ - 1) / chunk_;
      worker.add_shares(packed_[i], shares_at(head, 0, tile), slots, tiles * depth_.padded * TILE,
                        head_lanes_[head].dq + tiles_[tile].first * depth_.padded);
    });
  }

  // f(worker, item) for every item; workers take the next item when they are free.
  template <typename F>
  void each(int64_t items, F f) {
    std::atomic<int64_t> next{0};
    pool_.run([&](int) {
      if (next.load() >= items) return;
      Arena arena(worker_bytes_);
      Backward<U> worker(p_, keys_, &arena);
      for (int64_t i; (i = next.fetch_add(1)) < items;) f(worker, i);
    });
  }

  const Params& p_;
  const Pool& pool_;
  const RowOrder order_;
  const int64_t chunk_;
  const Depth<U> depth_, value_depth_;
  int64_t slots_;                       // chunks of a prefix
  int64_t keys_, worker_bytes_;         // most keys of a unit; scratch of a worker
  int64_t first_head_ = 0, heads_ = 0;  // KV heads of the phase
  std::vector<Tile> tiles_;             // of the phase
  std::vector<Unit> units_;
  std::vector<BackwardTile<U>> packed_;   // [heads][tiles]
  std::vector<HeadLanes<C>> head_lanes_;  // [heads]
  C* shares_ = nullptr;                   // [heads][slots][tiles][depth.padded][TILE]
};

template <typename U>
void backward_as(const Params& p, const Pool& pool) {
  BackwardPlan<U>(p, pool).run();
}
