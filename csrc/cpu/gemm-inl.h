// Register-blocked matrix products. Both take one operand through row pointers, so that keys are read where they lie,
// visible ones only, and never packed; k counts units (operands-inl.h):
//
//   times_rows   C[r][:] (+)= sum_k a[r][k] * b[k][:]      a: row pointers, k along the row    (logits, dp, dk, dv)
//   times_cols   C[r][:]   =  factor * C[r][:] + sum_k a[k][r] * b[k][:]   a: row pointers, one per k   (out, dq)
//
// Vectors run along b's rows; a is broadcast. A block of R x NV accumulators stays in registers for the whole sum.

#if CTK_VECTOR_BYTES == 64  // 32 registers
constexpr int MAX_NV = 4;
constexpr int BLOCK_ROWS[MAX_NV + 1] = {0, 8, 12, 8, 6};
#else  // 16 registers
constexpr int MAX_NV = 2;
constexpr int BLOCK_ROWS[MAX_NV + 1] = {0, 8, 6};
#endif

template <typename U, int R, int NV>
CTK_INLINE void rows_block(const U* const* a, int64_t K, const U* b, int64_t ldb, C_of<U>* const* c, int64_t at,
                           bool add) {
  using C = C_of<U>;
  Vec<C> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<C>{};
  const U* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) rows[r] = a[r];
  for (int64_t k = 0; k < K; ++k, b += ldb) {
    typename Operand<U>::Vector bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = Operand<U>::vector_at(b + v * VECTOR_SIZE<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = Operand<U>::multiply_add(rows[r] + k, bv[v], acc[r][v]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      C* dst = c[r] + at + v * VECTOR_SIZE<C>;
      store(dst, add ? load(dst) + acc[r][v] : acc[r][v]);
    }
}

template <typename U, int R, int NV>
CTK_INLINE void cols_block(const U* const* a, int64_t K, int64_t row, const U* b, int64_t ldb, C_of<U>* c, int64_t ldc,
                           const C_of<U>* factor, const C_of<U>* keep) {
  using C = C_of<U>;
  Vec<C> acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<C>{};
  for (int64_t k = 0; k < K; ++k, b += ldb) {
    const U* ar = a[k] + row;
    typename Operand<U>::Vector bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = Operand<U>::vector_at(b + v * VECTOR_SIZE<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = Operand<U>::multiply_add(ar + r, bv[v], acc[r][v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    // lanes of other rows must not catch a NaN from this row's values, hence a mask of bits and not a factor 0
    const Ints<C> bits = (Ints<C>)load(keep + v * VECTOR_SIZE<C>);
    const Vec<C> f = load(factor + v * VECTOR_SIZE<C>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      C* dst = c + r * ldc + v * VECTOR_SIZE<C>;
      store(dst, load(dst) * f + (Vec<C>)((Ints<C>)acc[r][v] & bits));
    }
  }
}

// Prefetches a row of K units.
template <typename U>
CTK_INLINE void fetch_row(const U* row, int64_t K) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < K * int64_t(sizeof(U)); i += 64) __builtin_prefetch(p + i, 0, 2);
}

// The last rows of a product need fewer accumulators: one instance per count, so that no work is padded.
template <typename U, int NV, int R>
CTK_NOINLINE void rows_tail(int64_t n, const U* const* a, int64_t K, const U* b, int64_t ldb, C_of<U>* const* c,
                            int64_t at, bool add) {
  if constexpr (R > 0) {
    if (n == R) return rows_block<U, R, NV>(a, K, b, ldb, c, at, add);
    rows_tail<U, NV, R - 1>(n, a, K, b, ldb, c, at, add);
  }
}

template <typename U, int NV, int R>
CTK_NOINLINE void cols_tail(int64_t n, const U* const* a, int64_t K, int64_t row, const U* b, int64_t ldb, C_of<U>* c,
                            int64_t ldc, const C_of<U>* factor, const C_of<U>* keep) {
  if constexpr (R > 0) {
    if (n == R) return cols_block<U, R, NV>(a, K, row, b, ldb, c, ldc, factor, keep);
    cols_tail<U, NV, R - 1>(n, a, K, row, b, ldb, c, ldc, factor, keep);
  }
}

template <typename U, int NV>
CTK_NOINLINE void rows_panel(int64_t n, const U* const* a, int64_t K, const U* b, int64_t ldb, C_of<U>* const* c,
                             int64_t at, bool add, const U* const* ahead) {
  constexpr int R = BLOCK_ROWS[NV];
  int64_t r = 0;
  for (; r + R <= n; r += R) {
    if (ahead)
      for (int i = 0; i < R; ++i) {
        fetch_row(ahead[r + i], K);
        fetch_row(a[std::min(r + 2 * R + i, n - 1)], K);
      }
    rows_block<U, R, NV>(a + r, K, b, ldb, c + r, at, add);
  }
  if (r < n) rows_tail<U, NV, R - 1>(n - r, a + r, K, b, ldb, c + r, at, add);
}

template <typename U, int NV>
CTK_NOINLINE void cols_panel(int64_t n, const U* const* a, int64_t K, const U* b, int64_t ldb, C_of<U>* c, int64_t ldc,
                             const C_of<U>* factor, const C_of<U>* keep) {
  constexpr int R = BLOCK_ROWS[NV];
  int64_t r = 0;
  for (; r + R <= n; r += R) cols_block<U, R, NV>(a, K, r, b, ldb, c + r * ldc, ldc, factor, keep);
  if (r < n) cols_tail<U, NV, R - 1>(n - r, a, K, r, b, ldb, c + r * ldc, ldc, factor, keep);
}

// Splits `vectors` into panels of at most `most` vectors, as even as can be, and calls f(panel width, first vector).
template <typename F>
CTK_INLINE void for_panels(int vectors, int most, F f) {
  int left = (vectors + most - 1) / most;
  for (int v = 0; v < vectors; --left) {
    const int width = (vectors - v + left - 1) / left;
    f(width, v);
    v += width;
  }
}

// C rows c[0..n) (+)= a[0..n)[0..K) x b[0..K)[vectors]; meanwhile rows `ahead` are prefetched for what follows. Lane
// panels are at most 3 wide, so that 8 keys fit beside them.
template <typename U>
void times_rows(int64_t n, const U* const* a, int64_t K, const U* b, int64_t ldb, C_of<U>* const* c, int vectors,
                int most, bool add, const U* const* ahead = nullptr) {
  for_panels(vectors, std::min(most, MAX_NV), [&](int width, int first) {
    const int64_t at = int64_t(first) * VECTOR_SIZE<C_of<U>>;
    switch (width) {
      case 1: return rows_panel<U, 1>(n, a, K, b + at, ldb, c, at, add, first ? nullptr : ahead);
      case 2: return rows_panel<U, 2>(n, a, K, b + at, ldb, c, at, add, first ? nullptr : ahead);
#if CTK_VECTOR_BYTES == 64
      case 3: return rows_panel<U, 3>(n, a, K, b + at, ldb, c, at, add, first ? nullptr : ahead);
      case 4: return rows_panel<U, 4>(n, a, K, b + at, ldb, c, at, add, first ? nullptr : ahead);
#endif
    }
  });
}

// C rows c[0..n) = a[0..n)[0..K) x b[0..K)[vectors], n <= KEY_BLOCK, for products along a head dimension: a sum of more
// than LONG_SUM products is the sum of two, since its roundings grow with its length.
constexpr int64_t LONG_SUM = 256;

template <typename U>
void times_heads(int64_t n, const U* const* a, int64_t K, const U* b, C_of<U>* const* c, int vectors,
                 const U* const* ahead = nullptr) {
  times_rows<U>(n, a, std::min(K, LONG_SUM), b, TILE, c, vectors, 3, false, ahead);
  if (K <= LONG_SUM) return;
  const U* rest[KEY_BLOCK];
  for (int64_t r = 0; r < n; ++r) rest[r] = a[r] + LONG_SUM;
  times_rows<U>(n, rest, K - LONG_SUM, b + LONG_SUM * TILE, TILE, c, vectors, 3, true);
}

// C[0..n)[vectors] = factor * C + sum over k of a[k][0..n) x b[k][vectors], products masked by the bits of `keep`.
template <typename U>
void times_cols(int64_t n, const U* const* a, int64_t K, const U* b, int64_t ldb, C_of<U>* c, int64_t ldc, int vectors,
                const C_of<U>* factor, const C_of<U>* keep) {
  for_panels(vectors, std::min(3, MAX_NV), [&](int width, int first) {
    const int64_t at = int64_t(first) * VECTOR_SIZE<C_of<U>>;
    switch (width) {
      case 1: return cols_panel<U, 1>(n, a, K, b + at, ldb, c + at, ldc, factor + at, keep + at);
      case 2: return cols_panel<U, 2>(n, a, K, b + at, ldb, c + at, ldc, factor + at, keep + at);
#if CTK_VECTOR_BYTES == 64
      case 3: return cols_panel<U, 3>(n, a, K, b + at, ldb, c + at, ldc, factor + at, keep + at);
#endif
    }
  });
}
