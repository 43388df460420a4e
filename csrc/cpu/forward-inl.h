// Forward pass: one online softmax over the visible prefix keys and the row's own keys.
//
//   for each KV head, for each tile of lanes (row, query, head in group):
//     m <- -inf, l <- 0, o <- 0                                           [TILE], [TILE], [Dv][TILE]
//     for each block of keys that some lane sees (prefix blocks, then each row's own):
//       s   <- k q                                                        [keys][TILE]
//       m'  <- max(m, max over keys of s);  p <- 2^(s - m')
//       l   <- l 2^(m - m') + sum over keys of p
//       o   <- o 2^(m - m') + v^T p                                       [Dv][TILE]
//     out <- o / l,  lse <- ln 2 (m + log2 l)
//
// Lanes run along vectors, so the softmax needs no horizontal operation; keys are broadcast, so visible ones are read
// where they lie and hidden ones cost nothing. Where tiles are few, as in decoding, several units share a tile: each
// takes a span of the prefix, and a second step merges their m, l and o in order.
//
// v^T p multiplies values that a lane does not see by 0, which a NaN or infinity survives. So where o is not finite in
// the end, the tiles are done again, carefully: values that are not finite leave the product, and are added to the
// lanes that see them one by one.

template <typename U>
struct ForwardTile {
  using C = C_of<U>;
  TileLanes<C> lanes;
  bool narrow;  // takes the products of narrow-inl.h
  U* q;         // [depth.units][TILE]
  C* o;         // [value_depth.padded][TILE]
  alignas(64) C m[TILE];
  alignas(64) C l[TILE];
};

template <typename U>
class Forward {
 public:
  using C = C_of<U>;
  // Tiles that walk the keys together, so that a converted key block serves several of them.
  static constexpr int GROUP = 4;

  Forward(const Params& p, Arena* arena) : p_(p), depth_(p.D), value_depth_(p.Dv) {
    lane_rows_ = arena->take<Element<U>>(TILE * depth_.elements());
    rows_ = arena->take<C>(TILE * value_depth_.padded);
    s_ = arena->take<C>(KEY_BLOCK * TILE);
    hidden_ = arena->take<C>(KEY_BLOCK * TILE);
    k_ = arena->take<U>(KEY_BLOCK * units_of<U>(p.D));
    v_ = arena->take<U>(KEY_BLOCK * units_of<U>(p.Dv));
    p_columns_ = arena->take<U>(WIDTH<U> > 1 ? units_of<U>(KEY_BLOCK) * TILE : 0);
    v_columns_ = arena->take<U>(WIDTH<U> > 1 ? units_of<U>(KEY_BLOCK) * value_depth_.padded : 0);
    packed_k_ = arena->take<Element<U>>(FIXED_KEYS ? KEY_BLOCK * depth_.elements() : 0);
    packed_v_ = arena->take<Element<U>>(FIXED_KEYS ? KEY_BLOCK * value_depth_.padded : 0);
    for (ForwardTile<U>& tile : tiles_)
      tile.q = arena->take<U>(depth_.units * TILE), tile.o = arena->take<C>(value_depth_.padded * TILE);
  }

  // Prefix keys [begin, end) and, if `own`, the rows' own keys, for tiles of one prefix. With `partial`, for one tile,
  // the state goes there, [value_depth.padded + 2][TILE], instead of results to out and lse.
  void run(const RowOrder& order, const Tile* tiles, int count, int64_t kv_head, int64_t begin, int64_t end, bool own,
           C* partial) {
    walk(order, tiles, count, kv_head, begin, end, own, false);
    const auto broken = [&](const ForwardTile<U>& tile) { return !all_finite(tile.o, value_depth_.padded * TILE); };
    if (std::any_of(tiles_, tiles_ + count, broken)) walk(order, tiles, count, kv_head, begin, end, own, true);
    for (int t = 0; !partial && t < count; ++t) finish(kv_head, tiles_[t]);
    if (!partial) return;
    partial = std::copy_n(tiles_[0].o, value_depth_.padded * TILE, partial);
    partial = std::copy_n(tiles_[0].m, TILE, partial);
    std::copy_n(tiles_[0].l, TILE, partial);
  }

  // The results of a tile from the states of its spans.
  void merge(const RowOrder& order, const Tile& which, int64_t kv_head, const C* partials, int64_t spans) {
    ForwardTile<U>& tile = tiles_[0];
    const int64_t o_size = value_depth_.padded * TILE, stride = o_size + 2 * TILE;
    tile.lanes.set(p_, order, which, kv_head);
    std::fill_n(tile.m, TILE, -std::numeric_limits<C>::infinity());
    std::fill_n(tile.l, TILE, C(0));
    std::fill_n(tile.o, o_size, C(0));
    for (int at = 0; at < tile.lanes.vectors * VECTOR_SIZE<C>; at += VECTOR_SIZE<C>) {
      Vec<C> top = load(tile.m + at), total{};
      for (int64_t i = 0; i < spans; ++i) top = max<C>(load(partials + i * stride + o_size + at), top);
      const Vec<C> base = top == -std::numeric_limits<C>::infinity() ? Vec<C>{} : top;
      for (int64_t i = 0; i < spans; ++i) {
        const C* span = partials + i * stride;
        const Vec<C> factor = exp2_of(load(span + o_size + at) - base);
        total += load(span + o_size + TILE + at) * factor;
        for (int64_t d = at; d < o_size; d += TILE) store(tile.o + d, load(tile.o + d) + load(span + d) * factor);
      }
      store(tile.m + at, top);
      store(tile.l + at, total);
    }
    finish(kv_head, tile);
  }

 private:
  // The loop over all blocks.
  void walk(const RowOrder& order, const Tile* tiles, int count, int64_t kv_head, int64_t begin, int64_t end, bool own,
            bool careful) {
    careful_ = careful;
    const Logits<C> logits(p_, kv_head);
    for (int t = 0; t < count; ++t) start(order, tiles[t], kv_head, &tiles_[t]);
    const int64_t prefix = tiles_[0].lanes.prefix(), prefix_end = std::min(end, tiles_[0].lanes.prefix_len());
    const int64_t k_at = prefix * p_.prefix_k.batch + kv_head * p_.prefix_k.head;
    const int64_t v_at = prefix * p_.prefix_v.batch + kv_head * p_.prefix_v.head;
    for (int64_t at = begin; at < prefix_end; at += KEY_BLOCK) {
      const int64_t to = std::min(at + KEY_BLOCK, prefix_end);
      KeyRows<U> k, v;
      bool packed = false;
      for (int t = 0; t < count; ++t) {
        const bool fixed = FIXED_KEYS && !tiles_[t].narrow;
        if (!prefix_block(p_, tiles_[t].lanes, at, to, fixed, &block_)) continue;
        if (!k.base) {
          k = key_rows(p_.prefix_k, k_at, at, to, p_.D, p_.q.type, k_);
          v = key_rows(p_.prefix_v, v_at, at, to, p_.Dv, p_.q.type, v_);
        }
        if (fixed && !packed) pack(k, v, at, to), packed = true;
        attend(logits, &tiles_[t], false, k, v, at);
      }
    }
    for (int t = 0; own && t < count; ++t)
      for (const Piece& piece : tiles_[t].lanes.pieces) attend_own(logits, piece, kv_head, &tiles_[t]);
  }

  void start(const RowOrder& order, const Tile& which, int64_t kv_head, ForwardTile<U>* tile) {
    tile->lanes.set(p_, order, which, kv_head);
    load_lanes<U>(p_, p_.q, depth_, kv_head, tile->lanes, lane_rows_);
    to_columns<U>(lane_rows_, depth_, tile->lanes.vectors, tile->q);
    tile->narrow = is_narrow<U>(tile->lanes, p_.D) && is_narrow<U>(tile->lanes, p_.Dv);
    std::fill_n(tile->m, TILE, -std::numeric_limits<C>::infinity());
    std::fill_n(tile->l, TILE, C(0));
    std::fill_n(tile->o, value_depth_.padded * TILE, C(0));
  }

  void attend_own(const Logits<C>& logits, const Piece& piece, int64_t kv_head, ForwardTile<U>* tile) {
    const Row& row = *piece.row;
    const int64_t k_at = row.batch * p_.k.batch + kv_head * p_.k.head + row.token * p_.k.token;
    const int64_t v_at = row.batch * p_.v.batch + kv_head * p_.v.head + row.token * p_.v.token;
    for (int64_t begin = 0; begin < row.keys; begin += KEY_BLOCK) {
      const int64_t end = std::min(begin + KEY_BLOCK, row.keys);
      const bool fixed = FIXED_KEYS && !tile->narrow;
      if (!own_block(p_, tile->lanes, piece, begin, end, fixed, &block_)) continue;
      const KeyRows<U> k = key_rows(p_.k, k_at, begin, end, p_.D, p_.q.type, k_);
      const KeyRows<U> v = key_rows(p_.v, v_at, begin, end, p_.Dv, p_.q.type, v_);
      if (fixed) pack(k, v, begin, end);
      attend(logits, tile, true, k, v, begin);
    }
  }

  // Brings keys [begin, end) into the form that matrix units take.
  void pack(KeyRows<U> k, KeyRows<U> v, int64_t begin, int64_t end) {
    if constexpr (FIXED_KEYS) {
      pack_key_rows(k, begin, end, depth_, packed_k_);
      pack_key_columns(v, begin, end, value_depth_, careful_, v_columns_, packed_v_);
    }
  }

  // One block of keys: the loop body above. first: of the keys that are packed.
  void attend(const Logits<C>& logits, ForwardTile<U>* tile, bool own, KeyRows<U> k, KeyRows<U> v, int64_t first) {
    const U *k_rows[KEY_BLOCK], *v_rows[KEY_BLOCK];
    const int at = block_.first_vector * VECTOR_SIZE<C>, vectors = block_.last_vector - block_.first_vector;
    const int64_t columns = vectors * VECTOR_SIZE<C>, steps = (block_.count + STEP - 1) / STEP;
    for (int n = 0; n < block_.count; ++n) k_rows[n] = k[block_.index[n]], v_rows[n] = v[block_.index[n]];
    // s <- k q
    if (tile->narrow)
      with_lanes<C>(tile->lanes.count, [&](auto lanes) {
        narrow_logits<U, lanes()>(block_.count, k_rows, units_of<U>(p_.D), tile->q, s_, v_rows);
      });
    else if constexpr (FIXED_KEYS)
      tile_product(steps * STEP, columns, depth_.elements() / STEP,
                   packed_k_ + (block_.index[0] - first) * depth_.elements(), depth_.elements(), tile->q + at, TILE,
                   s_ + at, TILE, false);
    else {
      C* s_rows[KEY_BLOCK];
      for (int n = 0; n < block_.count; ++n) s_rows[n] = s_ + n * TILE + at;
      times_heads<U>(block_.count, k_rows, units_of<U>(p_.D), tile->q + at, s_rows, vectors, v_rows);
    }
    logits.apply(tile->lanes, block_, own, s_, nullptr);
    alignas(64) C factor[TILE];
    for (int v = block_.first_vector; v < block_.last_vector; ++v)
      softmax(v * VECTOR_SIZE<C>, logits.coefficient, tile, factor);
    // o <- o 2^(m - m') + v^T p
    std::vector<int> broken;
    if (careful_) broken = take_broken(v_rows, block_.count, p_.Dv);
    if (tile->narrow)
      with_lanes<C>(tile->lanes.count,
                    [&](auto lanes) { narrow_sums<U, lanes()>(block_.count, v_rows, p_.Dv, s_, factor, tile->o); });
    else if constexpr (FIXED_KEYS) {
      // what the lanes of other rows catch of this row's values, if those are not finite, is found in the end
      scale_sums(tile->o + at, columns, factor + at);
      fill_keys(p_columns_, block_.count);
      tile_product(value_depth_.padded, columns, steps, packed_v_ + (block_.index[0] - first), KEY_BLOCK,
                   p_columns_ + at, TILE, tile->o + at, TILE, true);
    } else {
      const U *v_columns[KEY_BLOCK], *weights = p_columns_;
      if constexpr (WIDTH<U> == 1) weights = s_;
      alignas(64) C keep[TILE];
      for (int l = at; l < at + columns; ++l) set_bits(keep + l, l >= block_.begin && l < block_.end);
      key_columns<U>(v_rows, block_.count, p_.Dv, v_columns_, v_columns);
      times_cols<U>(p_.Dv, v_columns, units_of<U>(block_.count), weights + at, TILE, tile->o + at, TILE, vectors,
                    factor + at, keep + at);
    }
    if (!broken.empty()) add_broken(logits, broken, own, v, tile);
  }

  // o += v p for values that are not finite, of the lanes that see them.
  void add_broken(const Logits<C>& logits, const std::vector<int>& broken, bool own, KeyRows<U> v,
                  ForwardTile<U>* tile) {
    std::fill_n(hidden_, KEY_BLOCK * TILE, C(0));
    logits.hide(tile->lanes, block_, own, hidden_);
    for (int n : broken) {
      const Element<U>* value = reinterpret_cast<const Element<U>*>(v[block_.index[n]]);
      for (int l = block_.begin; l < block_.end; ++l)
        for (int64_t d = 0; hidden_[n * TILE + l] == 0 && d < p_.Dv; ++d)
          tile->o[d * TILE + l] += value_of(value[d]) * s_[n * TILE + l];
    }
  }

  // o <- o 2^(m - m'), for some vectors of lanes. Mostly m is what it was.
  void scale_sums(C* o, int64_t lanes, const C* factor) const {
    if (std::all_of(factor, factor + lanes, [](C f) { return f == C(1); })) return;
    for (int64_t d = 0; d < value_depth_.padded; ++d, o += TILE)
      for (int64_t at = 0; at < lanes; at += VECTOR_SIZE<C>) store(o + at, load(o + at) * load(factor + at));
  }

  static void set_bits(C* x, bool on) { std::memset(x, on ? 0xFF : 0, sizeof(C)); }

  // m, l and the block s -> p for the vector of lanes at `at`, as pairs of keys, too; factor <- 2^(m - m').
  CTK_INLINE void softmax(int at, C coefficient, ForwardTile<U>* tile, C* factor) {
    const C lowest = -std::numeric_limits<C>::infinity();
    Vec<C> top[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};  // none waits for the other
    for (int n = 0; n < block_.count; n += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        if (n + i < block_.count) top[i] = max<C>(load(s_ + (n + i) * TILE + at), top[i]);
    const Vec<C> old = load(tile->m + at);
    const Vec<C> m = max<C>(max<C>(max<C>(top[0], top[1]), max<C>(top[2], top[3])) * coefficient, old);
    const Vec<C> base = m == lowest ? Vec<C>{} : m;  // a lane that has seen nothing yet: keep its logits at -inf
    Vec<C> sum{};
    const auto step = [&](int n) {
      const Vec<C> p = exp2_of(load(s_ + n * TILE + at) * coefficient - base);
      store(s_ + n * TILE + at, p);
      sum += p;
      return p;
    };
    if constexpr (WIDTH<U> == 1)
      for (int n = 0; n < block_.count; ++n) step(n);
    else
      for (int n = 0; n < block_.count; n += 2) {
        const Vec<C> low = step(n), high = n + 1 < block_.count ? step(n + 1) : Vec<C>{};
        store_pairs(halves_of(low, high), p_columns_ + n / 2 * TILE + at);
      }
    const Vec<C> f = exp2_of(old - base);
    store(factor + at, f);
    store(tile->m + at, m);
    store(tile->l + at, load(tile->l + at) * f + sum);
  }

  void finish(int64_t kv_head, const ForwardTile<U>& tile) {
    const int64_t size = value_depth_.padded;
    transpose(tile.o, TILE, rows_, size, size, tile.lanes.vectors * VECTOR_SIZE<C>);
    tile.lanes.each([&](int l, const Row& row) {
      const C total = tile.l[l], inverse = total > 0 || total != total ? C(1) / total : C(0);
      store_row<C>(p_.out, tile.lanes.offset(p_.out, kv_head, p_, l, row), rows_ + l * size, p_.Dv, inverse);
      // in double, once per lane: backward magnifies the rounding of lse by its size
      const double lse = total > 0 || total != total ? LN2 * (double(tile.m[l]) + std::log2(double(total)))
                                                     : -std::numeric_limits<double>::infinity();
      static_cast<C*>(p_.lse.data)[tile.lanes.offset(p_.lse, kv_head, p_, l, row)] = C(lse);
    });
  }

  const Params& p_;
  const Depth<U> depth_, value_depth_;
  Element<U>* lane_rows_;      // [TILE][depth.elements()]
  C* rows_;                    // [TILE][value_depth.padded]
  C* s_;                       // [KEY_BLOCK][TILE]
  C* hidden_;                  // [KEY_BLOCK][TILE], -inf where a lane does not see a key, else 0
  U *k_, *v_;                  // converted keys
  U *p_columns_, *v_columns_;  // [units(KEY_BLOCK)][TILE | value_depth.padded], pairs of keys
  Element<U>* packed_k_;       // [KEY_BLOCK][depth.elements()], for matrix units
  Element<U>* packed_v_;       // [value_depth.padded][KEY_BLOCK]
  TileRegisters registers_;
  bool careful_ = false;  // take care of values that are not finite
  ForwardTile<U> tiles_[GROUP];
  KeyBlock block_;
};

constexpr int64_t ENOUGH_ITEMS = 24;  // units that balance a few dozen workers' load
constexpr int64_t LEAST_SPAN = 256;   // prefix keys that are worth a unit

template <typename U>
void forward_as(const Params& p, const Pool& pool) {
  using C = C_of<U>;
  const RowOrder order = order_rows(p);
  struct Item {
    int first, count;
  };
  std::vector<Tile> tiles;
  std::vector<Item> items;
  for (int64_t begin = 0, end; begin < order.lanes(); begin = end) {
    end = order.end_of_prefix(p, begin);
    const std::vector<Tile> some = make_tiles(order, begin, end, VECTOR_SIZE<C>, true);
    // enough items to balance the workers, else as many tiles per item as convert a key block together
    const int64_t wanted = int64_t(some.size()) * p.Hk / (8 * pool.workers);
    const int step = int(std::clamp<int64_t>(wanted, 1, Forward<U>::GROUP));
    for (size_t t = 0; t < some.size(); t += step)
      items.push_back({int(tiles.size() + t), int(std::min<size_t>(step, some.size() - t))});
    tiles.insert(tiles.end(), some.begin(), some.end());
  }
  // the spans depend on the problem alone, so that the bits do not depend on the number of workers
  const int64_t heads_and_tiles = std::max<int64_t>(int64_t(tiles.size()) * p.Hk, 1);
  int64_t spans = std::clamp<int64_t>(ENOUGH_ITEMS / heads_and_tiles, 1, std::max<int64_t>(p.P / LEAST_SPAN, 1));
  const int64_t span = std::max<int64_t>(round_up((p.P + spans - 1) / spans, KEY_BLOCK), KEY_BLOCK);
  spans = std::max<int64_t>((p.P + span - 1) / span, 1);
  if (spans > 1) {  // then an item is one tile
    items.clear();
    for (size_t t = 0; t < tiles.size(); ++t) items.push_back({int(t), 1});
  }
  const int64_t per_head = int64_t(items.size()), per_span = per_head * p.Hk;
  const int64_t stride = (round_up(p.Dv, VECTOR_SIZE<C>) + 2) * TILE;
  Arena partial_memory(spans > 1 ? per_span * spans * stride * int64_t(sizeof(C)) : 0);
  C* partials = spans > 1 ? partial_memory.take<C>(per_span * spans * stride) : nullptr;
  Arena size;
  Forward<U>(p, &size);
  const auto each = [&](int64_t count, const std::function<void(Forward<U>&, int64_t)>& f) {
    std::atomic<int64_t> next{0};
    pool.run([&](int) {
      if (next.load() >= count) return;
      Arena arena(size.used());
      Forward<U> worker(p, &arena);
      for (int64_t i; (i = next.fetch_add(1)) < count;) f(worker, i);
    });
  };
  each(per_span * spans, [&](Forward<U>& worker, int64_t i) {
    const int64_t at = i % spans, tile = i / spans;
    const Item& item = items[tile % per_head];
    worker.run(order, &tiles[item.first], item.count, tile / per_head, at * span, (at + 1) * span, at == spans - 1,
               partials ? partials + i * stride : nullptr);
  });
  if (spans > 1)
    each(per_span, [&](Forward<U>& worker, int64_t i) {
      worker.merge(order, tiles[i % per_head], i / per_head, partials + i * spans * stride, spans);
    });
}
