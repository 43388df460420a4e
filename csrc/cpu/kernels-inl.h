// The kernels, once more for the instruction set that the including file has chosen (CTK_ISA, CTK_VECTOR_BYTES;
// CTK_BF16 where that multiplies bf16, and then CTK_EXTENDS, the build to take for other types; CTK_AMX where matrix
// units do).
//
// The files named *-inl.h are fragments of this one translation unit: each builds on those before it, inside a
// namespace of its own for every instruction set. They cannot be included alone.
#define CTK_INLINE __attribute__((always_inline)) inline
#define CTK_NOINLINE __attribute__((noinline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics, https://gcc.gnu.org/PR105593
#endif
namespace ctk::cpu::CTK_ISA {
namespace {
// clang-format off: in this order
#include "simd-inl.h"
#include "operands-inl.h"
#include "gemm-inl.h"
#include "tiles-inl.h"
#include "narrow-inl.h"
#ifdef CTK_AMX
#include "amx-inl.h"
#endif
#include "logits-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "backward_plan-inl.h"
// clang-format on

#ifdef CTK_BF16  // only what differs from the build that it extends
// Matrix units take dropped keys along: where most are dropped, kernels that leave them out are faster.
bool has_own_kernels(const Params& p) {
  constexpr uint32_t MOST_DROPPED = 0xB3333333;  // 70% of 2^32
  return p.q.type == Type::bf16 && !(FIXED_KEYS && p.rule.drop_below > MOST_DROPPED);
}

void forward(const Params& p, const Pool& pool) {
  has_own_kernels(p) ? forward_as<Bf16Pair>(p, pool) : CTK_EXTENDS::kernels.forward(p, pool);
}

void backward(const Params& p, const Pool& pool) {
  has_own_kernels(p) ? backward_as<Bf16Pair>(p, pool) : CTK_EXTENDS::kernels.backward(p, pool);
}
#else
void forward(const Params& p, const Pool& pool) {
  p.q.type == Type::f64 ? forward_as<double>(p, pool) : forward_as<float>(p, pool);
}

void backward(const Params& p, const Pool& pool) {
  p.q.type == Type::f64 ? backward_as<double>(p, pool) : backward_as<float>(p, pool);
}
#endif

#define CTK_TEXT_(x) #x
#define CTK_TEXT(x) CTK_TEXT_(x)
}  // namespace

const Kernels kernels = {CTK_TEXT(CTK_ISA), forward, backward};
}  // namespace ctk::cpu::CTK_ISA
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
