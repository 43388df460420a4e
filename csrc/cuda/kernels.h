// Host side of the build: finds the kernels that plan.h names.
#pragma once

namespace ctk::cuda {

// The kernel of this name as cudaLaunchKernel takes it, or null if this build has none.
const void* find_kernel(const char* name);

}  // namespace ctk::cuda
