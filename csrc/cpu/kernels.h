// The CPU kernels' interface. The same sources (kernels-inl.h) are built once per instruction set.
#pragma once
#include <functional>

#include "../params.h"

namespace ctk::cpu {

// Runs body(worker) for worker = 0 .. workers - 1, concurrently where it can; returns when all are done.
struct Pool {
  int workers;
  std::function<void(const std::function<void(int)>&)> run;
};

struct Kernels {
  const char* name;
  void (*forward)(const Params&, const Pool&);
  void (*backward)(const Params&, const Pool&);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

}  // namespace ctk::cpu
