// The kernels for any machine: 16-byte vectors, which every 64-bit target of GCC and Clang has.
#include "common.h"

#define CTK_ISA portable
#define CTK_VECTOR_BYTES 16
#include "kernels-inl.h"
