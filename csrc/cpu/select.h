// Which build of the kernels runs: the best that the machine supports, unless one is asked for.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace ctk::cpu {

// Builds that this machine can run, best first.
inline std::vector<const Kernels*> available() {
  std::vector<const Kernels*> builds;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) builds.push_back(&avx512_bf16::kernels);
    builds.push_back(&avx512::kernels);
  }
  if (has_avx2) builds.push_back(&avx2::kernels);
#endif
  builds.push_back(&portable::kernels);
  return builds;
}

inline const Kernels*& selected() {
  static const Kernels* kernels = available().front();
  return kernels;
}

}  // namespace ctk::cpu
