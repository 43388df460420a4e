// Fibers, faults, and running the blocks of a grid.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "ptx_internal.h"

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64"
#endif

namespace ptx {

thread_local Fiber* current_fiber;
static thread_local void* scheduler_stack;

// ---------------------------------------------------------------------------------------------
// Fibers

extern "C" void ptx_switch_stack(void** save, void* next);
asm(R"(
.text
.globl ptx_switch_stack
.type ptx_switch_stack,@function
ptx_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

static void to_scheduler(Fiber* t) {
  ptx_switch_stack(&t->stack_pointer, scheduler_stack);
  current_fiber = t;
}

void block_fiber(Fiber* t, const char* what, int instr, s64 id) {
  t->state = kBlocked;
  t->waiting_for = what;
  t->waiting_instr = instr;
  t->waiting_id = id;
  to_scheduler(t);
}

void wake(Fiber* t) {
  if (t->state != kBlocked) return;
  t->state = kReady;
  t->owner->queue.push_back(t);
}

void yield(Fiber* t) {
  t->owner->queue.push_back(t);
  to_scheduler(t);
}

const int kFuel = 20000;

void out_of_fuel(Thread* thread, int instr) {
  Fiber* t = fiber(thread);
  t->fuel = kFuel;
  if (t->owner->launch->failed) fail(t, kInvalid, instr, 0, 0, "another block failed");
  if (std::chrono::steady_clock::now() > t->owner->launch->deadline)
    fail(t, kTimeout, instr, 0, 0, "the launch exceeded its time limit of %.0f s in a loop",
         t->owner->launch->config->timeout_seconds);
  yield(t);
}

static void report(Launch* launch, Fiber* t, FaultKind kind, int instr, int other, u64 address,
                   u32 bytes, const char* message) {
  std::lock_guard<std::mutex> guard(launch->mutex);
  if (launch->failed.exchange(1)) return;
  Fault* f = launch->fault;
  f->kind = kind;
  f->instr = instr;
  f->other_instr = other;
  f->address = address;
  f->bytes = bytes;
  if (t) {
    memcpy(f->block, t->block->ctaid, sizeof f->block);
    memcpy(f->thread, t->tid, sizeof f->thread);
  }
  snprintf(f->message, sizeof f->message, "%s", message);
}

thread_local int fault_other_instr = -1;

void fail(Thread* thread, FaultKind kind, int instr, u64 address, u32 bytes, const char* format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Fiber* t = fiber(thread);
  report(t->owner->launch, t, kind, instr, fault_other_instr, address, bytes, text);
  fault_other_instr = -1;
  t->owner->aborted = true;
  void* unused;
  ptx_switch_stack(&unused, scheduler_stack);
  abort();  // not reached: an aborted block is never resumed
}

// ---------------------------------------------------------------------------------------------
// Running a grid

static void fiber_main() {
  Fiber* t = current_fiber;
  t->owner->launch->kernel(t);
  thread_exit(t);
  void* unused;
  ptx_switch_stack(&unused, scheduler_stack);
  abort();
}

static std::string ranges_of(const std::vector<u32>& threads) {
  std::string out;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) j++;
    char text[32];
    if (i == j) snprintf(text, sizeof text, "%s%u", out.empty() ? "" : ",", threads[i]);
    else snprintf(text, sizeof text, "%s%u-%u", out.empty() ? "" : ",", threads[i], threads[j]);
    if (out.size() > 150) return out + ",...";
    out += text;
    i = j + 1;
  }
  return out;
}

static void report_deadlock(BlockState* b) {
  std::map<std::string, std::vector<u32>> groups;
  std::vector<u32> exited;
  Fiber* example = nullptr;
  for (Fiber& t : b->fibers) {
    if (t.state == kDone) { exited.push_back(t.linear); continue; }
    if (!example) example = &t;
    char text[200];
    std::string name = t.waiting_for;
    if (name.compare(0, 4, "bar.") == 0 && name != "bar.warp.sync") {
      Barrier& bar = b->barriers[t.waiting_id];
      snprintf(text, sizeof text, "%s %d at {instr:%d} (%zu of %u threads have arrived)", t.waiting_for,
               (int)t.waiting_id, t.waiting_instr, bar.arrivals.size(), bar.expected ? bar.expected : b->alive);
    } else if (name == "mbarrier.try_wait") {
      MBarrier& m = b->mbarriers[(u32)t.waiting_id];
      snprintf(text, sizeof text, "mbarrier.try_wait on shared offset %u at {instr:%d} (phase %u, %u arrivals and %lld bytes missing)",
               (u32)t.waiting_id, t.waiting_instr, m.phase, m.pending, (long long)m.bytes);
    } else if (name == "setmaxnreg") {
      snprintf(text, sizeof text, "setmaxnreg at {instr:%d} for %d registers (their thread has %u, and %u are free in the block)",
               t.waiting_instr, (int)t.waiting_id, t.register_limit, b->free_registers);
    } else {
      snprintf(text, sizeof text, "%s at {instr:%d} for lanes 0x%08x", t.waiting_for, t.waiting_instr, (u32)t.waiting_id);
    }
    groups[text].push_back(t.linear);
  }
  std::string message = "deadlock: no thread of the block can run";
  for (auto& g : groups) message += "; threads " + ranges_of(g.second) + " wait in " + g.first;
  if (!exited.empty()) message += "; threads " + ranges_of(exited) + " have exited";
  report(b->launch, example, kDeadlock, example->waiting_instr, -1, 0, 0, message.c_str());
}

static void start_block(BlockState* b, u64 index, u8* stacks) {
  const LaunchConfig& config = *b->launch->config;
  b->index = index;
  b->ctaid[0] = index % config.grid[0];
  b->ctaid[1] = index / config.grid[0] % config.grid[1];
  b->ctaid[2] = (u32)(index / config.grid[0] / config.grid[1]);
  memset(b->shared_memory, 0xff, b->shared_bytes);
  std::fill(b->initialised.begin(), b->initialised.end(), 0);
  b->alive = (u32)b->fibers.size();
  b->queue.clear();
  b->warpgroups.clear();
  b->mbarriers.clear();
  b->free_registers = 0;
  b->register_waiters.clear();
  b->aborted = false;
  b->random = (config.seed + 1) * 0x9E3779B97F4A7C15ull + index * 0xD1B54A32D192ED03ull;
  for (Barrier& bar : b->barriers) { bar.arrivals.clear(); bar.expected = 0; }
  for (WarpState& w : b->warps) { w.pending.clear(); w.exited = 0; memset(w.lanes, 0, sizeof w.lanes); }
  for (Fiber& t : b->fibers) b->clock_base = std::max(b->clock_base, t.now);
  VectorClock* clock = new_clock(b);
  clock->floor = b->clock_base;
  for (size_t k = 0; k < b->fibers.size(); k++) clock->time[k] = b->clock_base;
  for (u32 i = 0; i < b->fibers.size(); i++) {
    Fiber& t = b->fibers[i];
    t.block = b;
    t.owner = b;
    t.linear = i;
    t.lane = i % 32;
    t.warp = &b->warps[i / 32];
    t.warp->lanes[t.lane] = &t;
    t.tid[0] = i % config.block[0];
    t.tid[1] = i / config.block[0] % config.block[1];
    t.tid[2] = i / config.block[0] / config.block[1];
    t.shared = b->shared_memory;
    t.shared_bytes = b->shared_bytes;
    t.params = config.params;
    t.executed = b->executed.data();
    t.fuel = kFuel;
    t.state = kReady;
    t.waiting_for = "";
    t.copies.clear();
    t.copy_group = 0;
    t.wgmma_reads.clear();
    t.wgmma_group = t.wgmma_done = 0;
    t.wgmma_fenced = false;
    t.proxy_fences.clear();
    release_clock(t.seen_at_proxy_fence);
    t.seen_at_proxy_fence = nullptr;
    t.register_limit = config.registers;
    t.records.clear();
    t.last_range = 0;
    t.now = b->clock_base + 1;
    set_clock(&t, clock);
    t.stack = stacks + config.stack_bytes * i;
    u64* top = (u64*)(t.stack + config.stack_bytes);
    *--top = 0;
    *--top = (u64)(void*)fiber_main;
    for (int k = 0; k < 6; k++) *--top = 0;  // callee-saved registers
    t.stack_pointer = top;
    b->queue.push_back(&t);
  }
  for (WarpState& w : b->warps)
    for (int lane = 0; lane < 32; lane++)
      if (!w.lanes[lane]) w.exited |= 1u << lane;
}

static void run_block(BlockState* b) {
  bool shuffle_order = b->launch->config->seed != 0;
  while (!b->queue.empty() && !b->aborted) {
    Fiber* t;
    if (shuffle_order) {
      b->random ^= b->random << 13;
      b->random ^= b->random >> 7;
      b->random ^= b->random << 17;
      std::swap(b->queue[b->random % b->queue.size()], b->queue.back());
      t = b->queue.back();
      b->queue.pop_back();
    } else {
      t = b->queue.front();
      b->queue.pop_front();
    }
    current_fiber = t;
    ptx_switch_stack(&scheduler_stack, t->stack_pointer);
    current_fiber = nullptr;
  }
  if (!b->aborted && b->alive) report_deadlock(b);
}

static void work(Launch* launch, std::mutex* merge) {
  LaunchConfig& config = *launch->config;
  u32 threads = config.block[0] * config.block[1] * config.block[2];
  u64 blocks = (u64)config.grid[0] * config.grid[1] * config.grid[2];
  size_t stack_total = (size_t)config.stack_bytes * threads;
  u8* stacks = (u8*)mmap(nullptr, stack_total, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  BlockState* b = new BlockState();
  b->launch = launch;
  for (int k = 0; k < 3; k++) { b->nctaid[k] = config.grid[k]; b->ntid[k] = config.block[k]; }
  b->static_shared = (config.static_shared + 15) & ~15u;
  b->shared_bytes = b->static_shared + config.dynamic_shared;
  b->fibers.resize(threads);
  b->warps.resize((threads + 31) / 32);
  b->warp_count = (u32)b->warps.size();
  b->shared_memory = (u8*)aligned_alloc(1024, (b->shared_bytes + 2047) & ~1023u);
  if (PTX_LEVEL >= 1) b->initialised.resize(b->shared_bytes + 16);
  if (config.checks & kCheckSharedRace) {
    size_t words = b->shared_bytes / 4 + 4;
    b->writes.resize(words * 4);
    b->reads.resize(words * 2 * b->warp_count);
    b->newest_read.resize(words);
  }
  if (PTX_LEVEL >= 2) {
    b->executed.resize(config.instruction_count);
    b->stats.resize(config.instruction_count);
  }
  for (;;) {
    u64 index = launch->next_block++;
    if (index >= blocks || launch->failed) break;
    start_block(b, index, stacks);
    run_block(b);
  }
  if (PTX_LEVEL >= 2) {
    std::lock_guard<std::mutex> guard(*merge);
    const u64* from = (const u64*)b->stats.data();
    u64* to = (u64*)config.stats;
    for (u32 i = 0; i < config.instruction_count; i++) config.executed[i] += b->executed[i];
    for (size_t i = 0; i < b->stats.size() * sizeof(InstructionStats) / 8; i++) to[i] += from[i];
    config.max_shared_touched = std::max<u64>(config.max_shared_touched, b->max_touched);
  }
  for (Fiber& t : b->fibers) release_clock(t.seen), release_clock(t.seen_at_proxy_fence);
  munmap(stacks, stack_total);
  free(b->shared_memory);
  delete b;
}

template <class T> static T* lazy_zeros(u64 count) {
  return (T*)mmap(nullptr, count * sizeof(T) + 64, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

int run_grid(void (*kernel)(Thread*), LaunchConfig* config, Fault* fault) {
  Launch launch;
  launch.config = config;
  launch.kernel = kernel;
  launch.next_block = 0;
  launch.failed = 0;
  launch.fault = fault;
  launch.stripes = std::vector<std::atomic_flag>(4096);
  launch.deadline = std::chrono::steady_clock::now() +
                    std::chrono::milliseconds((long long)(config->timeout_seconds * 1000));
  for (u32 i = 0; i < config->range_count; i++) {
    GlobalRange r{config->range_begin[i], config->range_end[i], nullptr, nullptr, nullptr, nullptr};
    u64 n = r.end - r.begin;
    if (config->checks & kCheckGlobalRace) { r.writer = lazy_zeros<u32>(n); r.reader = lazy_zeros<u32>(n); }
    if (PTX_LEVEL >= 2) { r.read = lazy_zeros<u8>(n); r.written = lazy_zeros<u8>(n); }
    launch.ranges.push_back(r);
  }
  u64 blocks = (u64)config->grid[0] * config->grid[1] * config->grid[2];
  u32 workers = (u32)std::min<u64>(std::max(config->workers, 1u), blocks);
  std::mutex merge;
  std::vector<std::thread> pool;
  for (u32 i = 0; i < workers; i++) pool.emplace_back(work, &launch, &merge);
  for (std::thread& worker : pool) worker.join();
  for (GlobalRange& r : launch.ranges) {
    u64 n = r.end - r.begin;
    if (r.read) {
      for (u64 i = 0; i < n; i++) {
        config->bytes_read += r.read[i];
        config->bytes_written += r.written[i];
        config->bytes_touched += r.read[i] | r.written[i];
      }
      munmap(r.read, n + 64);
      munmap(r.written, n + 64);
    }
    if (r.writer) { munmap(r.writer, n * 4 + 64); munmap(r.reader, n * 4 + 64); }
  }
  return launch.failed;
}

}  // namespace ptx
