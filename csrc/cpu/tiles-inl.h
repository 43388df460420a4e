// Query tiles. A lane is a query of one head; the lanes of all rows that read one prefix, for the heads of a KV group,
// form one long axis (row, query, head; head fastest). A tile is up to TILE consecutive lanes, several vectors of them.
// Keys are broadcast against it, so that one load of a key serves every lane. Rows that fill vectors badly share tiles;
// each lane then has its own row.
//
// Results of a lane do not depend on which lanes share its tile: keys are visited in blocks at fixed positions, and a
// key that a lane does not see contributes exactly nothing, whatever it holds.
//
// `visible_positions` in csrc/mask.h states which context positions a row sees.

// Rows in the order in which their lanes are laid out: stable by prefix.
struct RowOrder {
  std::vector<int64_t> row;    // position -> index into Params::rows
  std::vector<int64_t> start;  // position -> first lane; one more entry holds the total

  int64_t lanes() const { return start.back(); }
  // Position of the row that holds a lane.
  int64_t position_of(int64_t lane) const {
    return std::upper_bound(start.begin(), start.end(), lane) - start.begin() - 1;
  }
  // First lane from `lane` on whose row reads another prefix than that of `lane`.
  int64_t end_of_prefix(const Params& p, int64_t lane) const;
};

inline RowOrder order_rows(const Params& p) {
  RowOrder order;
  order.row.resize(p.B);
  std::iota(order.row.begin(), order.row.end(), int64_t(0));
  std::stable_sort(order.row.begin(), order.row.end(),
                   [&](int64_t a, int64_t b) { return p.rows[a].prefix < p.rows[b].prefix; });
  order.start.assign(1, 0);
  for (int64_t r : order.row) order.start.push_back(order.start.back() + p.rows[r].queries * (p.H / p.Hk));
  return order;
}

inline int64_t RowOrder::end_of_prefix(const Params& p, int64_t lane) const {
  size_t at = size_t(position_of(lane));
  const int64_t prefix = p.rows[row[at]].prefix;
  while (at < row.size() && p.rows[row[at]].prefix == prefix) ++at;
  return start[at];
}

struct Tile {
  int64_t first;     // first lane
  int64_t position;  // position in RowOrder of the row that holds it
  int lanes;
};

inline void cut(int64_t first, int64_t lanes, int64_t position, const RowOrder& order, int vector_size,
                std::vector<Tile>* tiles) {
  const int64_t vectors = (lanes + vector_size - 1) / vector_size, most = TILE / vector_size;
  int64_t left = (vectors + most - 1) / most;
  for (int64_t v = 0, end = first + lanes; v < vectors; --left) {
    const int64_t width = (vectors - v + left - 1) / left, at = first + v * vector_size;
    while (order.start[position + 1] <= at) ++position;
    tiles->push_back({at, position, int(std::min(width * vector_size, end - at))});
    v += width;
  }
}

// Tiles over lanes [begin, end), whose rows read one prefix. Each row has tiles of its own, which then skip exactly the
// keys that the row does not see, unless that would waste too many lanes.
inline std::vector<Tile> make_tiles(const RowOrder& order, int64_t begin, int64_t end, int vector_size, bool share) {
  std::vector<Tile> tiles;
  if (begin >= end) return tiles;
  const int64_t position = order.position_of(begin);
  int64_t alone = 0;  // vectors, if every row has tiles of its own
  for (int64_t at = begin, i = position; at < end; at = order.start[++i])
    alone += (std::min(order.start[i + 1], end) - at + vector_size - 1) / vector_size;
  if (share && alone * vector_size * 8 > round_up(end - begin, vector_size) * 9) {
    cut(begin, end - begin, position, order, vector_size, &tiles);
    return tiles;
  }
  for (int64_t at = begin, i = position; at < end; at = order.start[++i])
    cut(at, std::min(order.start[i + 1], end) - at, i, order, vector_size, &tiles);
  return tiles;
}

// The lanes of one row in a tile.
struct Piece {
  const Row* row;
  int begin, end;  // lanes
};

// The lanes of a tile. Those from `count` to the end of the last vector are padding: finite, and never stored.
template <typename C>
struct TileLanes {
  int count, vectors;
  std::vector<Piece> pieces;
  int64_t query[TILE];        // index of the query in its row
  int head[TILE];             // index of the head in its group
  int64_t position[TILE];     // own position of the query
  alignas(64) C slope[TILE];  // ALiBi slope
  int64_t lowest, highest;    // own positions

  void set(const Params& p, const RowOrder& order, const Tile& tile, int64_t kv_head) {
    const int group = int(p.H / p.Hk);
    count = tile.lanes;
    vectors = (count + VECTOR_SIZE<C> - 1) / VECTOR_SIZE<C>;
    pieces.clear();
    lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();
    std::fill_n(slope, TILE, C(0)), std::fill_n(position, TILE, int64_t(0));
    for (int64_t at = tile.position, l = 0; l < count; ++at) {
      const int64_t in_row = tile.first + l - order.start[at];
      const int end = int(std::min<int64_t>(count, order.start[at + 1] - tile.first));
      if (l >= end) continue;  // a row without queries
      const Row& row = p.rows[order.row[at]];
      pieces.push_back({&row, int(l), end});
      int64_t q = in_row / group;
      lowest = std::min(lowest, q + row.offset);
      for (int h = int(in_row % group); l < end; ++l) {
        query[l] = q, head[l] = h;
        position[l] = q + row.offset;
        if (p.alibi) slope[l] = static_cast<const C*>(p.alibi)[kv_head * group + h];
        if (++h == group) h = 0, ++q;
      }
      highest = std::max(highest, query[end - 1] + row.offset);
    }
  }

  int64_t prefix() const { return pieces[0].row->prefix; }
  int64_t prefix_len() const { return pieces[0].row->prefix_len; }

  // Offset in elements of what lane l has in a tensor laid out as q.
  int64_t offset(const Tensor4& t, int64_t kv_head, const Params& p, int l, const Row& row) const {
    return row.batch * t.batch + (kv_head * (p.H / p.Hk) + head[l]) * t.head + (row.token + query[l]) * t.token;
  }

  template <typename F>
  void each(F f) const {  // f(lane, row)
    for (const Piece& piece : pieces)
      for (int l = piece.begin; l < piece.end; ++l) f(l, *piece.row);
  }
};

// Sizes of what a tile holds: a head dimension, D of queries and keys or Dv of values, and in units and in the compute
// type, whole vectors of each.
template <typename U>
struct Depth {
  int64_t D, units, padded;
  int64_t elements() const { return units * WIDTH<U>; }  // of a row [units]; at least `padded`
  explicit Depth(int64_t size)
      : D(size),
        units(round_up(units_of<U>(size), VECTOR_SIZE<C_of<U>>)),
        padded(round_up(size, VECTOR_SIZE<C_of<U>>)) {}
};

// Loads the lanes of a tensor laid out as q as rows [TILE][depth.elements()], zero where there is nothing.
template <typename U>
void load_lanes(const Params& p, const Tensor4& t, const Depth<U>& depth, int64_t kv_head,
                const TileLanes<C_of<U>>& lanes, Element<U>* rows) {
  const int64_t elements = depth.elements();
  lanes.each([&](int l, const Row& row) {
    load_row(rows + l * elements, t, lanes.offset(t, kv_head, p, l, row), depth.D, t.type);
    std::fill(rows + l * elements + depth.D, rows + (l + 1) * elements, Element<U>(0));
  });
  std::fill(rows + lanes.count * elements, rows + lanes.vectors * VECTOR_SIZE<C_of<U>> * elements, Element<U>(0));
}

// Rows [TILE][depth.elements()] as columns [depth.units][TILE].
template <typename U>
void to_columns(const Element<U>* rows, const Depth<U>& depth, int vectors, U* columns) {
  using C = C_of<U>;  // as wide as a unit, which the transpose only moves
  static_assert(sizeof(U) == sizeof(C));
  void* out = columns;
  transpose(reinterpret_cast<const C*>(rows), depth.units, static_cast<C*>(out), TILE, vectors * VECTOR_SIZE<C>,
            depth.units);
}

// Keys as rows in memory: key j is at base + j * stride, in elements.
template <typename U>
struct KeyRows {
  const Element<U>* base = nullptr;
  int64_t stride = 0;
  const U* operator[](int64_t j) const { return reinterpret_cast<const U*>(base + j * stride); }
};

// Keys [begin, end) of one head, in place where they can be operands as they are, else converted into `scratch`,
// [end - begin][units(D)].
template <typename U>
KeyRows<U> key_rows(const Tensor4& t, int64_t offset, int64_t begin, int64_t end, int64_t D, Type rounding,
                    U* scratch) {
  constexpr Type type = Operand<U>::TYPE;
  if (t.type == type && rounding == type && D % WIDTH<U> == 0)
    return {static_cast<const Element<U>*>(t.data) + offset, t.token};
  Element<U>* rows = reinterpret_cast<Element<U>*>(scratch);
  const int64_t stride = units_of<U>(D) * WIDTH<U>;
  for (int64_t j = begin; j < end; ++j, rows += stride) {
    load_row(rows, t, offset + j * t.token, D, rounding);
    std::fill(rows + D, rows + stride, Element<U>(0));
  }
  return {reinterpret_cast<Element<U>*>(scratch) - begin * stride, stride};
}

// One block of keys that at least one lane sees, and where lanes must be masked.
struct KeyBlock {
  int count;
  int64_t index[KEY_BLOCK];  // position of a key in the prefix, or among the row's own
  struct Hole {
    int key, begin, end;
  };  // these lanes do not see this key
  std::vector<Hole> holes;
  bool limits;                    // causal or window edge inside the block: compare positions
  int first_vector, last_vector;  // vectors that take part (own keys: the row's)
  int begin, end;                 // lanes that take part
};

// Keys of a block whose rows (of D elements) are not finite; their rows become zero_row.
template <typename U>
std::vector<int> take_broken(const U** rows, int count, int64_t D) {
  std::vector<int> broken;
  for (int n = 0; n < count; ++n)
    if (!all_finite(reinterpret_cast<const Element<U>*>(rows[n]), D)) broken.push_back(n), rows[n] = zero_row<U>();
  return broken;
}

// Which of KEY_BLOCK keys are visible, one bit each.
struct KeyBits {
  uint64_t words[KEY_BLOCK / 64] = {};

  void operator|=(const KeyBits& other) {
    for (int i = 0; i < KEY_BLOCK / 64; ++i) words[i] |= other.words[i];
  }

  KeyBits without(const KeyBits& other) const {
    KeyBits rest;
    for (int i = 0; i < KEY_BLOCK / 64; ++i) rest.words[i] = words[i] & ~other.words[i];
    return rest;
  }

  // All keys from the first visible one to the last below `count`, in whole groups of 32.
  KeyBits filled(int count) const {
    int first = -1, last = -1;
    each(count, [&](int key) { first = first < 0 ? key : first, last = key; });
    KeyBits all;
    for (int at = 0; first >= 0 && at < KEY_BLOCK; at += 64)
      all.words[at / 64] = low_bits(last / 32 * 32 + 32 - at) & ~low_bits(first / 32 * 32 - at);
    return all;
  }

  // How many keys before `key` are visible.
  int before(int key) const {
    int count = 0;
    for (int first = 0; first < key; first += 64)
      count += __builtin_popcountll(words[first / 64] & low_bits(key - first));
    return count;
  }

  // f(key) for every visible key below `count`, in order.
  template <typename F>
  CTK_INLINE void each(int count, F f) const {
    for (int first = 0; first < count; first += 64)
      for (uint64_t word = words[first / 64] & low_bits(count - first); word; word &= word - 1)
        f(first + __builtin_ctzll(word));
  }
};

// Visibility of context positions [begin, begin + count) of one row. count <= KEY_BLOCK; later bits mean nothing.
inline KeyBits context_bits(const ContextRule& rule, const ContextRow& row, int64_t begin, int count) {
  KeyBits visible;
  const int shift = int(begin % 4);  // the rule starts at a multiple of 4
  for (int i = 0; 64 * i < shift + count; ++i) {
    const uint64_t word = visible_positions<64>(rule, row, begin - shift + 64 * i);
    if (64 * i < count) visible.words[i] = word >> shift;
    if (i && shift) visible.words[i - 1] |= word << (64 - shift);
  }
  return visible;
}

// The keys of a block, counted from `begin`: those that a lane of the pieces sees, of which `seen` has one each; if
// `fixed`, all between them, too. Where a piece does not see one of them is a hole; padding is as the last piece.
template <typename C>
bool take_keys(const TileLanes<C>& lanes, const Piece* pieces, const KeyBits* seen, int64_t n, int64_t begin, int count,
               bool fixed, KeyBlock* block) {
  KeyBits any;
  for (int64_t i = 0; i < n; ++i) any |= seen[i];
  const KeyBits taken = fixed ? any.filled(count) : any;
  block->count = 0;
  taken.each(count, [&](int j) { block->index[block->count++] = begin + j; });
  for (int64_t i = 0; i < n; ++i) {
    const int end = pieces[i].end < lanes.count ? pieces[i].end : lanes.vectors * VECTOR_SIZE<C>;
    taken.without(seen[i]).each(count, [&](int j) { block->holes.push_back({taken.before(j), pieces[i].begin, end}); });
  }
  return block->count > 0;
}

// Prefix keys [begin, end), end - begin <= KEY_BLOCK, for a tile. False: no lane sees any of them.
template <typename C>
bool prefix_block(const Params& p, const TileLanes<C>& lanes, int64_t begin, int64_t end, bool fixed, KeyBlock* block) {
  block->holes.clear();
  block->first_vector = 0, block->last_vector = lanes.vectors;
  block->begin = 0, block->end = lanes.count;
  block->limits = false;
  if (p.window && p.window_prefix) {
    // key c is near enough iff c > prefix_len + position - window
    const int64_t edge = lanes.prefix_len() - p.window;
    if (end - 1 <= edge + lanes.lowest) return false;
    block->limits = begin <= edge + lanes.highest;
  }
  const int count = int(end - begin);
  KeyBits seen[TILE];  // a tile holds at most one row per lane
  for (size_t i = 0; i < lanes.pieces.size(); ++i)
    seen[i] = context_bits(p.rule, lanes.pieces[i].row->context, begin, count);
  return take_keys(lanes, lanes.pieces.data(), seen, int64_t(lanes.pieces.size()), begin, count, fixed, block);
}

// Own keys of one row of the tile, [begin, end) among the row's, end - begin <= KEY_BLOCK.
template <typename C>
bool own_block(const Params& p, const TileLanes<C>& lanes, const Piece& piece, int64_t begin, int64_t end, bool fixed,
               KeyBlock* block) {
  const int64_t low = piece.row->offset + lanes.query[piece.begin];
  const int64_t high = piece.row->offset + lanes.query[piece.end - 1];
  block->holes.clear();
  block->first_vector = piece.begin / VECTOR_SIZE<C>, block->last_vector = (piece.end - 1) / VECTOR_SIZE<C> + 1;
  block->begin = piece.begin, block->end = piece.end;
  block->limits = false;
  if (p.causal) {
    end = std::min(end, high + 1);
    block->limits = end - 1 > low;
  }
  if (p.window) {
    begin = std::max(begin, low - p.window + 1);
    if (fixed) begin = begin / 32 * 32;
    block->limits = block->limits || begin <= high - p.window;
  }
  if (begin >= end) return false;
  const int count = int(end - begin);
  if (p.rule.length > p.P) {
    const KeyBits visible = context_bits(p.rule, piece.row->context, p.P + begin, count);
    return take_keys(lanes, &piece, &visible, 1, begin, count, fixed, block);
  }
  block->count = count;
  std::iota(block->index, block->index + count, begin);
  return true;
}
