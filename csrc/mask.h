// The context rule for C++: which context positions a row may see. `visible_positions` is the one function that states
// it; the CPU tiles (csrc/cpu/tiles-inl.h) and the set-up of the CUDA kernels (csrc/cuda/setup.cuh) both call it, so a
// change of the rule is a change here. ctkernels/mask.py states the rule for Python, ctkernels/backends/triton/mask.py
// for Triton. Tests compare all of them bit for bit.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CTK_HOST_DEVICE __host__ __device__ __forceinline__
#define CTK_UNROLL _Pragma("unroll")
#else
// Always inlined, so that the CPU kernels compile it for their own instruction set.
#define CTK_HOST_DEVICE __attribute__((always_inline)) inline
#define CTK_UNROLL _Pragma("GCC unroll 10")
#endif

namespace ctk {

// Philox4x32-10 (Salmon et al., SC 2011) with counter (c0, c1, 0, 0).
CTK_HOST_DEVICE void philox4x32(uint32_t c0, uint32_t c1, uint64_t key, uint32_t (&out)[4]) {
  uint32_t c2 = 0, c3 = 0, k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  CTK_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// The lowest n bits; none for n < 0, all for n > 64.
template <class Int>
CTK_HOST_DEVICE uint64_t low_bits(Int n) {
  return n >= 64 ? ~0ull : n <= 0 ? 0ull : (1ull << n) - 1;
}

// What all rows of a call share.
struct ContextRule {
  int64_t length;       // C: positions from here on are not context
  uint32_t drop_below;  // floor(drop_p * 2^32); 0: no token dropout
  uint64_t seed;
};

// What one row hides.
struct ContextRow {
  int64_t hidden_start, hidden_end;  // half-open span
  const uint8_t* keep;               // [C], 0 = hidden; null: everything kept
  uint32_t id;                       // identity in the random stream
};

// Token dropout of positions 4 * quad .. 4 * quad + N - 1: bit i is set where position 4 * quad + i is kept. One
// evaluation of the random stream serves four positions.
template <int N>
CTK_HOST_DEVICE uint64_t not_dropped(const ContextRule& rule, uint32_t id, uint32_t quad) {
  uint16_t kept[N / 4];              // four bits each; as wide as compilers make the best vectors of
  for (int i = 0; i < N / 4; ++i) {  // without branches, so that CPU compilers turn it into vectors
    uint32_t random[4];
    philox4x32(quad + uint32_t(i), id, rule.seed, random);
    kept[i] = uint16_t(uint32_t(random[0] >= rule.drop_below) | uint32_t(random[1] >= rule.drop_below) << 1 |
                       uint32_t(random[2] >= rule.drop_below) << 2 | uint32_t(random[3] >= rule.drop_below) << 3);
  }
  uint64_t bits = 0;
  for (int i = 0; i < N / 4; ++i) bits |= uint64_t(kept[i]) << (4 * i);
  return bits;
}

// Bit i is set where flags[i], a byte, is not 0. i < N and i < count.
template <int N>
CTK_HOST_DEVICE uint64_t flag_bits(const uint8_t* flags, int64_t count) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are gathered in the order of their addresses");
  constexpr uint64_t LOW_7 = 0x7F7F7F7F7F7F7F7F, ONES = 0x0101010101010101, GATHER = 0x0102040810204080;
  uint64_t bits = 0;
  int i = 0;
  for (; i + 8 <= N && i + 8 <= count; i += 8) {  // eight at once: each byte to 0 or 1, then their bits side by side
    uint64_t bytes;
    memcpy(&bytes, flags + i, 8);
    bytes = (((bytes & LOW_7) + LOW_7) | bytes) >> 7 & ONES;
    bits |= bytes * GATHER >> 56 << i;
  }
  for (; i < N && i < count; ++i) bits |= uint64_t(flags[i] != 0) << i;
  return bits;
}

// THE context rule. Context positions first .. first + N - 1 of a row, bit i for position first + i, set where the row
// sees it: outside of its hidden span, kept by its pattern, and not dropped. Positions from rule.length on are not
// context, and visible. `first` is a multiple of 4, and so is N, up to 64; higher bits are 0.
template <int N>
CTK_HOST_DEVICE uint64_t visible_positions(const ContextRule& rule, const ContextRow& row, int64_t first) {
  uint64_t visible = low_bits(row.hidden_start - first) | ~low_bits(row.hidden_end - first);
  if (row.keep) visible &= flag_bits<N>(row.keep + first, rule.length - first);
  if (rule.drop_below) visible &= not_dropped<N>(rule, row.id, uint32_t(first / 4));
  return (visible | ~low_bits(rule.length - first)) & low_bits(N);
}

}  // namespace ctk
