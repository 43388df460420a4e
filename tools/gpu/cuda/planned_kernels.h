// Every kernel that csrc/cuda/plan.h can name, with what it is launched with. Calls of every type, head dimension and
// variant are planned; nothing is launched.
#pragma once
#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "../../../csrc/cuda/plan.h"

namespace ctk::cuda::planned {

inline void* const SOMEWHERE = reinterpret_cast<void*>(1 << 20);  // aligned, and never read

// Multiprocessors: so many that whatever can be cut into ranges is, and so few that nothing is.
constexpr Device DEVICES[] = {Device{1024}, Device{1}};

// 16 rows of 64 queries over 1024 keys, 4 heads per group: tiles that are full, and enough keys to be split.
inline Call call_of(Type type, int64_t D, bool general, bool bias) {
  constexpr int64_t B = 16, H = 8, Hk = 2, S = 64, P = 1024;
  const auto tensor = [&](Type t, int64_t heads, int64_t tokens) {
    return Tensor4{SOMEWHERE, t, heads * tokens * D, tokens * D, D};
  };
  Call call;
  Params& p = call.p;
  p = Params{};
  p.B = B, p.H = H, p.Hk = Hk, p.D = p.Dv = D, p.G = 1, p.P = P;
  p.scale = 1, p.causal = true, p.softcap = general ? 30 : 0;
  p.q = p.out = p.dout = p.dq = tensor(type, H, S);
  p.k = p.v = p.dk = p.dv = tensor(type, Hk, S);
  p.prefix_k = p.prefix_v = p.dprefix_k = p.dprefix_v = tensor(Type::f32, Hk, P);
  p.lse = {SOMEWHERE, Type::f32, H * S, S, 1};
  if (bias) p.bias = p.dbias = SOMEWHERE, p.bias_head = p.dbias_head = P;
  call.S = call.T = S;
  call.seq_lens.data = SOMEWHERE;
  return call;
}

// Name -> threads, and the most shared memory in bytes.
inline std::map<std::string, std::pair<uint32_t, uint32_t>> kernels() {
  std::map<std::string, std::pair<uint32_t, uint32_t>> found;
  for (Type type : {Type::bf16, Type::f16, Type::f32})
    for (int width : WIDTHS)
      for (bool general : {false, true})
        for (bool bias : {false, true})
          for (const Device& device : DEVICES) {
            const Call call = call_of(type, width, general, bias);
            for (const Plan& plan : {plan_forward(call, device, SOMEWHERE), plan_backward(call, device, SOMEWHERE)})
              for (const Launch& l : plan.launches) {
                auto& [threads, shared] = found[l.name];
                threads = l.block, shared = std::max(shared, l.shared);
              }
          }
  return found;
}

}  // namespace ctk::cuda::planned
