// Sums of products inside a tensor core.
//
//     exponent <- the largest of c, a_1 b_1, ..., a_n b_n
//     each term <- truncated to F bits behind the binary point of 2^exponent
//     c <- their exact sum, truncated to float
//
// Products are exact, every addition in between is too, and truncation is towards zero.  The exponent of a product is
// the sum of its factors' exponents.  What was measured on hardware:
//
//     F       23 on V100, 24 on A100, 25 on H100 and B200; 13 with 8-bit floats on Ada and Hopper
//     n       16 bytes of a row of A on A100, 32 bytes on H100; a longer row is added in that many steps
//
// Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021;
// Xie et al., MMA-Sim, arXiv:2511.10909, 2025; Khattak and Mikaitis, Accurate models of NVIDIA tensor cores,
// arXiv:2512.07004, 2025; for 8-bit floats DeepSeek-AI, DeepSeek-V3 technical report, arXiv:2412.19437, 2024.
#include "ptx_internal.h"

namespace ptx {

static s32 lowest_exponent(ElementType type) {
  switch (type) {
    case kF16: case kE5M2: return -14;
    case kE4M3: return -6;
    default: return -126;
  }
}

// Of a float that holds a number of a type with that lowest exponent.  Zero does not take part.
static inline s32 exponent_of(float x, s32 lowest) {
  s32 exponent = (s32)(bits(x) >> 23 & 255) - 127;
  return x == 0 ? -1000 : std::max(exponent, lowest);
}

// 2^exponent
static inline double power_of_two(s32 exponent) { return as_f64((u64)(1023 + exponent) << 52); }

// Towards zero, to the 24 bits of a float.
static inline float truncated(double x) { return (float)as_f64(bits(x) & ~((1ull << 29) - 1)); }

TensorCore::TensorCore(ElementType a, ElementType b, u32 step_bytes, u32 guard_bits)
    : a_lowest_(lowest_exponent(a)), b_lowest_(lowest_exponent(b)),
      fraction_bits_(element_bytes(a) == 1 ? 13 : 23 + (s32)guard_bits), terms_(step_bytes / element_bytes(a)) {}

void TensorCore::add_products(float* sums, const float* a, const float* b, u32 k_size, u32 n_size) const {
  s32 exponents[256];
  double scales[256], totals[256];
  for (u32 first = 0; first < k_size; first += terms_) {
    const u32 end = std::min(first + terms_, k_size);
    for (u32 n = 0; n < n_size; n++) exponents[n] = std::max(exponent_of(sums[n], -126), -126);
    for (u32 k = first; k < end; k++) {
      const s32 exponent = exponent_of(a[k], a_lowest_);
      for (u32 n = 0; n < n_size; n++)
        exponents[n] = std::max(exponents[n], exponent + exponent_of(b[k * n_size + n], b_lowest_));
    }
    for (u32 n = 0; n < n_size; n++) {
      scales[n] = power_of_two(fraction_bits_ - exponents[n]);
      totals[n] = __builtin_trunc(sums[n] * scales[n]);
    }
    for (u32 k = first; k < end; k++)
      for (u32 n = 0; n < n_size; n++)
        totals[n] += __builtin_trunc((double)a[k] * b[k * n_size + n] * scales[n]);
    for (u32 n = 0; n < n_size; n++) sums[n] = truncated(totals[n] * power_of_two(exponents[n] - fraction_bits_));
  }
}

}  // namespace ptx
