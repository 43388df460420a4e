// Products by matrix units (AMX). A tile register holds 16 rows of 64 bytes; one instruction adds the product of a tile
// of 16 x 32 bf16 and one of 16 pairs x 16 to 16 x 16 floats. All operands are made of whole tiles:
//
//   first   [rows][elements]    keys, or p and ds by lane; columns of keys for out and dq
//   second  [pairs][columns]    as the other builds have them (operands-inl.h): pairs along what is summed
//
// So keys stay at their positions in a block: those that no lane sees are hidden, not left out, and a block is filled
// up to a multiple of STEP with zeros. A chunk of keys is packed once for all tiles of queries that read it.

// The tile registers of this thread, for as long as this lives. What others on this thread had set up (oneDNN remembers
// it, and does not look) is put back.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    const Setup whole;
    asm volatile("ldtilecfg %0" ::"m"(whole));
  }
  ~TileRegisters() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Setup {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Setup before_;
};

// c (+)= a b for M x N tiles of c, both 1 or 2: c in tile registers 0 to 3, a in 4 and 5, b in 6 and 7. Strides in
// bytes.
template <int M, int N>
CTK_INLINE void tile_block(const char* a, int64_t lda, const char* b, int64_t ldb, char* c, int64_t ldc, int64_t steps,
                           bool add) {
  if (add) {
    _tile_loadd(0, c, ldc);
    if constexpr (N == 2) _tile_loadd(1, c + 64, ldc);
    if constexpr (M == 2) _tile_loadd(2, c + 16 * ldc, ldc);
    if constexpr (M == 2 && N == 2) _tile_loadd(3, c + 16 * ldc + 64, ldc);
  } else {
    _tile_zero(0);
    if constexpr (N == 2) _tile_zero(1);
    if constexpr (M == 2) _tile_zero(2);
    if constexpr (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, a += 64, b += 16 * ldb) {
    _tile_loadd(4, a, lda);
    _tile_loadd(6, b, ldb);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b + 64, ldb);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, a + 16 * lda, lda);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ldc);
  if constexpr (N == 2) _tile_stored(1, c + 64, ldc);
  if constexpr (M == 2) _tile_stored(2, c + 16 * ldc, ldc);
  if constexpr (M == 2 && N == 2) _tile_stored(3, c + 16 * ldc + 64, ldc);
}

// c[rows][columns] (+)= a[rows][STEP * steps] b[STEP / 2 * steps][columns], rows and columns multiples of 16. Strides
// in elements.
CTK_NOINLINE void tile_product(int64_t rows, int64_t columns, int64_t steps, const uint16_t* a, int64_t lda,
                               const Bf16Pair* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  asm volatile("" ::: "memory");  // compilers do not know that tile instructions read memory
  const int64_t a_row = lda * int64_t(sizeof *a), b_row = ldb * int64_t(sizeof *b), c_row = ldc * int64_t(sizeof *c);
  for (int64_t m = 0; m < rows; m += 32)
    for (int64_t n = 0; n < columns; n += 32) {
      const char* from = reinterpret_cast<const char*>(a + m * lda);
      const char* with = reinterpret_cast<const char*>(b + n);
      char* to = reinterpret_cast<char*>(c + m * ldc + n);
      const bool tall = m + 16 < rows, wide = n + 16 < columns;
      if (tall && wide) tile_block<2, 2>(from, a_row, with, b_row, to, c_row, steps, add);
      else if (tall) tile_block<2, 1>(from, a_row, with, b_row, to, c_row, steps, add);
      else if (wide) tile_block<1, 2>(from, a_row, with, b_row, to, c_row, steps, add);
      else tile_block<1, 1>(from, a_row, with, b_row, to, c_row, steps, add);
    }
  asm volatile("" ::: "memory");
}

// Keys [begin, end) as whole rows [round_up(end - begin, STEP)][depth.elements()].
inline void pack_key_rows(KeyRows<Bf16Pair> keys, int64_t begin, int64_t end, const Depth<Bf16Pair>& depth,
                          uint16_t* out) {
  const int64_t elements = depth.elements(), all = begin + round_up(end - begin, STEP);
  for (int64_t j = begin; j < all; ++j, out += elements) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(j < end ? keys[j] : zero_row<Bf16Pair>());
    std::memcpy(out, row, depth.D * sizeof(uint16_t));
    std::fill(out + depth.D, out + elements, uint16_t(0));
  }
}

// Keys [begin, end), at most KEY_BLOCK, as columns [depth.padded][KEY_BLOCK], of which round_up(end - begin, STEP) are
// written; scratch [KEY_BLOCK / 2][depth.padded]. `finite`: rows that are not finite become zeros.
inline void pack_key_columns(KeyRows<Bf16Pair> keys, int64_t begin, int64_t end, const Depth<Bf16Pair>& depth,
                             bool finite, Bf16Pair* scratch, uint16_t* out) {
  const int64_t pairs = round_up(end - begin, STEP) / 2;
  const auto row = [&](int64_t j) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(j < end ? keys[j] : zero_row<Bf16Pair>());
    return finite && !all_finite(x, depth.D) ? reinterpret_cast<const uint16_t*>(zero_row<Bf16Pair>()) : x;
  };
  for (int64_t i = 0; i < pairs; ++i) {
    interleave(row(begin + 2 * i), row(begin + 2 * i + 1), depth.D, scratch + i * depth.padded);
    std::fill(scratch + i * depth.padded + depth.D, scratch + (i + 1) * depth.padded, Bf16Pair{0});
  }
  const void* from = scratch;
  void* to = out;
  transpose(static_cast<const float*>(from), depth.padded, static_cast<float*>(to), KEY_BLOCK / 2, pairs, depth.padded);
}
