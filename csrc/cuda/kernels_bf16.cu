// Rows of bf16.
#include "instances.cuh"

namespace ctk::cuda {

CTK_GENERAL(CTK_DEFINE, bf16, bf16)
CTK_PLAIN(CTK_DEFINE, bf16, bf16)

extern const KernelEntry bf16_kernels[] = {CTK_GENERAL(CTK_LIST, bf16, bf16)
                                               CTK_PLAIN(CTK_LIST, bf16, bf16){nullptr, nullptr}};

}  // namespace ctk::cuda
