// Operands of the matrix products, as units: numbers of the compute type, or, where the CPU multiplies bf16 itself
// (AVX512-BF16), pairs of bf16, of which one instruction adds both products to a float. Pairs lie along the dimension
// that is summed, so that operands are paired along
//
//   D          for  s = k q, dp = v dout        the pairs that memory has anyway
//   keys       for  out = v^T p, dq = k^T ds    to_pairs, key_columns
//   lanes      for  dv = p dout, dk = ds q      to_pairs, lane_pairs
//
// With numbers these steps copy nothing.

// Matrix units (amx-inl.h) take all keys of a block from the first to the last, whole tiles of them.
#ifdef CTK_AMX
constexpr bool FIXED_KEYS = true;
constexpr int TILE = 64;  // lanes of a tile (tiles-inl.h)
#else
constexpr bool FIXED_KEYS = false;
constexpr int TILE = 48;  // 3 AVX-512 vectors of float
struct TileRegisters {};
#endif
constexpr int STEP = 32;        // keys, elements of a head dimension or lanes that a matrix unit sums at once
constexpr int KEY_BLOCK = 128;  // keys per block: their logits for one tile stay in the first-level cache

template <typename U>
struct Operand {
  using C = U;        // type of the sums
  using Element = U;  // what memory holds
  using Vector = Vec<U>;
  static constexpr int WIDTH = 1;  // elements of a unit
  static constexpr Type TYPE = sizeof(U) == 8 ? Type::f64 : Type::f32;

  static CTK_INLINE Vector vector_at(const U* p) { return load(p); }
  static CTK_INLINE Vec<C> multiply_add(const U* a, Vector b, Vec<C> sum) { return sum + *a * b; }
  static CTK_INLINE Vec<C> multiply_add(Vector a, Vector b, Vec<C> sum) { return sum + a * b; }
  static CTK_INLINE Vec<C> values_at(const U* row, int64_t element) { return load(row + element); }
};

template <typename U>
using C_of = typename Operand<U>::C;
template <typename U>
using Element = typename Operand<U>::Element;
template <typename U>
constexpr int WIDTH = Operand<U>::WIDTH;

template <typename U>
constexpr int64_t units_of(int64_t elements) {
  return (elements + WIDTH<U> - 1) / WIDTH<U>;
}

#ifdef CTK_BF16
struct __attribute__((packed, aligned(2), may_alias)) Bf16Pair {  // read where it lies
  uint32_t bits;
};

template <>
struct Operand<Bf16Pair> {
  using C = float;
  using Element = uint16_t;
  using Vector = __m512bh;
  static constexpr int WIDTH = 2;
  static constexpr Type TYPE = Type::bf16;

  static CTK_INLINE Vector vector_at(const Bf16Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static CTK_INLINE Vec<float> multiply_add(const Bf16Pair* a, Vector b, Vec<float> sum) {
    return multiply_add((__m512bh)_mm512_set1_epi32(int(a->bits)), b, sum);
  }
  static CTK_INLINE Vec<float> multiply_add(Vector a, Vector b, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
  static CTK_INLINE Vec<float> values_at(const Bf16Pair* row, int64_t element) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + element / 2));
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
};

// out[i] <- (a[i], b[i]), n of them.
CTK_INLINE void interleave(const uint16_t* a, const uint16_t* b, int64_t n, Bf16Pair* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)));
    _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  for (; i < n; ++i) out[i].bits = uint32_t(a[i]) | uint32_t(b[i]) << 16;
}
#endif

// Whether n elements are finite: no exponent is all ones. Without branches, so that compilers make vectors of it.
CTK_INLINE bool all_finite(const float* x, int64_t n) {
  uint32_t broken = 0;
  for (int64_t i = 0; i < n; ++i) broken |= (float_to_bits(x[i]) & 0x7F800000u) == 0x7F800000u;
  return !broken;
}

CTK_INLINE bool all_finite(const double* x, int64_t n) {
  uint64_t broken = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    broken |= (bits & 0x7FF0000000000000u) == 0x7FF0000000000000u;
  }
  return !broken;
}

CTK_INLINE bool all_finite(const uint16_t* x, int64_t n) {  // bf16
  uint16_t broken = 0;
  for (int64_t i = 0; i < n; ++i) broken |= (x[i] & 0x7F80u) == 0x7F80u;
  return !broken;
}

// In place of a row that is not finite, so that a weight of 0 leaves nothing of it.
template <typename U>
const U* zero_row() {
  static constexpr Element<U> zeros[MAX_HEAD_DIM] = {};
  return reinterpret_cast<const U*>(zeros);
}

// An element in the compute type.
CTK_INLINE float value_of(float x) { return x; }
CTK_INLINE double value_of(double x) { return x; }
CTK_INLINE float value_of(uint16_t x) { return from_bf16(x); }

#ifdef CTK_BF16
// Two vectors as bf16, one after the other.
CTK_INLINE __m512i halves_of(Vec<float> first, Vec<float> second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// out[i] <- (first[i], second[i]) of what halves_of gives.
CTK_INLINE void store_pairs(__m512i halves, Bf16Pair* out) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, halves));
}

CTK_INLINE void store_halves(__m512i halves, Bf16Pair* first, Bf16Pair* second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(halves, 1));
}
#endif

// Fills rows of pairs of n keys, [units(n)][TILE], up to whole tiles of matrix units with zeros.
template <typename U>
CTK_INLINE void fill_keys(U* rows, int n) {
  const int64_t pairs = units_of<U>(n);
  if constexpr (FIXED_KEYS) std::memset(rows + pairs * TILE, 0, (round_up(pairs, 16) - pairs) * TILE * sizeof(U));
}

// A block x [n][TILE] as rows that are summed along lanes, [n][TILE / WIDTH], and as rows that are summed along keys,
// [units(n)][TILE], filled, if `keys` is given. Numbers are both as they are. There is room for one more key; for
// matrix units rows of lanes are filled, too.
template <typename U>
CTK_INLINE void to_pairs(const C_of<U>* x, int n, int vectors, U* lanes, U* keys) {
  if constexpr (WIDTH<U> > 1) {
    using C = C_of<U>;
    constexpr int ROW = TILE / WIDTH<U>;
    for (int i = 0; i < n; i += 2)
      for (int v = 0; v < vectors; ++v) {
        const C* at = x + i * TILE + v * VECTOR_SIZE<C>;
        const auto halves = halves_of(load(at), i + 1 < n ? load(at + TILE) : Vec<C>{});
        U* row = lanes + i * ROW + v * VECTOR_SIZE<C> / WIDTH<U>;
        store_halves(halves, row, row + ROW);
        if (keys) store_pairs(halves, keys + i / 2 * TILE + v * VECTOR_SIZE<C>);
      }
    if (keys) fill_keys(keys, n);
    if constexpr (FIXED_KEYS) {
      constexpr int HALF = VECTOR_SIZE<C> / WIDTH<U>;
      for (int i = 0; vectors % 2 && i < n; ++i) std::memset(lanes + i * ROW + vectors * HALF, 0, HALF * sizeof(U));
      std::memset(lanes + n * ROW, 0, (round_up(n, 16) - n) * ROW * sizeof(U));
    }
  }
}

// Rows of n keys as rows that are summed along keys: pointers to units(n) rows of D units, at `scratch` or in place.
template <typename U>
CTK_INLINE void key_columns(const U* const* rows, int n, int64_t D, U* scratch, const U** out) {
  if constexpr (WIDTH<U> == 1) std::copy_n(rows, n, out);
#ifdef CTK_BF16
  else {
    for (int i = 0; i < n; i += 2) {
      const uint16_t* second = reinterpret_cast<const uint16_t*>(i + 1 < n ? rows[i + 1] : zero_row<U>());
      interleave(reinterpret_cast<const uint16_t*>(rows[i]), second, D, scratch + i / 2 * D);
      out[i / 2] = scratch + i / 2 * D;
    }
  }
#endif
}

// Rows of lanes [lanes][stride] as rows that are summed along lanes, [lanes / WIDTH][n]; numbers stay where they are.
template <typename U>
CTK_INLINE void lane_pairs(const Element<U>* rows, int64_t stride, int lanes, int64_t n, U* out) {
#ifdef CTK_BF16
  if constexpr (WIDTH<U> == 2)
    for (int l = 0; l < lanes; l += 2) interleave(rows + l * stride, rows + (l + 1) * stride, n, out + l / 2 * n);
#endif
}
