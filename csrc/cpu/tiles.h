// Query tiles. The queries of all rows that read one prefix, times the heads of a KV group, form one long axis of lanes
// (row, query, head; head fastest). A tile is up to TILE consecutive lanes; keys are broadcast against it, so one load
// of a key serves every lane. Rows that fill vectors badly share tiles, and then each lane carries its own row.
//
// Results of a lane do not depend on which lanes share its tile: keys are visited in blocks at fixed positions, and a
// key that a lane does not see contributes exactly nothing (as long as the prefix is finite).

constexpr int TILE = 48;        // lanes of a tile: 3 AVX-512 vectors of float
constexpr int KEY_BLOCK = 128;  // keys per block: their logits for one tile stay in the first-level cache
constexpr int64_t ALIGNMENT = 64;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Scratch memory of one worker; a bump allocator over one aligned block.
class Arena {
 public:
  explicit Arena(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(ALIGNMENT, round_up(bytes, ALIGNMENT)))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * int64_t(sizeof(T)), ALIGNMENT);
    return p;
  }
  void clear() { used_ = 0; }
  static int64_t bytes(int64_t count, int64_t size) { return round_up(count * size, ALIGNMENT); }

 private:
  char* memory_;
  int64_t used_ = 0;
};

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

inline void cut(int64_t first, int64_t lanes, int64_t position, const RowOrder& order, int vector_lanes,
                std::vector<Tile>* tiles) {
  const int64_t vectors = (lanes + vector_lanes - 1) / vector_lanes, most = TILE / vector_lanes;
  int64_t left = (vectors + most - 1) / most;
  for (int64_t v = 0, end = first + lanes; v < vectors; --left) {
    const int64_t width = (vectors - v + left - 1) / left, at = first + v * vector_lanes;
    while (order.start[position + 1] <= at) ++position;
    tiles->push_back({at, position, int(std::min(width * vector_lanes, end - at))});
    v += width;
  }
}

// Tiles over lanes [begin, end), whose rows read one prefix. Rows keep to themselves, which lets a tile skip exactly
// the keys that its row does not see, unless that would waste too many lanes.
inline std::vector<Tile> make_tiles(const RowOrder& order, int64_t begin, int64_t end, int vector_lanes, bool share) {
  std::vector<Tile> tiles;
  if (begin >= end) return tiles;
  const int64_t position = order.position_of(begin);
  int64_t alone = 0;  // vectors, if every row keeps to itself
  for (int64_t at = begin, i = position; at < end; at = order.start[++i])
    alone += (std::min(order.start[i + 1], end) - at + vector_lanes - 1) / vector_lanes;
  if (share && alone * vector_lanes * 8 > round_up(end - begin, vector_lanes) * 9) {
    cut(begin, end - begin, position, order, vector_lanes, &tiles);
    return tiles;
  }
  for (int64_t at = begin, i = position; at < end; at = order.start[++i])
    cut(at, std::min(order.start[i + 1], end) - at, i, order, vector_lanes, &tiles);
  return tiles;
}

// The lanes of one row in a tile.
struct Piece {
  const Row* row;
  int begin, end;  // lanes
};

// What a tile's lanes are. Lanes from `count` to the end of the last vector are padding: finite, and never stored.
template <typename C>
struct Lanes {
  int count, vectors;
  std::vector<Piece> pieces;
  int64_t query[TILE];           // index of the query in its row
  int head[TILE];                // index of the head in its group
  alignas(64) C position[TILE];  // own position of the query
  alignas(64) C slope[TILE];     // ALiBi slope
  int64_t lowest, highest;       // own positions

  void set(const Params& p, const RowOrder& order, const Tile& tile, int64_t kv_head) {
    const int group = int(p.H / p.Hk);
    count = tile.lanes;
    vectors = (count + LANES<C> - 1) / LANES<C>;
    pieces.clear();
    lowest = std::numeric_limits<int64_t>::max(), highest = std::numeric_limits<int64_t>::min();
    int64_t at = tile.position;
    for (int l = 0; l < vectors * LANES<C>; ++l) {
      if (l >= count) {
        position[l] = slope[l] = 0, head[l] = 0, query[l] = 0;
        continue;
      }
      const int64_t lane = tile.first + l;
      while (order.start[at + 1] <= lane) ++at;
      const Row& row = p.rows[order.row[at]];
      if (pieces.empty() || pieces.back().row != &row) pieces.push_back({&row, l, l});
      pieces.back().end = l + 1;
      const int64_t in_row = lane - order.start[at];
      query[l] = in_row / group;
      head[l] = int(in_row % group);
      const int64_t own = query[l] + row.offset;
      lowest = std::min(lowest, own), highest = std::max(highest, own);
      position[l] = C(own);
      slope[l] = p.alibi ? static_cast<const C*>(p.alibi)[kv_head * group + head[l]] : C(0);
    }
  }

  int64_t prefix() const { return pieces[0].row->prefix; }
  int64_t prefix_len() const { return pieces[0].row->prefix_len; }

  // Offset in elements of the D values of lane l in a tensor laid out as q.
  int64_t offset(const Tensor4& t, int64_t kv_head, const Params& p, int l, const Row& row) const {
    return row.batch * t.batch + (kv_head * (p.H / p.Hk) + head[l]) * t.head + (row.token + query[l]) * t.token;
  }

  template <typename F>
  void each(F f) const {  // f(lane, row)
    for (const Piece& piece : pieces)
      for (int l = piece.begin; l < piece.end; ++l) f(l, *piece.row);
  }
};

// Loads the lanes of a tensor laid out as q as rows [TILE][padded], zero where there is nothing.
template <typename C>
void load_lanes(const Params& p, const Tensor4& t, int64_t kv_head, const Lanes<C>& lanes, C* rows, int64_t padded) {
  lanes.each([&](int l, const Row& row) {
    load_row(rows + l * padded, t, lanes.offset(t, kv_head, p, l, row), p.D, t.type);
    std::fill(rows + l * padded + p.D, rows + (l + 1) * padded, C(0));
  });
  std::fill(rows + lanes.count * padded, rows + lanes.vectors * LANES<C> * padded, C(0));
}

// Keys as rows in memory: key j is at base + j * stride.
template <typename C>
struct KeyRows {
  const C* base = nullptr;
  int64_t stride = 0;
};

// Keys [begin, end) of one head, in place where they already have the compute type, else converted into `scratch`.
template <typename C>
KeyRows<C> key_rows(const Tensor4& t, int64_t offset, int64_t begin, int64_t end, int64_t D, Type rounding,
                    C* scratch) {
  const bool in_place = t.type == (sizeof(C) == 8 ? Type::f64 : Type::f32) && (rounding == t.type);
  if (in_place) return {static_cast<const C*>(t.data) + offset, t.token};
  for (int64_t j = begin; j < end; ++j) load_row(scratch + (j - begin) * D, t, offset + j * t.token, D, rounding);
  return {scratch - begin * D, D};
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

// Visibility of context positions [begin, begin + count) of one row, one byte each.
inline void context_bits(const ContextRule& rule, const ContextRow& row, int64_t begin, int count, uint8_t* visible) {
  if (!rule.drop_below && !row.keep) {
    std::memset(visible, 1, count);
    const int64_t from = std::max(row.hidden_start, begin);
    const int64_t to = std::min({row.hidden_end, rule.length, begin + count});
    if (from < to) std::memset(visible + (from - begin), 0, to - from);
    return;
  }
  for (int64_t quad = begin >> 2; quad * 4 < begin + count; ++quad) {
    const unsigned bits = visible_quad(rule, row, quad);
    for (int j = 0; j < 4; ++j) {
      const int64_t c = quad * 4 + j - begin;
      if (c >= 0 && c < count) visible[c] = (bits >> j) & 1;
    }
  }
}

// Prefix keys [begin, end), end - begin <= KEY_BLOCK, for a tile. False: no lane sees any of them.
template <typename C>
bool prefix_block(const Params& p, const Lanes<C>& lanes, int64_t begin, int64_t end, KeyBlock* block) {
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
  int kept = 0;
  uint8_t any[KEY_BLOCK];
  if (lanes.pieces.size() == 1) {
    context_bits(p.rule, lanes.pieces[0].row->context, begin, count, any);
    for (int j = 0; j < count; ++j) block->index[kept] = begin + j, kept += any[j];
  } else {
    uint8_t seen[TILE][KEY_BLOCK];  // a tile holds at most one row per lane
    std::memset(any, 0, count);
    for (size_t i = 0; i < lanes.pieces.size(); ++i) {
      context_bits(p.rule, lanes.pieces[i].row->context, begin, count, seen[i]);
      for (int j = 0; j < count; ++j) any[j] |= seen[i][j];
    }
    for (int j = 0; j < count; ++j) {
      if (!any[j]) continue;
      for (size_t i = 0; i < lanes.pieces.size(); ++i)
        if (!seen[i][j]) block->holes.push_back({kept, lanes.pieces[i].begin, lanes.pieces[i].end});
      block->index[kept++] = begin + j;
    }
  }
  block->count = kept;
  return kept > 0;
}

// Own keys of one row of the tile, [begin, end) among the row's, end - begin <= KEY_BLOCK.
template <typename C>
bool own_block(const Params& p, const Lanes<C>& lanes, const Piece& piece, int64_t begin, int64_t end,
               KeyBlock* block) {
  const int64_t low = piece.row->offset + lanes.query[piece.begin];
  const int64_t high = piece.row->offset + lanes.query[piece.end - 1];
  block->holes.clear();
  block->first_vector = piece.begin / LANES<C>, block->last_vector = (piece.end - 1) / LANES<C> + 1;
  block->begin = piece.begin, block->end = piece.end;
  block->limits = false;
  if (p.causal) {
    end = std::min(end, high + 1);
    block->limits = end - 1 > low;
  }
  if (p.window) {
    begin = std::max(begin, low - p.window + 1);
    block->limits = block->limits || begin <= high - p.window;
  }
  if (begin >= end) return false;
  int kept = 0;
  if (p.rule.length > p.P) {
    uint8_t visible[KEY_BLOCK];
    context_bits(p.rule, piece.row->context, p.P + begin, int(end - begin), visible);
    for (int64_t j = begin; j < end; ++j) block->index[kept] = j, kept += visible[j - begin];
  } else {
    for (int64_t j = begin; j < end; ++j) block->index[kept++] = j;
  }
  block->count = kept;
  return kept > 0;
}
