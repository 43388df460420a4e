// Logits from products, in units of log 2, with everything that the general kernels know.
#pragma once
#include "walk.cuh"

namespace ctk::cuda {

// Within two units in the last place: a polynomial around zero, where 1 - 2 / (e^2x + 1) would cancel.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float a = fabsf(x), z = x * x;
  float p = fmaf(-0.005509968847036362f, z, 0.02046389691531658f);
  p = fmaf(p, z, -0.05368597432971001f);
  p = fmaf(p, z, 0.13330799341201782f);
  p = fmaf(p, z, -0.3333325982093811f);
  const float far = 1.0f - 2.0f / (exp2_fast(a * (2 * LOG2E_F)) + 1.0f);
  return a < 0.65f ? fmaf(x * z, p, x) : copysignf(far, x);
}

// The logit of one pair. distance: how many positions the key lies back; bias: of this key, 0 for own keys.
// slope: d logit / d (product * scale * log2 e).
__device__ __forceinline__ float logit(const Args& a, float product, float bias, float slope, int distance,
                                       float* derivative) {
  float x = product * a.factor;
  *derivative = 1.0f;
  if (a.cap != 0.0f) {
    const float t = tanh_accurate(x);
    x = t * a.cap;
    *derivative = 1.0f - t * t;
  }
  return fmaf(bias, LOG2E_F, fmaf(-slope, float(distance), x));
}

// The bias of prefix key `key`, 0 where there is none.
__device__ __forceinline__ float bias_of(const Args& a, const LaneTerms& terms, int key, int prefix_len) {
  return terms.bias && key < prefix_len ? terms.bias[key] : 0.0f;
}

}  // namespace ctk::cuda
