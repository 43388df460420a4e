// plan.h for Python: the launches and the argument of a call, exactly as the bindings get them.
#include "../../../csrc/cuda/plan.h"

using namespace ctk::cuda;

extern "C" {

int64_t size_of_call() { return sizeof(Call); }
int64_t size_of_args() { return sizeof(Args); }
int64_t size_of_launch() { return sizeof(Launch); }

// Returns the number of launches, of which at most `capacity` are written. only_tables: plan_tables.
int plan(const Call* call, int multiprocessors, int backward, int only_tables, void* workspace, void* tables,
         Args* args, Launch* launches, int capacity, int64_t* workspace_bytes) {
  const Device device{multiprocessors};
  const Plan plan = only_tables ? plan_tables(*call, device, workspace, backward)
                    : backward  ? plan_backward(*call, device, workspace, tables)
                                : plan_forward(*call, device, workspace, tables);
  *args = plan.args, *workspace_bytes = plan.workspace_bytes;
  for (size_t i = 0; i < plan.launches.size() && int(i) < capacity; ++i) launches[i] = plan.launches[i];
  return int(plan.launches.size());
}
}
