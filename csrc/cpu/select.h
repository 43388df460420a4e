// Which build of the kernels runs: the best that the machine supports, unless one is asked for.
#pragma once
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace ctk::cpu {

// Whether the CPU has AMX for bf16 and the system lets this process use it. Linux must be asked for the state of the
// tile registers, once per process; on other systems nobody is asked, and AMX stays unused.
inline bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned TILE_STATE = 3u << 17, BF16 = 1u << 22, TILES = 1u << 24;  // bits of XCR0; of leaf 7
  constexpr long ASK_PERMISSION = 0x1023, TILE_DATA = 18;                       // arch_prctl(2)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILES)) != (BF16 | TILES)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, ASK_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

// Builds that this machine can run, best first.
inline std::vector<const Kernels*> available() {
  std::vector<const Kernels*> builds;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      static const bool has_amx = may_use_amx();
      if (has_amx) builds.push_back(&amx::kernels);
      builds.push_back(&avx512_bf16::kernels);
    }
    builds.push_back(&avx512::kernels);
    // on Intel converting to fp32 is faster than multiplying bf16 by vectors (docs/performance.md)
    if (__builtin_cpu_is("intel") && builds.size() > 1) std::swap(builds[builds.size() - 2], builds.back());
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
