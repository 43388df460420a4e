// Kernels that do not depend on the type of the rows, and the list of all.
#include <cstring>

#include "instances.cuh"

namespace ctk::cuda {

CTK_KERNEL(ctk_setup_rows, (SETUP_THREADS), setup_rows)
CTK_KERNEL(ctk_setup_tiles, (SETUP_THREADS), setup_tiles)
CTK_KERNEL(ctk_pack, (PACK_THREADS), pack)
CTK_KERNEL(ctk_sum_parts, (LANE_THREADS), sum_parts)

extern const KernelEntry bf16_kernels[], fp16_kernels[], fp32_kernels[];
static const KernelEntry common[] = {CTK_ENTRY(ctk_setup_rows) CTK_ENTRY(ctk_setup_tiles) CTK_ENTRY(ctk_pack)
                                         CTK_ENTRY(ctk_sum_parts){nullptr, nullptr}};

const KernelEntry* kernels_of(Type rows) {
  return rows == Type::bf16 ? bf16_kernels : rows == Type::f16 ? fp16_kernels : fp32_kernels;
}

const KernelEntry* common_kernels() { return common; }

const void* find_kernel(const char* name) {
  for (const KernelEntry* table : {common, bf16_kernels, fp16_kernels, fp32_kernels})
    for (const KernelEntry* entry = table; entry->name; ++entry)
      if (!std::strcmp(entry->name, name)) return entry->kernel;
  return nullptr;
}

}  // namespace ctk::cuda
