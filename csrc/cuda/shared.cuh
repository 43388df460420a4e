// Tiles in shared memory: rows of W numbers whose 16-byte chunks are permuted (swizzled), so that the eight rows that
// an ldmatrix phase reads at one column, and the eight chunks of a row that a copy writes, lie in different banks.
#pragma once
#include <type_traits>

#include "mma.cuh"

namespace ctk::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies 16 bytes asynchronously, or writes zeros and does not read `from`.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the N youngest groups have arrived.
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A barrier of all THREADS of a block that its warps may reach on different paths. __syncthreads() demands one path: in
// a loop that warps leave one by one, the compiler may make two barriers of one.
template <int THREADS>
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
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

// Optimisation barrier: the compiler cannot see where the result comes from. Before a loop, it keeps x in a register
// and does not compute x again at each use. Inside a loop, it does not hoist what depends on x, which would occupy
// registers for the whole loop.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
template <class P>
__device__ __forceinline__ const P* opaque(const P* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Where a thread is in the grid (Program) and in its block (Thread). Each object reads the special registers again, so
// that a kernel which needs them only before and after its loops does not keep them in registers meanwhile.
struct Program {
  int tile, kv, split;
  __device__ __forceinline__ Program() {
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(tile));
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(kv));
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(split));
  }
};
struct Thread {
  int warp, in_warp;
  __device__ __forceinline__ Thread() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    warp = index / 32, in_warp = index % 32;
  }
};

template <class T, int W>
struct Shared {
  static constexpr int ROW_BYTES = W * int(sizeof(T)), CHUNKS = ROW_BYTES / 16;
  // Chunks are permuted within spans of SPAN bytes. Modulo all banks, rows start 0, 1/2 or 1/4 of the banks apart;
  // permuting 8, 4 or 2 chunks spreads them over all banks. The pattern repeats after 8 rows.
  static constexpr int SPAN = CHUNKS % 8 == 0 ? 128 : CHUNKS % 4 == 0 ? 64 : 32;

  uint32_t base;  // a multiple of 128

  static __device__ __forceinline__ constexpr int bytes(int rows) { return rows * ROW_BYTES; }

  __device__ __forceinline__ uint32_t chunk(int row, int column) const {
    const int permutation = SPAN == 128 ? row & 7 : SPAN == 64 ? row >> 1 & 3 : row >> 2 & 1;
    return base + row * ROW_BYTES + ((column ^ permutation) << 4);
  }

  // From the address of chunk 0 or 1 of a row to that of chunk 2 i or 2 i + 1.
  static __device__ __forceinline__ uint32_t skip(uint32_t at, int i) {
    return (at ^ (32 * i % SPAN)) + 32 * i / SPAN * SPAN;
  }
};

// A tile as A: rows `row` .. row + 15 and 16 m more; steps of the contraction run over W.
template <class T, int W>
class RowsA {
 public:
  __device__ __forceinline__ RowsA(Shared<T, W> tile, int row)
      : at_(opaque(tile.chunk(row + threadIdx.x % 16, threadIdx.x % 32 / 16))) {}
  __device__ __forceinline__ FragmentA load(int m, int i) const {
    FragmentA a;
    load_matrices(a.x, Shared<T, W>::skip(at_, i) + 16 * m * Shared<T, W>::ROW_BYTES);
    return a;
  }

 private:
  uint32_t at_;
};

// A tile as B, whose columns are the tile's rows, 16 at a time from `row` (a multiple of 16) on; steps run over W.
template <class T, int W>
class RowsB {
 public:
  __device__ __forceinline__ explicit RowsB(Shared<T, W> tile)
      : at_(opaque(tile.chunk(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8, threadIdx.x / 8 % 2))) {}
  // The same for a tile `bytes` further on.
  __device__ __forceinline__ RowsB moved(uint32_t bytes) const {
    RowsB other = *this;
    other.at_ += bytes;
    return other;
  }
  __device__ __forceinline__ FragmentB load(int row, int i) const {
    FragmentB b;
    load_matrices(b.x, Shared<T, W>::skip(at_, i) + row * Shared<T, W>::ROW_BYTES);
    return b;
  }

 private:
  uint32_t at_;
};

// A tile as B, whose columns are the tile's columns, 16 at a time from `column` on; steps run over the tile's rows.
template <class T, int W>
class ColumnsB {
 public:
  __device__ __forceinline__ explicit ColumnsB(Shared<T, W> tile) {
    const int thread = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      at_[0] = opaque(tile.chunk(thread % 16, thread / 16));
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) at_[r] = opaque(tile.chunk(thread % 4 * 2 + r, thread / 16) + thread / 4 % 4 * 4);
    }
  }
  // The same for a tile `bytes` further on.
  __device__ __forceinline__ ColumnsB moved(uint32_t bytes) const {
    ColumnsB other = *this;
    for (uint32_t& at : other.at_) at += bytes;
    return other;
  }
  __device__ __forceinline__ FragmentB load(int i, int column) const {
    constexpr int STEP_BYTES = STEP<T> * Shared<T, W>::ROW_BYTES;
    FragmentB b;
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(b.x, Shared<T, W>::skip(at_[0], column / 16) + i * STEP_BYTES);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        b.x[j] = load_shared(Shared<T, W>::skip(at_[j % 2], column / 8 + j / 2) + i * STEP_BYTES);
    }
    return b;
  }

 private:
  uint32_t at_[sizeof(T) == 2 ? 1 : 2];  // 32 bits: of this thread's two rows
};

__device__ __forceinline__ void clear(float (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = 0.0f;
}

// Calls f with whether fp32 rows are rounded to TF32, as a type. Products branch in every step instead of once, since
// the compiler does not move code across a branch: otherwise it would load and split a whole operand ahead of time, for
// which there are not enough registers.
template <class T, class F>
__device__ __forceinline__ void with_precision(bool tf32, const F& f) {
  if (sizeof(T) == 4 && tf32) f(std::true_type{});
  else f(std::false_type{});
}

// acc [16 M rows, 8 N columns] <- rows of a times rows of b, over W. tf32 is the same for all products of a call.
template <class T, int W, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], const RowsA<T, W>& a, const RowsB<T, W>& b,
                                              bool tf32) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) clear(acc[m][n]);
  // fp32 takes six instructions where 16 bits take one: not unrolled, since that would take minutes to compile
#pragma unroll(sizeof(T) == 4 ? 1 : W / STEP<T>)
  for (int i = 0; i < W / STEP<T>; ++i) {
    FragmentA left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m] = a.load(m, i);
    with_precision<T>(tf32, [&](auto rounded) {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const FragmentB right = b.load(8 * n, i);
#pragma unroll
        for (int m = 0; m < M; ++m) multiply_pair<rounded.value, T>(acc[m][n], acc[m][n + 1], left[m], right);
      }
    });
  }
}

// acc [16 M rows, W columns] += p [16 M, 8 K] times 8 K rows of b.
//
// fp32: a block of columns is summed up from zero and then added, so that acc takes one rounding per call instead of
// one per step of the contraction. That is what keeps sums over tens of thousands of keys as accurate as those of eager
// PyTorch.
template <class T, int W, int M, int K>
__device__ __forceinline__ void multiply_columns(float (&acc)[M][W / 8][4], const float (&p)[M][K][4],
                                                 const ColumnsB<T, W>& b, bool tf32) {
  constexpr int STEPS = 8 * K / STEP<T>;
  if constexpr (sizeof(T) == 4) {
    constexpr int PART = W % 32 || W == 128 ? 16 : 32;  // columns that share a split of p, as registers allow
#pragma unroll
    for (int part = 0; part < W; part += PART) {
      float sum[M][PART / 8][4] = {};
#pragma unroll
      for (int i = 0; i < STEPS; ++i)
        with_precision<T>(tf32, [&](auto rounded) {
#pragma unroll
          for (int d = 0; d < PART; d += 16) {
            const FragmentB right = b.load(i, part + d);
#pragma unroll
            for (int m = 0; m < M; ++m)
              multiply_pair<rounded.value, T>(sum[m][d / 8], sum[m][d / 8 + 1], as_operand<T>(p[m], i), right);
          }
        });
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < PART / 8; ++d) add(acc[m][part / 8 + d], sum[m][d]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      FragmentA left[M];
#pragma unroll
      for (int m = 0; m < M; ++m) left[m] = as_operand<T>(p[m], i);
#pragma unroll
      for (int d = 0; d < W; d += 16) {
        const FragmentB right = b.load(i, d);
#pragma unroll
        for (int m = 0; m < M; ++m) multiply_pair<false, T>(acc[m][d / 8], acc[m][d / 8 + 1], left[m], right);
      }
    }
  }
}

// The same for the lanes that `mine` has a bit for (bit 2 m + 0 or 1: row g or g + 8). Accumulators of other lanes do
// not change, whatever b holds.
template <class T, int W, int M, int K>
__device__ __forceinline__ void multiply_columns_of(float (&acc)[M][W / 8][4], const float (&p)[M][K][4],
                                                    const ColumnsB<T, W>& b, uint32_t mine, bool tf32) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    FragmentA left[8 * K / STEP<T>];
#pragma unroll
    for (int i = 0; i < 8 * K / STEP<T>; ++i) left[i] = as_operand<T>(p[m], i);
    const bool low = mine >> (2 * m) & 1, high = mine >> (2 * m + 1) & 1;
#pragma unroll
    for (int d = 0; d < W; d += 16) {
      float sum[2][4];
      clear(sum[0]), clear(sum[1]);
      with_precision<T>(tf32, [&](auto rounded) {
#pragma unroll
        for (int i = 0; i < 8 * K / STEP<T>; ++i)
          multiply_pair<rounded.value, T>(sum[0], sum[1], left[i], b.load(i, d));
      });
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e < 2 ? low : high) acc[m][d / 8 + n][e] += sum[n][e];
    }
  }
}

}  // namespace ctk::cuda
