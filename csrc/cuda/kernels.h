// Host side of the build: the kernels that plan.h names.
#pragma once
#include "../params.h"

namespace ctk::cuda {

struct KernelEntry {
  const char* name;
  const void* kernel;  // as cudaLaunchKernel takes it
};

// Tables of this build, which end with a null name: the kernels for rows of one type, and those that serve every type.
const KernelEntry* kernels_of(Type rows);
const KernelEntry* common_kernels();

// The kernel of this name, or null if this build has none.
const void* find_kernel(const char* name);

}  // namespace ctk::cuda
