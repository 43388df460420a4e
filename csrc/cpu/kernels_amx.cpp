// The bf16 kernels for AMX beside AVX-512 with BF16; other types are those of AVX-512. Empty where the target is not
// x86-64.
#include "common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
#endif

#define CTK_ISA amx
#define CTK_EXTENDS avx512
#define CTK_BF16
#define CTK_AMX
#define CTK_VECTOR_BYTES 64
#include "kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
