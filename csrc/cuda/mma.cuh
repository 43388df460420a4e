// Tensor-core products and the fragments that they take, for the three types of the rows.
//
// A fragment of A is 16 rows by one step of the contraction (16 numbers of 16 bits, 8 of 32), a fragment of B two times
// 8 columns by one step. Accumulators are m16n8: a thread holds, with g = thread / 4 and t = thread % 4 of its warp,
//   acc[0], acc[1]: row g,     columns 2t, 2t + 1
//   acc[2], acc[3]: row g + 8, columns 2t, 2t + 1
// A layouts equal accumulator layouts (in 32 bits up to the order of the contraction, see `as_operand`), so that
// probabilities go from one product to the next without leaving the registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ctk::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

struct FragmentA {
  uint32_t x[4];
};
struct FragmentB {
  uint32_t x[4];  // columns 0..7 in x[0], x[1], columns 8..15 in x[2], x[3]
};

// Numbers of the contraction that one instruction takes.
template <class T>
constexpr int STEP = 32 / int(sizeof(T));

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

__device__ __forceinline__ uint32_t pair_of(bf16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pair_of(fp16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ void multiply(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]));
}
__device__ __forceinline__ void multiply(fp16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]));
}
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]));
}

__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// x = high + low, two TF32 numbers of 11 bits each, up to 2^-24 |x|: the rounding of fp32. low is 0 where high is not
// finite, so that infinities stay what they are.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t* high, uint32_t* low) {
  const float value = __uint_as_float(x);
  *high = round_to_tf32(value);
  const float rest = value - __uint_as_float(*high);
  *low = fabsf(value) < 3.0e38f ? round_to_tf32(rest) : 0u;
}

// d += x by CUDA cores, which round to nearest.
__device__ __forceinline__ void add(float (&d)[4], const float (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += x[e];
}

// d0, d1 (16 x 8 each) += a b. fp32 inputs: exact means the product of the halves but low * low, which is below the
// rounding of fp32; TF32 that of the high halves alone.
//
// A tensor core aligns the terms of a sum to the largest and truncates them (Fasi et al., PeerJ CS 7:e330, 2021). All
// of these errors point towards zero, so that those of a long chain of products add up. An exact product therefore
// starts from zero in every step, and is added to d outside of the tensor core (Ootomo and Yokota, IJHPCA 36(4), 2022).
template <bool TF32, class T>
__device__ __forceinline__ void multiply_pair(float (&d0)[4], float (&d1)[4], const FragmentA& a, const FragmentB& b) {
  if constexpr (sizeof(T) == 4) {
    uint32_t a_high[4], a_low[4], b_high[4], b_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(a.x[i], &a_high[i], &a_low[i]), split_tf32(b.x[i], &b_high[i], &b_low[i]);
    if constexpr (TF32) {
      multiply_tf32(d0, a_high, b_high[0], b_high[1]);
      multiply_tf32(d1, a_high, b_high[2], b_high[3]);
    } else {
      float sum0[4] = {}, sum1[4] = {};
      multiply_tf32(sum0, a_low, b_high[0], b_high[1]);  // the small terms first
      multiply_tf32(sum1, a_low, b_high[2], b_high[3]);
      multiply_tf32(sum0, a_high, b_low[0], b_low[1]);
      multiply_tf32(sum1, a_high, b_low[2], b_low[3]);
      multiply_tf32(sum0, a_high, b_high[0], b_high[1]);
      multiply_tf32(sum1, a_high, b_high[2], b_high[3]);
      add(d0, sum0), add(d1, sum1);
    }
  } else {
    multiply(T{}, d0, a.x, b.x[0], b.x[1]);
    multiply(T{}, d1, a.x, b.x[2], b.x[3]);
  }
}

// Step i of the contraction over the columns of an accumulator. In 32 bits, the instruction's numbers t and t + 4 are
// columns 2t and 2t + 1; `ColumnsB` loads B in the same order.
template <class T, int N>
__device__ __forceinline__ FragmentA as_operand(const float (&acc)[N][4], int i) {
  if constexpr (sizeof(T) == 4) {
    return {{bits_of(acc[i][0]), bits_of(acc[i][2]), bits_of(acc[i][1]), bits_of(acc[i][3])}};
  } else {
    return {{pair_of(T{}, acc[2 * i][0], acc[2 * i][1]), pair_of(T{}, acc[2 * i][2], acc[2 * i][3]),
             pair_of(T{}, acc[2 * i + 1][0], acc[2 * i + 1][1]), pair_of(T{}, acc[2 * i + 1][2], acc[2 * i + 1][3])}};
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ctk::cuda
