// Operands of the matrix products, as units: numbers of the compute type, or, where the CPU multiplies bf16 itself
// (AVX512-BF16), pairs of bf16, of which one instruction adds both products to a float. Pairs lie along the dimension
// that is summed, so that operands are paired along
//
//   D          for  s = k q, dp = v dout        the pairs that memory has anyway
//   keys       for  out = v^T p, dq = k^T ds    by_key, key_columns
//   lanes      for  dv = p dout, dk = ds q      by_lane, lane_pairs
//
// With numbers these steps copy nothing.

constexpr int TILE = 48;        // lanes of a tile (tiles-inl.h): 3 AVX-512 vectors of float
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

// A block x [n][TILE] as rows that are summed along lanes: [n][TILE / WIDTH]. `out` may be used to hold them.
template <typename U>
CTK_INLINE const U* by_lane(const C_of<U>* x, int n, int vectors, U* out) {
  if constexpr (WIDTH<U> == 1) return x;
#ifdef CTK_BF16
  else {
    for (int i = 0; i < n; ++i)
      for (int v = 0; v < vectors; ++v) {
        const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i * TILE + v * 16));
        std::memcpy(out + i * (TILE / 2) + v * 8, &half, sizeof half);
      }
    return out;
  }
#endif
}

// A block x [n][TILE] as rows that are summed along keys: [units(n)][TILE], vectors [first, last) of each.
template <typename U>
CTK_INLINE const U* by_key(const C_of<U>* x, int n, int first, int last, U* out) {
  if constexpr (WIDTH<U> == 1) return x;
#ifdef CTK_BF16
  else {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < n; i += 2)
      for (int v = first; v < last; ++v) {
        const __m512 low = _mm512_loadu_ps(x + i * TILE + v * 16);
        const __m512 high = i + 1 < n ? _mm512_loadu_ps(x + (i + 1) * TILE + v * 16) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(out + i / 2 * TILE + v * 16, _mm512_permutexvar_epi16(order, both));
      }
    return out;
  }
#endif
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
