// Tiles in shared memory: rows of W numbers whose 16-byte chunks are permuted (swizzled), so that the eight rows that
// an ldmatrix phase reads at one column, and the eight chunks of a row that a copy writes, lie in different banks.
#pragma once
#include "mma.cuh"

namespace ctk::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies 16 bytes asynchronously, or writes zeros and does not look at `from`.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the N youngest groups have arrived.
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

template <class T, int W>
struct Shared {
  static constexpr int CHUNKS = W * int(sizeof(T)) / 16;
  static constexpr int ROW_BYTES = W * int(sizeof(T));

  uint32_t base;

  static __device__ __forceinline__ constexpr int bytes(int rows) { return rows * ROW_BYTES; }

  // How the chunks of a row are permuted. Rows are 0, 1/2 or 1/4 of the banks apart, modulo all banks; the permutation
  // supplies the rest: 8, 4 or 2 different places.
  static __device__ __forceinline__ int swizzle(int row) {
    if constexpr (CHUNKS % 8 == 0) return row & 7;
    else if constexpr (CHUNKS % 4 == 0) return (row >> 1) & 3;
    else return (row >> 2) & 1;
  }

  __device__ __forceinline__ uint32_t chunk(int row, int column) const {
    return base + row * ROW_BYTES + ((column ^ swizzle(row)) << 4);
  }

  // A: rows row .. row + 15, step i of the contraction over W.
  __device__ __forceinline__ FragmentA rows(int row, int i) const {
    const int thread = threadIdx.x % 32;
    FragmentA a;
    load_matrices(a.x, chunk(row + thread % 16, 2 * i + thread / 16));
    return a;
  }

  // B, whose columns are tile rows row .. row + 15; step i of the contraction over W.
  __device__ __forceinline__ FragmentB rows_as_columns(int row, int i) const {
    const int thread = threadIdx.x % 32;
    FragmentB b;
    load_matrices(b.x, chunk(row + thread % 8 + thread / 16 * 8, 2 * i + thread / 8 % 2));
    return b;
  }

  // B, whose columns are tile columns column .. column + 15; the contraction runs over STEP tile rows from row on.
  __device__ __forceinline__ FragmentB columns(int row, int column) const {
    const int thread = threadIdx.x % 32;
    FragmentB b;
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(b.x, chunk(row + thread % 16, column / 8 + thread / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + thread % 4 * 2 + i % 2, c = column + thread / 4 + i / 2 * 8;
        b.x[i] = load_shared(chunk(r, c / 4) + c % 4 * 4);
      }
    }
    return b;
  }
};

// acc [16 M rows, 8 N columns] += rows of a times rows of b, over W.
template <class T, int W, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], Shared<T, W> a, int row, Shared<T, W> b,
                                              bool tf32) {
#pragma unroll
  for (int i = 0; i < W / STEP<T>; ++i) {
    FragmentA left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = a.rows(row + 16 * m, i);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const FragmentB right = b.rows_as_columns(8 * n, i);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply_pair<T>(acc[m][n], acc[m][n + 1], left[m], right, tf32);
    }
  }
}

// acc [16 M rows, W columns] += p [16 M, 8 K] times 8 K rows of b.
template <class T, int W, int M, int K>
__device__ __forceinline__ void multiply_columns(float (&acc)[M][W / 8][4], const float (&p)[M][K][4], Shared<T, W> b,
                                                 bool tf32) {
#pragma unroll
  for (int i = 0; i < 8 * K / STEP<T>; ++i) {
    FragmentA left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = as_operand<T>(p[m], i);
#pragma unroll
    for (int d = 0; d < W; d += 16) {
      const FragmentB right = b.columns(STEP<T> * i, d);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply_pair<T>(acc[m][d / 8], acc[m][d / 8 + 1], left[m], right, tf32);
    }
  }
}

// The same for the lanes that `mine` has a bit for (bit 2 m + 0 or 1: row g or g + 8): those of other lanes keep every
// bit, whatever b holds.
template <class T, int W, int M, int K>
__device__ __forceinline__ void multiply_columns_of(float (&acc)[M][W / 8][4], const float (&p)[M][K][4],
                                                    Shared<T, W> b, uint32_t mine, bool tf32) {
#pragma unroll
  for (int d = 0; d < W; d += 16) {
    float sum[M][2][4] = {};
#pragma unroll
    for (int i = 0; i < 8 * K / STEP<T>; ++i) {
      const FragmentB right = b.columns(STEP<T> * i, d);
#pragma unroll
      for (int m = 0; m < M; ++m) multiply_pair<T>(sum[m][0], sum[m][1], as_operand<T>(p[m], i), right, tf32);
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (mine >> (2 * m + e / 2) & 1) acc[m][d / 8][e] += sum[m][0][e], acc[m][d / 8 + 1][e] += sum[m][1][e];
  }
}

}  // namespace ctk::cuda
