// Rows of fp16.
#include "instances.cuh"

namespace ctk::cuda {

CTK_GENERAL(CTK_DEFINE, fp16, fp16)
CTK_PLAIN(CTK_DEFINE, fp16, fp16)

extern const KernelEntry fp16_kernels[] = {CTK_GENERAL(CTK_LIST, fp16, fp16)
                                               CTK_PLAIN(CTK_LIST, fp16, fp16){nullptr, nullptr}};

}  // namespace ctk::cuda
