// What tiles of logits and results have in common: hiding keys, general logits, and stores to global memory.
#pragma once
#include "logits.cuh"

namespace ctk::cuda {

// words <- word(lane) for each of a thread's lanes: which keys it sees. Returns those that any of them sees.
template <int M, class Word>
__device__ __forceinline__ uint64_t find_words(uint64_t (&words)[M][2], const LaneInfo* lanes, const Word& word) {
  uint64_t any = 0;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      words[m][h] = word(lanes[16 * m + threadIdx.x % 32 / 4 + 8 * h]);
      any |= words[m][h];
    }
  return any;
}

// Logits of lanes [16 M] by keys [N] -> -inf where a lane does not see a key.
template <int M, int N>
__device__ __forceinline__ void hide(float (&s)[M][N / 8][4], const uint64_t (&words)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint64_t mine = words[m][h] >> (2 * (threadIdx.x % 4));
      const uint32_t halves[2] = {uint32_t(mine), uint32_t(mine >> 32)};
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (!(halves[n / 4] >> (8 * (n % 4) + e) & 1)) s[m][n][2 * h + e] = -INFINITY;
    }
}

// Products of lanes [16 M] and keys [N] -> logits. The keys are those of the prefix, or own keys of a row.
template <bool Prefix, int M, int N>
__device__ __forceinline__ void to_logits(const Args& a, float (&s)[M][N / 8][4], int start, int prefix_len,
                                          const LaneInfo* lanes, const LaneTerms* terms) {
  const int thread = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 16 * m + thread / 4 + 8 * h;
      const LaneTerms mine = terms[i];
      const int position = lanes[i].position + (Prefix ? prefix_len : 0);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = start + 8 * n + thread % 4 * 2 + e;
          float derivative;
          float& x = s[m][n][2 * h + e];
          const float bias = Prefix ? bias_of(a, mine, key, prefix_len) : 0.0f;
          x = logit(a, x, bias, mine.slope, position - key, &derivative);
        }
    }
}

// Backward: from products s = q k^T (-inf: hidden) and ds = dout v^T to ds <- p (ds - delta).
template <int N>
__device__ __forceinline__ void probability_gradients(const Args& a, const float (&s)[1][N / 8][4],
                                                      float (&ds)[1][N / 8][4], const LaneState (&state)[2]) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float p = exp2_fast(fmaf(s[0][n][e], a.factor, -state[e / 2].high));
      ds[0][n][e] = p * (ds[0][n][e] - state[e / 2].delta);
    }
}

// Backward, everything: from products s = q k^T and ds = dout v^T to ds <- p (ds - delta) d logit / d product.
template <bool Prefix, int N>
__device__ __forceinline__ void logit_gradients(const Args& a, const float (&s)[1][N / 8][4], float (&ds)[1][N / 8][4],
                                                const LaneState (&state)[2], const uint64_t (&words)[1][2], int start,
                                                int prefix_len, const LaneInfo* lanes, const LaneTerms* terms) {
  const int thread = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = thread / 4 + 8 * h;
    const LaneTerms mine = terms[i];
    const int position = lanes[i].position + (Prefix ? prefix_len : 0);
    const uint64_t word = words[0][h] >> (2 * (thread % 4));
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = start + 8 * n + thread % 4 * 2 + e;
        float derivative;
        const float bias = Prefix ? bias_of(a, mine, key, prefix_len) : 0.0f;
        const float x = logit(a, s[0][n][2 * h + e], bias, mine.slope, position - key, &derivative);
        const float p = exp2_fast((x - state[h].high) - state[h].low);
        float& gradient = ds[0][n][2 * h + e];
        gradient = word >> (8 * n + e) & 1 ? p * (gradient - state[h].delta) * derivative : 0.0f;
      }
  }
}

// Which of a thread's lanes belong to a row: bit 2 m + h.
template <int M>
__device__ __forceinline__ uint32_t lanes_of_row(const LaneInfo* lanes, int row) {
  uint32_t mine = 0;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      mine |= uint32_t(lanes[16 * m + threadIdx.x % 32 / 4 + 8 * h].row == row) << (2 * m + h);
  return mine;
}

// Address of a lane's numbers in a tensor laid out as q; null: there is no such lane.
template <class T>
__device__ __forceinline__ T* lane_token(const Args& a, const Tensor4& t, int lane, int kv) {
  const Slot slot = a.slot_table[lane / a.group];
  if (slot.row < 0) return nullptr;
  return static_cast<T*>(t.data) + slot.batch * t.batch + (kv * a.group + lane % a.group) * t.head +
         slot.token * t.token;
}

// lse of a lane from its largest logit and its sum. In fp64, once per lane: the backward pass multiplies every rounding
// of lse by its size.
__device__ __forceinline__ void store_lse(const Args& a, int lane, int kv, float top, float total) {
  const float lse = total == 0.0f ? -INFINITY : float((double(top) + log2(double(total))) * LN2);
  if (float* to = lane_token<float>(a, a.call.p.lse, lane, kv)) *to = lse;
}

// Stores the first `columns` of W columns of a warp's accumulators, 16 rows, through `stage` in shared memory. Row i
// goes to row(i) (null: nowhere). wide: rows can be written 16 bytes at a time.
template <class To, int W, class Row>
__device__ __forceinline__ void store_rows(const float (&acc)[W / 8][4], uint32_t stage, int columns, bool wide,
                                           const Row& row) {
  constexpr int PITCH = W * int(sizeof(To)) + 16, CHUNK = 16 / int(sizeof(To)), CHUNKS = W / CHUNK;
  const int thread = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int d = 0; d < W / 8; ++d)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t to = stage + (thread / 4 + 8 * h) * PITCH + (8 * d + thread % 4 * 2) * int(sizeof(To));
      if constexpr (sizeof(To) == 4)
        asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(to), "f"(acc[d][2 * h]), "f"(acc[d][2 * h + 1])
                     : "memory");
      else
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pair_of(To{}, acc[d][2 * h], acc[d][2 * h + 1]))
                     : "memory");
    }
  __syncwarp();
#pragma unroll 1  // unrolled, the addresses of all rows would occupy registers
  for (int at = thread; at < 16 * CHUNKS; at += 32) {
    const int i = at / CHUNKS, column = at % CHUNKS * CHUNK;
    To* to = row(i);
    if (!to || column >= columns) continue;
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(stage + i * PITCH + column * int(sizeof(To)))
                 : "memory");
    if (wide) {
      *reinterpret_cast<uint4*>(to + column) = x;
    } else {
      const To* numbers = reinterpret_cast<const To*>(&x);
#pragma unroll
      for (int e = 0; e < CHUNK; ++e)
        if (column + e < columns) to[column + e] = numbers[e];
    }
  }
}

}  // namespace ctk::cuda
