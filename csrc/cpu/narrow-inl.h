// The two products of the forward pass for a tile of a few lanes of one row, as in decoding, where most of a vector of
// lanes would be padding and reading keys is what takes the time: here vectors run along D.

template <typename C>
constexpr int NARROW = std::min(4, VECTOR_SIZE<C>);  // lanes; with more the products of gemm-inl.h are faster

template <typename U>
bool is_narrow(const TileLanes<C_of<U>>& lanes, int64_t D) {
  return lanes.count <= NARROW<C_of<U>> && lanes.pieces.size() == 1 && D % (VECTOR_SIZE<C_of<U>> * WIDTH<U>) == 0;
}

// s[n][l] <- <key n, q l>, the rest of a vector <- 0. q [units][TILE], s [count][TILE]; rows `ahead` are prefetched.
template <typename U, int L>
CTK_NOINLINE void narrow_logits(int count, const U* const* keys, int64_t depth, const U* q, C_of<U>* s,
                                const U* const* ahead) {
  using C = C_of<U>;
  alignas(64) U rows[L][MAX_HEAD_DIM];
  for (int64_t d = 0; d < depth; ++d)
    for (int l = 0; l < L; ++l) rows[l][d] = q[d * TILE + l];
  constexpr int KEYS = 4;
  for (int first = 0; first < count; first += KEYS) {
    const U* key[KEYS];
    for (int i = 0; i < KEYS; ++i) {
      key[i] = keys[std::min(first + i, count - 1)];
      fetch_row(keys[std::min(first + 4 * KEYS + i, count - 1)], depth);
      fetch_row(ahead[std::min(first + i, count - 1)], depth);
    }
    Vec<C> sums[KEYS][L] = {};
    for (int64_t d = 0; d < depth; d += VECTOR_SIZE<C>)
#pragma GCC unroll 4
      for (int i = 0; i < KEYS; ++i) {
        const typename Operand<U>::Vector k = Operand<U>::vector_at(key[i] + d);
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l)
          sums[i][l] = Operand<U>::multiply_add(Operand<U>::vector_at(rows[l] + d), k, sums[i][l]);
      }
    for (int i = 0; i < KEYS && first + i < count; ++i) {
      alignas(64) C line[VECTOR_SIZE<C>] = {};
      for (int l = 0; l < L; ++l) line[l] = sum_of<C>(sums[i][l]);
      store(s + (first + i) * TILE, load(line));
    }
  }
}

// o[d][l] <- factor[l] o[d][l] + sum over keys of p[n][l] value n[d]. p [count][TILE], o [D][TILE], D of the values.
template <typename U, int L>
CTK_NOINLINE void narrow_sums(int count, const U* const* values, int64_t D, const C_of<U>* p, const C_of<U>* factor,
                              C_of<U>* o) {
  using C = C_of<U>;
  constexpr int VECTORS = 4;
  for (int64_t at = 0; at < D; at += VECTORS * VECTOR_SIZE<C>) {
    const int vectors = int(std::min<int64_t>(VECTORS, (D - at) / VECTOR_SIZE<C>));
    Vec<C> sums[L][VECTORS] = {};
    for (int n = 0; n < count; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        if (v >= vectors) break;
        const Vec<C> value = Operand<U>::values_at(values[n], at + v * VECTOR_SIZE<C>);
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) sums[l][v] += p[n * TILE + l] * value;
      }
    for (int l = 0; l < L; ++l)
      for (int v = 0; v < vectors; ++v)
        for (int i = 0; i < VECTOR_SIZE<C>; ++i) {
          C* to = o + (at + v * VECTOR_SIZE<C> + i) * TILE + l;
          *to = *to * factor[l] + sums[l][v][i];
        }
  }
}

// f(std::integral_constant<int, lanes>) for 1 <= lanes <= NARROW.
template <typename C, int L = NARROW<C>, typename F>
CTK_INLINE void with_lanes(int lanes, F f) {
  if constexpr (L > 1)
    if (lanes < L) return with_lanes<C, L - 1>(lanes, f);
  f(std::integral_constant<int, L>());
}
