// Rows of fp32, whose products are exact, or TF32 where the caller allows it.
#include "instances.cuh"

namespace ctk::cuda {

CTK_GENERAL(CTK_DEFINE, float, fp32)

extern const KernelEntry fp32_kernels[] = {CTK_GENERAL(CTK_LIST, float, fp32){nullptr, nullptr}};

}  // namespace ctk::cuda
