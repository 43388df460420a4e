// The context rule, stated once for C++: which context positions a row may see.
// ctkernels/mask.py states it for Python; tests hold the two against each other bit for bit.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CTK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CTK_HOST_DEVICE inline
#endif

namespace ctk {

// Philox4x32-10 (Salmon et al., SC 2011) with counter (c0, c1, 0, 0).
CTK_HOST_DEVICE void philox4x32(uint32_t c0, uint32_t c1, uint64_t key, uint32_t (&out)[4]) {
  uint32_t c2 = 0, c3 = 0, k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
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

}  // namespace ctk
