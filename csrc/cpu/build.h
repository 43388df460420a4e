// The kernels, once more for the instruction set that the including file has chosen (CTK_ISA, CTK_VECTOR_BYTES;
// CTK_BF16 where that multiplies bf16, and then CTK_EXTENDS, the build to take for other types).
#define CTK_INLINE __attribute__((always_inline)) inline
#define CTK_NOINLINE __attribute__((noinline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics, https://gcc.gnu.org/PR105593
#pragma GCC diagnostic ignored "-Wstringop-overflow"    // vectorised loops over at most KEY_BLOCK bytes
#endif
namespace ctk::cpu::CTK_ISA {
namespace {
// clang-format off: each builds on those before it
#include "simd.h"
#include "operands.h"
#include "gemm.h"
#include "tiles.h"
#include "narrow.h"
#include "logits.h"
#include "forward.h"
#include "backward.h"
// clang-format on

#ifdef CTK_BF16  // only what differs from the build that it extends
void forward(const Params& p, const Pool& pool) {
  p.q.type == Type::bf16 ? forward_as<Bf16Pair>(p, pool) : CTK_EXTENDS::kernels.forward(p, pool);
}

void backward(const Params& p, const Pool& pool) {
  p.q.type == Type::bf16 ? backward_as<Bf16Pair>(p, pool) : CTK_EXTENDS::kernels.backward(p, pool);
}
#else
void forward(const Params& p, const Pool& pool) {
  p.q.type == Type::f64 ? forward_as<double>(p, pool) : forward_as<float>(p, pool);
}

void backward(const Params& p, const Pool& pool) {
  p.q.type == Type::f64 ? backward_as<double>(p, pool) : backward_as<float>(p, pool);
}
#endif

void release() {
  Arena::release();
#ifdef CTK_BF16
  CTK_EXTENDS::kernels.release();
#endif
}

#define CTK_TEXT_(x) #x
#define CTK_TEXT(x) CTK_TEXT_(x)
}  // namespace

const Kernels kernels = {CTK_TEXT(CTK_ISA), forward, backward, release};
}  // namespace ctk::cpu::CTK_ISA
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
