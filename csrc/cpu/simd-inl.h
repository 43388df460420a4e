// Vectors of the compute type (GCC/Clang vector extensions), exp2 and tanh on them, and 16-bit storage types.
// CTK_VECTOR_BYTES is set by the including kernel file.

template <typename C>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(CTK_VECTOR_BYTES)));
  typedef int32_t ints __attribute__((vector_size(CTK_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(CTK_VECTOR_BYTES)));
  typedef int64_t ints __attribute__((vector_size(CTK_VECTOR_BYTES)));
};
template <typename C>
using Vec = typename VectorOf<C>::type;
template <typename C>
using Ints = typename VectorOf<C>::ints;  // as wide as C, element by element

template <typename C>
constexpr int VECTOR_SIZE = CTK_VECTOR_BYTES / int(sizeof(C));

template <typename C>
CTK_INLINE Vec<C> load(const C* p) {
  Vec<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename C>
CTK_INLINE void store(C* p, Vec<C> v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename C>
CTK_INLINE Vec<C> splat(C x) {
  return Vec<C>{} + x;
}

template <typename C>
CTK_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

// Whether a comparison holds for any element.
template <typename C>
CTK_INLINE bool any_of(Ints<C> mask) {
  uint64_t words[CTK_VECTOR_BYTES / 8], any = 0;
  std::memcpy(words, &mask, sizeof words);
  for (uint64_t word : words) any |= word;
  return any;
}

// The sum of a vector's elements, in halves.
template <typename C, int N, int... J>
CTK_INLINE Vec<C> add_half(Vec<C> v, std::integer_sequence<int, J...>) {
  return v + __builtin_shufflevector(v, v, (J ^ N)...);
}

template <typename C, int N = VECTOR_SIZE<C> / 2>
CTK_INLINE C sum_of(Vec<C> v) {
  if constexpr (N == 0) return v[0];
  else return sum_of<C, N / 2>(add_half<C, N>(v, std::make_integer_sequence<int, VECTOR_SIZE<C>>{}));
}

// One step of a transpose in registers: exchange the elements of a whose index has bit S with those of b that lack it.
template <typename C, int S, int... J>
CTK_INLINE void exchange(Vec<C>* a, Vec<C>* b, std::integer_sequence<int, J...>) {
  const Vec<C> x = *a, y = *b;
  *a = __builtin_shufflevector(x, y, ((J & S) ? VECTOR_SIZE<C> + (J ^ S) : J)...);
  *b = __builtin_shufflevector(x, y, ((J & S) ? VECTOR_SIZE<C> + J : (J ^ S))...);
}

template <typename C, int S = 1>
CTK_INLINE void transpose_square(Vec<C> (&v)[VECTOR_SIZE<C>]) {
  if constexpr (S < VECTOR_SIZE<C>) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR_SIZE<C>; ++i)
      if (!(i & S)) exchange<C, S>(&v[i], &v[i | S], std::make_integer_sequence<int, VECTOR_SIZE<C>>{});
    transpose_square<C, S * 2>(v);
  }
}

// dst[j][i] = src[i][j] for i < rows, j < cols, both multiples of VECTOR_SIZE.
template <typename C>
void transpose(const C* src, int64_t src_stride, C* dst, int64_t dst_stride, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += VECTOR_SIZE<C>)
    for (int64_t j = 0; j < cols; j += VECTOR_SIZE<C>) {
      Vec<C> v[VECTOR_SIZE<C>];
#pragma GCC unroll 16
      for (int r = 0; r < VECTOR_SIZE<C>; ++r) v[r] = load(src + (i + r) * src_stride + j);
      transpose_square<C>(v);
#pragma GCC unroll 16
      for (int r = 0; r < VECTOR_SIZE<C>; ++r) store(dst + (j + r) * dst_stride + i, v[r]);
    }
}

// The value of a polynomial at x, by Horner's rule: its coefficients from the highest power down.
template <typename... Rest>
CTK_INLINE Vec<float> polynomial(Vec<float> x, float first, Rest... rest) {
  Vec<float> y = splat(first);
  ((y = y * x + rest), ...);
  return y;
}

// 2^x. float: x = n + f with integer n, degree-6 minimax polynomial for 2^f (relative error 1.9e-9 before rounding);
// far enough below the smallest float the result is 0. NaN stays NaN.
CTK_INLINE Vec<float> exp2_of(Vec<float> x) {
#if CTK_VECTOR_BYTES == 64
  // 0 <= f < 1, the way in which the last step takes n from x
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec<float> y = polynomial(f, 2.17022552118e-4f, 1.24396878998e-3f, 9.67884098821e-3f, 5.54833419885e-2f,
                                  2.40229836273e-1f, 6.93146983841e-1f, 1.00000000186f);
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -127.0f ? splat(-127.0f) : x;
  x = x > 127.0f ? splat(127.0f) : x;
  const Vec<float> shifted = x + magic, f = x - (shifted - magic);  // |f| <= 1/2
  const Vec<float> y = polynomial(f, 1.53458121613e-4f, 1.33999311772e-3f, 9.61848895633e-3f, 5.55032877711e-2f,
                                  2.40226468906e-1f, 6.93147205737e-1f, 1.00000000055f);
  // the integer sits in the low bits of `shifted`; -127 makes a zero exponent field, that is, the factor 0
  const Ints<float> n = (Ints<float>)shifted - (Ints<float>)magic;
  return y * (Vec<float>)((n + 127) << 23);
#endif
}

CTK_INLINE Vec<double> exp2_of(Vec<double> x) {
  for (int i = 0; i < VECTOR_SIZE<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// tanh(x) with a relative error of a few units in the last place.
CTK_INLINE Vec<float> tanh_of(Vec<float> x) {
  const Vec<float> a = x < 0.0f ? -x : x, x2 = x * x;
  // |x| < 0.3: Taylor series; beyond: 1 - 2 / (exp(2 |x|) + 1), where nothing cancels
  Vec<float> y = splat(-1382.0f / 155925.0f);
  y = y * x2 + 62.0f / 2835.0f;
  y = y * x2 - 17.0f / 315.0f;
  y = y * x2 + 2.0f / 15.0f;
  y = y * x2 - 1.0f / 3.0f;
  const Vec<float> small = x + x * x2 * y;
  const Vec<float> clipped = a > 20.0f ? splat(20.0f) : a;
  const Vec<float> large = 1.0f - 2.0f / (exp2_of(clipped * 2.88539008178f) + 1.0f);
  return a < 0.3f ? small : (x < 0.0f ? -large : large);
}

CTK_INLINE Vec<double> tanh_of(Vec<double> x) {
  for (int i = 0; i < VECTOR_SIZE<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// ---- storage types ------------------------------------------------------------------------------------------------

CTK_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

CTK_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

CTK_INLINE float from_bf16(uint16_t x) { return bits_to_float(uint32_t(x) << 16); }

CTK_INLINE uint16_t to_bf16(float f) {  // round to nearest even
  const uint32_t u = float_to_bits(f);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded);
}

CTK_INLINE float from_f16(uint16_t x) {
#ifdef __F16C__
  return _cvtsh_ss(x);
#else
  // shift exponent and fraction into place, then let a multiplication rebias (exact for subnormals, too)
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, magnitude = uint32_t(x & 0x7FFFu) << 13;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = (x & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;  // infinity and NaN keep their exponent
  return bits_to_float(float_to_bits(scaled) | special | sign);
#endif
}

CTK_INLINE uint16_t to_f16(float f) {
#ifdef __F16C__
  return _cvtss_sh(f, 0);
#else
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u;
  const float a = bits_to_float(u & 0x7FFFFFFFu);
  if (!(a < 65520.0f)) return uint16_t(sign | (a != a ? 0x7E00u : 0x7C00u));
  if (a < 0x1p-14f)  // subnormal: adding 0.5 leaves the value, rounded to multiples of 2^-24, in the low bits
    return uint16_t(sign | (float_to_bits(a + 0.5f) - float_to_bits(0.5f)));
  const uint32_t m = float_to_bits(a) - (112u << 23);
  return uint16_t(sign | ((m + 0xFFFu + ((m >> 13) & 1u)) >> 13));
#endif
}

// VECTOR_SIZE elements at `offset` (in elements) of `t`, in the compute type.
template <typename C>
CTK_INLINE Vec<C> load_vector(const Tensor4& t, int64_t offset) {
  const char* at = static_cast<const char*>(t.data) + offset * size_of(t.type);
  if (t.type == (sizeof(C) == 8 ? Type::f64 : Type::f32)) return load(reinterpret_cast<const C*>(at));
  uint16_t half[VECTOR_SIZE<C>];
  std::memcpy(half, at, sizeof half);
  C v[VECTOR_SIZE<C>];
  if (t.type == Type::bf16)  // loops without branches, of which compilers make vectors
    for (int i = 0; i < VECTOR_SIZE<C>; ++i) v[i] = C(from_bf16(half[i]));
  else
    for (int i = 0; i < VECTOR_SIZE<C>; ++i) v[i] = C(from_f16(half[i]));
  return load(v);
}

// n elements of a row at `offset` (in elements) of `t`, in the compute type; fp32 is rounded to `rounding` on the way.
template <typename C>
void load_row(C* dst, const Tensor4& t, int64_t offset, int64_t n, Type rounding) {
  switch (t.type) {
    case Type::f64: {
      const double* src = static_cast<const double*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = C(src[i]);
      return;
    }
    case Type::f32: {
      const float* src = static_cast<const float*>(t.data) + offset;
      if (sizeof(C) == sizeof(float) && rounding == Type::f32) std::memcpy(dst, src, n * sizeof(float));
      else if (rounding == Type::bf16)
        for (int64_t i = 0; i < n; ++i) dst[i] = C(from_bf16(to_bf16(src[i])));
      else if (rounding == Type::f16)
        for (int64_t i = 0; i < n; ++i) dst[i] = C(from_f16(to_f16(src[i])));
      else
        for (int64_t i = 0; i < n; ++i) dst[i] = C(src[i]);
      return;
    }
    case Type::bf16: {
      const uint16_t* src = static_cast<const uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = C(from_bf16(src[i]));
      return;
    }
    case Type::f16: {
      const uint16_t* src = static_cast<const uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = C(from_f16(src[i]));
      return;
    }
  }
}

// The same into bf16, for a `t` of bf16 or fp32.
CTK_INLINE void load_row(uint16_t* dst, const Tensor4& t, int64_t offset, int64_t n, Type) {
  if (t.type == Type::bf16) {
    std::memcpy(dst, static_cast<const uint16_t*>(t.data) + offset, n * sizeof(uint16_t));
    return;
  }
  const float* src = static_cast<const float*>(t.data) + offset;
  for (int64_t i = 0; i < n; ++i) dst[i] = to_bf16(src[i]);
}

// The inverse: factor * src, rounded to the type of `t`.
template <typename C>
void store_row(const Tensor4& t, int64_t offset, const C* src, int64_t n, C factor) {
  switch (t.type) {
    case Type::f64: {
      double* dst = static_cast<double*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = double(src[i] * factor);
      return;
    }
    case Type::f32: {
      float* dst = static_cast<float*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = float(src[i] * factor);
      return;
    }
    case Type::bf16: {
      uint16_t* dst = static_cast<uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = to_bf16(float(src[i] * factor));
      return;
    }
    case Type::f16: {
      uint16_t* dst = static_cast<uint16_t*>(t.data) + offset;
      for (int64_t i = 0; i < n; ++i) dst[i] = to_f16(float(src[i] * factor));
      return;
    }
  }
}
