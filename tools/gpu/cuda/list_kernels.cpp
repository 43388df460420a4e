// For build.py: a line "name threads shared" for each kernel that csrc/cuda/plan.h can name.
#include <cstdio>

#include "planned_kernels.h"

int main() {
  for (const auto& [name, launch] : ctk::cuda::planned::kernels())
    std::printf("%s %u %u\n", name.c_str(), launch.first, launch.second);
}
