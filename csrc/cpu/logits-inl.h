// From products <q, k> to masked logits, in place on a block [key][lane] of a tile. Forward and backward share it.

template <typename C>
struct Logits {
  const Params& p;
  int64_t kv_head;
  bool plain;     // logit = scale * product, scale > 0: then the factor waits for the exponential
  C coefficient;  // logits in base 2 = coefficient * what `apply` leaves

  Logits(const Params& params, int64_t head)
      : p(params),
        kv_head(head),
        plain(params.scale > 0 && !params.softcap && !params.bias && !params.alibi),
        coefficient(plain ? C(params.scale * LOG2E) : C(1)) {}

  // slope_out (where the softcap is on): d logit / d (scale * product) per element, for the backward pass.
  void apply(const TileLanes<C>& lanes, const KeyBlock& block, bool own, C* s, C* slope_out) const {
    if (!plain) transform(lanes, block, own, s, slope_out);
    hide(lanes, block, own, s);
  }

  // Writes -inf where a lane does not see a key.
  void hide(const TileLanes<C>& lanes, const KeyBlock& block, bool own, C* s) const {
    if (block.limits) limit(lanes, block, own, s);
    const C hidden = -std::numeric_limits<C>::infinity();
    for (const KeyBlock::Hole& hole : block.holes)
      for (int l = hole.begin; l < hole.end; ++l) s[hole.key * TILE + l] = hidden;
    for (int l = block.first_vector * VECTOR_SIZE<C>; l < block.begin; ++l)
      for (int n = 0; n < block.count; ++n) s[n * TILE + l] = hidden;
    // lanes past the last are padding, which nothing reads
    for (int l = block.end; l < std::min(block.last_vector * VECTOR_SIZE<C>, lanes.count); ++l)
      for (int n = 0; n < block.count; ++n) s[n * TILE + l] = hidden;
  }

 private:
  // How far lane l is behind the block's first key. Positions are subtracted as integers: C could not tell neighbours
  // apart beyond 2^24.
  int64_t distance(const TileLanes<C>& lanes, const KeyBlock& block, bool own, int l) const {
    return lanes.position[l] + (own ? 0 : lanes.prefix_len()) - block.index[0];
  }

  void transform(const TileLanes<C>& lanes, const KeyBlock& block, bool own, C* s, C* slope_out) const {
    const int group = int(p.H / p.Hk);
    alignas(64) C bias[TILE] = {}, behind[TILE] = {};
    for (int l = 0; p.alibi && l < lanes.count; ++l) behind[l] = C(distance(lanes, block, own, l));
    for (int n = 0; n < block.count; ++n) {
      const int64_t j = block.index[n];
      if (p.bias && !own) {
        const C* at = static_cast<const C*>(p.bias) + lanes.prefix() * p.bias_prefix + j;
        for (int l = 0; l < lanes.count; ++l) bias[l] = at[(kv_head * group + lanes.head[l]) * p.bias_head];
      }
      for (int v = block.first_vector; v < block.last_vector; ++v) {
        const int at = v * VECTOR_SIZE<C>;
        Vec<C> x = load(s + n * TILE + at) * C(p.scale);
        if (p.softcap) {
          const Vec<C> t = tanh_of(x * C(1 / p.softcap));
          x = t * C(p.softcap);
          if (slope_out) store(slope_out + n * TILE + at, C(1) - t * t);
        }
        // distances count along [prefix | own keys]
        x += load(bias + at) - load(lanes.slope + at) * (load(behind + at) - C(j - block.index[0]));
        store(s + n * TILE + at, x * C(LOG2E));
      }
    }
  }

  void limit(const TileLanes<C>& lanes, const KeyBlock& block, bool own, C* s) const {
    const Vec<C> hidden = splat(-std::numeric_limits<C>::infinity());
    const bool causal = own && p.causal, windowed = p.window && (own || p.window_prefix);
    // of the block's keys, counted from its first, a lane sees those after `before` and up to `last`
    const auto clip = [](int64_t key) { return C(std::clamp<int64_t>(key, -1, KEY_BLOCK)); };
    alignas(64) C before[TILE], last[TILE];
    for (int l = 0; l < lanes.vectors * VECTOR_SIZE<C>; ++l) {
      const int64_t behind = distance(lanes, block, own, l);
      last[l] = clip(causal ? behind : KEY_BLOCK);
      before[l] = clip(windowed ? behind - p.window : -1);
    }
    for (int v = block.first_vector; v < block.last_vector; ++v) {
      const int at = v * VECTOR_SIZE<C>;
      const Vec<C> after = load(before + at), end = load(last + at);
      for (int n = 0; n < block.count; ++n) {
        const Vec<C> j = splat(C(block.index[n] - block.index[0]));
        Vec<C> x = load(s + n * TILE + at);
        x = j > end ? hidden : x;
        store(s + n * TILE + at, j > after ? x : hidden);
      }
    }
  }
};
