// The kernels of one type of rows, by the names of plan.h, and a table of them for the host.
//
// Plain kernels know spans, patterns, token dropout, ragged rows, several prefixes, grouped heads and causality.
// General ones know everything; they branch on the options of the call, the same way in all threads.
#pragma once
#include "backward_keys.cuh"
#include "backward_query.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "slices.cuh"

namespace ctk::cuda {

// Minimum blocks per multiprocessor, as in __launch_bounds__. 0: none, and the compiler may limit registers to fit one
// more block. 1: one block is enough, for kernels that would spill to fit a second one.
constexpr int forward_blocks(int element_bytes, int width) { return element_bytes == 4 || width == 80; }

constexpr int query_blocks(bool general) { return general; }

}  // namespace ctk::cuda

// extern "C", so that these are the very names of plan.h. BOUNDS: threads per block and, where it matters, minimum
// blocks per multiprocessor.
#define CTK_KERNEL(NAME, BOUNDS, ...) \
  extern "C" __global__ void __launch_bounds__ BOUNDS NAME(const __grid_constant__ Args args) { __VA_ARGS__(args); }

// TYPE: of the rows, NAME: its name.
#define CTK_DEFINE_SMALL(TYPE, NAME)                              \
  CTK_KERNEL(ctk_delta_##NAME, (LANE_THREADS), delta<TYPE>)       \
  CTK_KERNEL(ctk_fill_out_##NAME, (LANE_THREADS), fill_out<TYPE>) \
  CTK_KERNEL(ctk_merge_out_##NAME, (LANE_THREADS), merge_out<TYPE>)
#define CTK_LIST_SMALL(TYPE, NAME) \
  CTK_ENTRY(ctk_delta_##NAME) CTK_ENTRY(ctk_fill_out_##NAME) CTK_ENTRY(ctk_merge_out_##NAME)

// W: padded head dimension, VARIANT: plain or general, GENERAL: whether it is the latter.
#define CTK_DEFINE_FORWARD(TYPE, NAME, W, VARIANT, GENERAL)                                        \
  CTK_KERNEL(ctk_forward_##NAME##_##W##_##VARIANT,                                                 \
             (forward_shape(sizeof(TYPE), W, GENERAL).threads(), forward_blocks(sizeof(TYPE), W)), \
             forward<TYPE, W, GENERAL>)
#define CTK_LIST_FORWARD(TYPE, NAME, W, VARIANT, GENERAL) CTK_ENTRY(ctk_forward_##NAME##_##W##_##VARIANT)

#define CTK_DEFINE_QUERY(TYPE, NAME, W, VARIANT, GENERAL)                                                         \
  CTK_KERNEL(ctk_query_##NAME##_##W##_##VARIANT, (query_shape(sizeof(TYPE), W).threads(), query_blocks(GENERAL)), \
             backward_query<TYPE, W, GENERAL>)
#define CTK_LIST_QUERY(TYPE, NAME, W, VARIANT, GENERAL) CTK_ENTRY(ctk_query_##NAME##_##W##_##VARIANT)

#define CTK_DEFINE_KEYS(TYPE, NAME, PART, W, VARIANT, GENERAL, WITH_K, WITH_V)                  \
  CTK_KERNEL(ctk_keys##PART##_##NAME##_##W##_##VARIANT, (key_shape(sizeof(TYPE), W).threads()), \
             backward_keys<TYPE, W, GENERAL, WITH_K, WITH_V>)
#define CTK_LIST_KEYS(TYPE, NAME, PART, W, VARIANT, GENERAL, WITH_K, WITH_V) \
  CTK_ENTRY(ctk_keys##PART##_##NAME##_##W##_##VARIANT)

// Head dimensions above 256.
#define CTK_DEFINE_SLICES(TYPE, NAME)                                                                 \
  CTK_KERNEL(ctk_forward_##NAME##_512_general, (forward_shape(sizeof(TYPE), SLICED, true).threads()), \
             forward_slices<TYPE>)                                                                    \
  CTK_KERNEL(ctk_query_##NAME##_512_general, (query_shape(sizeof(TYPE), SLICED).threads()),           \
             backward_query_slices<TYPE>)                                                             \
  CTK_KERNEL(ctk_keys_dk_##NAME##_512_general, (key_shape(sizeof(TYPE), SLICED).threads()),           \
             backward_keys_slices<TYPE, true>)                                                        \
  CTK_KERNEL(ctk_keys_dv_##NAME##_512_general, (key_shape(sizeof(TYPE), SLICED).threads()),           \
             backward_keys_slices<TYPE, false>)
#define CTK_LIST_SLICES(TYPE, NAME)           \
  CTK_ENTRY(ctk_forward_##NAME##_512_general) \
  CTK_ENTRY(ctk_query_##NAME##_512_general)   \
  CTK_ENTRY(ctk_keys_dk_##NAME##_512_general) CTK_ENTRY(ctk_keys_dv_##NAME##_512_general)

// All of one variant; at D = 256 dk and dv have a kernel each.
#define CTK_WIDTH(DO, TYPE, NAME, W, VARIANT, GENERAL)                                      \
  DO##_FORWARD(TYPE, NAME, W, VARIANT, GENERAL) DO##_QUERY(TYPE, NAME, W, VARIANT, GENERAL) \
      DO##_KEYS(TYPE, NAME, , W, VARIANT, GENERAL, true, true)
#define CTK_WIDTH_256(DO, TYPE, NAME)                                                                \
  DO##_FORWARD(TYPE, NAME, 256, general, true) DO##_QUERY(TYPE, NAME, 256, general, true) DO##_KEYS( \
      TYPE, NAME, _dk, 256, general, true, true, false) DO##_KEYS(TYPE, NAME, _dv, 256, general, true, false, true)
#define CTK_GENERAL(DO, TYPE, NAME)                                                                                \
  DO##_SMALL(TYPE, NAME) CTK_WIDTH(DO, TYPE, NAME, 64, general, true) CTK_WIDTH(DO, TYPE, NAME, 80, general, true) \
      CTK_WIDTH(DO, TYPE, NAME, 96, general, true) CTK_WIDTH(DO, TYPE, NAME, 128, general, true)                   \
          CTK_WIDTH_256(DO, TYPE, NAME) DO##_SLICES(TYPE, NAME)
#define CTK_PLAIN(DO, TYPE, NAME)             \
  CTK_WIDTH(DO, TYPE, NAME, 64, plain, false) \
  CTK_WIDTH(DO, TYPE, NAME, 128, plain, false)

#define CTK_ENTRY(KERNEL) {#KERNEL, reinterpret_cast<const void*>(KERNEL)},
