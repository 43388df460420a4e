// Who waits for whom: happens-before clocks, warp collectives, block barriers, threads that end.
#include <cstdlib>

#include "ptx_internal.h"

namespace ptx {

// ---------------------------------------------------------------------------------------------
// Happens-before clocks

VectorClock* new_clock(BlockState* b) {
  size_t n = b->fibers.size();
  VectorClock* c = (VectorClock*)malloc(sizeof(VectorClock) + n * sizeof(u32));
  c->references = 0;
  c->floor = 0;
  return c;
}

void release_clock(VectorClock* c) {
  if (c && --c->references == 0) free(c);
}

void set_clock(Fiber* t, VectorClock* c) {
  c->references++;
  release_clock(t->seen);
  t->seen = c;
}

VectorClock* joined_clock(BlockState* b, const Arrival* arrivals, size_t count) {
  size_t n = b->fibers.size();
  VectorClock* joined = new_clock(b);
  memcpy(joined->time, arrivals[0].seen->time, n * sizeof(u32));
  VectorClock* previous = arrivals[0].seen;
  for (size_t i = 1; i < count; i++) {
    VectorClock* c = arrivals[i].seen;
    if (c == previous) continue;
    previous = c;
    for (size_t k = 0; k < n; k++) joined->time[k] = std::max(joined->time[k], c->time[k]);
  }
  for (size_t i = 0; i < count; i++) {
    u32& own = joined->time[arrivals[i].fiber->linear];
    own = std::max(own, arrivals[i].now);
  }
  u32 low = joined->time[0];
  for (size_t k = 1; k < n; k++) low = std::min(low, joined->time[k]);
  joined->floor = low;
  return joined;
}

static void join_everyone(BlockState* b) {  // a barrier of all live threads
  u32 latest = b->clock_base;
  for (Fiber& f : b->fibers) latest = std::max(latest, f.now);
  VectorClock* c = new_clock(b);
  for (size_t k = 0; k < b->fibers.size(); k++) c->time[k] = latest;
  c->floor = latest;
  for (Fiber& f : b->fibers) {
    set_clock(&f, c);
    f.now = latest + 1;
  }
}

void join_clocks(BlockState* b, Arrival* arrivals, size_t count) {
  if (!(b->launch->config->checks & kCheckSharedRace)) return;
  size_t waiting = 0;
  for (size_t i = 0; i < count; i++) waiting += arrivals[i].waits;
  if (waiting == count && count == b->alive) return join_everyone(b);
  bool common = true;
  for (size_t i = 1; i < count; i++) common &= arrivals[i].seen == arrivals[0].seen;
  if (common && waiting == count && arrivals[0].seen->references == count) {
    for (size_t i = 0; i < count; i++) {  // nobody else looks at this clock: update it in place
      arrivals[i].seen->time[arrivals[i].fiber->linear] = arrivals[i].now;
      arrivals[i].fiber->now++;
    }
    return;
  }
  VectorClock* joined = joined_clock(b, arrivals, count);
  joined->references++;
  for (size_t i = 0; i < count; i++)
    if (arrivals[i].waits) {
      set_clock(arrivals[i].fiber, joined);
      arrivals[i].fiber->now++;
    }
  release_clock(joined);
}

// ---------------------------------------------------------------------------------------------
// Warp collectives

static void finish_collective(WarpState* w, size_t index, Fiber* running, bool ordering) {
  Collective c = w->pending[index];
  w->pending.erase(w->pending.begin() + index);
  c.lanes = w->lanes;
  c.body(c);
  BlockState* b = nullptr;
  Arrival arrivals[32];
  size_t count = 0;
  for (int lane = 0; lane < 32; lane++)
    if (c.arrived >> lane & 1) {
      b = w->lanes[lane]->owner;
      arrivals[count++] = arrival_of(w->lanes[lane], true, -1);
    }
  if (ordering && count) join_clocks(b, arrivals, count);
  if (b && b->launch->config->stats && (c.arrived | w->exited) == kAllLanes) flush_records(w);
  for (size_t i = 0; i < count; i++)
    if (arrivals[i].fiber != running) wake(arrivals[i].fiber);
}

static bool orders_memory(const Fiber* t, u64 key) {
  return !t->owner->launch->config->strict_warp_sync || key == 1;
}

void meet(Thread* thread, u32 mask, u64 key, const char* name, int instr, void* argument,
          void (*body)(Collective&)) {
  Fiber* t = fiber(thread);
  WarpState* w = t->warp;
  if (!(mask >> t->lane & 1))
    fail(t, kWarpSync, instr, 0, 0, "%s: the executing lane %u is not in its own mask 0x%08x", name,
         t->lane, mask);
  size_t index = 0;
  for (; index < w->pending.size(); index++) {
    Collective& c = w->pending[index];
    if (c.key == key && c.mask == mask && !(c.arrived >> t->lane & 1)) break;
  }
  if (index == w->pending.size()) w->pending.push_back(Collective{mask, 0, key, name, {}, body, nullptr});
  Collective& c = w->pending[index];
  c.arguments[t->lane] = argument;
  c.arrived |= 1u << t->lane;
  if (c.arrived == (mask & ~w->exited))
    finish_collective(w, index, t, orders_memory(t, key));
  else
    block_fiber(t, name, instr, mask);
}

void require_full_warp(Thread* thread, const char* name, int instr) {
  Fiber* t = fiber(thread);
  if (PTX_UNLIKELY(t->warp->exited))
    fail(t, kWarpSync, instr, 0, 0, "%s needs all 32 lanes of the warp; lanes 0x%08x do not exist or "
         "have exited", name, t->warp->exited);
}

void warp_sync(Thread* t, u32 mask, int instr) {
  meet(t, mask, 1, "bar.warp.sync", instr, nullptr, [](Collective&) {});
}

struct ShuffleArguments { ShuffleOp op; u32 value, b, c, result; bool in_range; };

u32 shuffle(Thread* t, ShuffleOp op, u32 value, u32 b, u32 c, u32 mask, bool* in_range, int instr) {
  ShuffleArguments mine{op, value, b, c, 0, false};
  meet(t, mask, 16 + op, "shfl.sync", instr, &mine, [](Collective& group) {
    for (int lane = 0; lane < 32; lane++) {
      if (!(group.arrived >> lane & 1)) continue;
      ShuffleArguments& s = *(ShuffleArguments*)group.arguments[lane];
      int segment = (s.c >> 8) & 31, clamp = s.c & 31, b = s.b & 31;
      int last = (lane & segment) | (clamp & ~segment), first = lane & segment, from;
      switch (s.op) {
        case kUp: from = lane - b; s.in_range = from >= last; break;
        case kDown: from = lane + b; s.in_range = from <= last; break;
        case kBfly: from = lane ^ b; s.in_range = from <= last; break;
        default: from = first | (b & ~segment); s.in_range = from <= last;
      }
      if (!s.in_range) from = lane;
      bool present = from >= 0 && from < 32 && (group.arrived >> from & 1);
      s.result = present ? ((ShuffleArguments*)group.arguments[from])->value : 0xdeadbeef;
    }
  });
  if (in_range) *in_range = mine.in_range;
  return mine.result;
}

struct ValueArguments { u32 op; u64 value; u32 result; };

u32 vote(Thread* t, VoteOp op, bool predicate, u32 mask, int instr) {
  ValueArguments mine{op, predicate, 0};
  meet(t, mask, 32 + op, "vote.sync", instr, &mine, [](Collective& group) {
    u32 ballot = 0;
    for (int lane = 0; lane < 32; lane++)
      if ((group.arrived >> lane & 1) && ((ValueArguments*)group.arguments[lane])->value)
        ballot |= 1u << lane;
    for (int lane = 0; lane < 32; lane++)
      if (group.arrived >> lane & 1) {
        ValueArguments& v = *(ValueArguments*)group.arguments[lane];
        v.result = v.op == kAll   ? ballot == group.arrived
                   : v.op == kAny ? ballot != 0
                   : v.op == kUni ? (ballot == 0 || ballot == group.arrived)
                                  : ballot;
      }
  });
  return mine.result;
}

static void match_body(Collective& group) {
  for (int lane = 0; lane < 32; lane++)
    if (group.arrived >> lane & 1) {
      ValueArguments& v = *(ValueArguments*)group.arguments[lane];
      v.result = 0;
      for (int k = 0; k < 32; k++)
        if ((group.arrived >> k & 1) && ((ValueArguments*)group.arguments[k])->value == v.value)
          v.result |= 1u << k;
    }
}

u32 match_any(Thread* t, u64 value, u32 mask, int instr) {
  ValueArguments mine{0, value, 0};
  meet(t, mask, 48, "match.any.sync", instr, &mine, match_body);
  return mine.result;
}

u32 match_all(Thread* t, u64 value, u32 mask, bool* same, int instr) {
  ValueArguments mine{0, value, 0};
  meet(t, mask, 49, "match.all.sync", instr, &mine, match_body);
  bool all = mine.result == (mask & ~fiber(t)->warp->exited);
  if (same) *same = all;
  return all ? mask : 0;
}

u32 reduce(Thread* t, ReduceOp op, u32 value, u32 mask, int instr) {
  ValueArguments mine{op, value, 0};
  meet(t, mask, 64 + op, "redux.sync", instr, &mine, [](Collective& group) {
    bool first = true;
    u32 r = 0;
    for (int lane = 0; lane < 32; lane++) {
      if (!(group.arrived >> lane & 1)) continue;
      ValueArguments& v = *(ValueArguments*)group.arguments[lane];
      u32 x = (u32)v.value;
      if (first) { r = x; first = false; continue; }
      switch (v.op) {
        case kAdd: r += x; break;
        case kMinSigned: r = (u32)std::min((s32)r, (s32)x); break;
        case kMaxSigned: r = (u32)std::max((s32)r, (s32)x); break;
        case kMinUnsigned: r = std::min(r, x); break;
        case kMaxUnsigned: r = std::max(r, x); break;
        case kAnd: r &= x; break;
        case kOr: r |= x; break;
        case kXor: r ^= x; break;
        case kMinFloat: r = bits(float_min(as_f32(r), as_f32(x))); break;
        default: r = bits(float_max(as_f32(r), as_f32(x)));
      }
    }
    for (int lane = 0; lane < 32; lane++)
      if (group.arrived >> lane & 1) ((ValueArguments*)group.arguments[lane])->result = r;
  });
  return mine.result;
}

u32 active_mask(Thread* t) { return ~fiber(t)->warp->exited; }

// ---------------------------------------------------------------------------------------------
// Block barriers

static void finish_barrier(BlockState* b, Barrier& bar, Fiber* running) {
  bar.result_count = bar.count;
  bar.result_all = bar.all;
  bar.result_any = bar.any;
  std::vector<Arrival> arrivals;
  arrivals.swap(bar.arrivals);
  bar.expected = 0;
  join_clocks(b, arrivals.data(), arrivals.size());
  if (b->launch->config->stats)
    for (Arrival& a : arrivals)
      if (a.fiber->lane == 0) flush_records(a.fiber->warp);
  for (Arrival& a : arrivals) {
    if (!a.waits) release_clock(a.seen);
    if (a.waits && a.fiber != running) wake(a.fiber);
  }
}

// Returns true when this arrival completed the barrier.
static bool arrive_at(Fiber* t, u32 id, u32 count, bool waits, bool aligned, bool predicate, int instr) {
  BlockState* b = t->owner;
  if (id > 16) fail(t, kInvalid, instr, 0, 0, "barrier %u does not exist (0..15)", id);
  if (count % 32) fail(t, kInvalid, instr, 0, 0, "barrier thread count %u is not a multiple of 32", count);
  Barrier& bar = b->barriers[id];
  if (bar.arrivals.empty()) {
    bar.all = true;
    bar.any = false;
    bar.count = 0;
    bar.expected = count;
  }
  if (checks(t) & kCheckSync) {
    if (bar.expected != count) {
      fault_other_instr = bar.arrivals[0].instr;
      fail(t, kBarrierDivergence, instr, 0, 0,
           "barrier %u: this thread expects %u threads but others wait at {instr:%d} for %u", id, count,
           bar.arrivals[0].instr, bar.expected);
    }
    // Threads of a warp arrive together. Without a count this is __syncthreads, which all threads reach on one path
    // (CUDA C++ programming guide, synchronization functions).
    if (aligned)
      for (const Arrival& a : bar.arrivals)
        if (a.instr != instr && (!count || a.fiber->warp == t->warp)) {
          fault_other_instr = a.instr;
          fail(t, kBarrierDivergence, instr, 0, 0,
               "barrier %u: thread %u of the same %s waits at a different barrier instruction, {instr:%d}", id,
               a.fiber->linear, a.fiber->warp == t->warp ? "warp" : "block", a.instr);
        }
  }
  bar.all &= predicate;
  bar.any |= predicate;
  bar.count += predicate;
  bar.arrivals.push_back(arrival_of(t, waits, instr));
  if (!waits && t->seen) {
    t->seen->references++;
    t->now++;
  }
  u32 needed = count ? count : b->alive;
  if (bar.arrivals.size() < needed) return false;
  finish_barrier(b, bar, t);
  return true;
}

void barrier_sync(Thread* thread, u32 id, u32 count, bool aligned, int instr) {
  Fiber* t = fiber(thread);
  if (!arrive_at(t, id, count, true, aligned, false, instr)) block_fiber(t, "bar.sync", instr, id);
}

u32 barrier_reduce(Thread* thread, u32 id, u32 count, VoteOp op, bool predicate, bool aligned, int instr) {
  Fiber* t = fiber(thread);
  if (!arrive_at(t, id, count, true, aligned, predicate, instr)) block_fiber(t, "bar.red", instr, id);
  const Barrier& bar = t->owner->barriers[id];
  return op == kAll ? bar.result_all : op == kAny ? bar.result_any : bar.result_count;
}

void barrier_arrive(Thread* thread, u32 id, u32 count, int instr) {
  arrive_at(fiber(thread), id, count, false, true, false, instr);
}

// ---------------------------------------------------------------------------------------------
// The end of a thread

void thread_exit(Fiber* t) {
  BlockState* b = t->owner;
  async_wait(t, -1);
  wgmma_wait(t, 0);
  t->state = kDone;
  b->alive--;
  WarpState* w = t->warp;
  w->exited |= 1u << t->lane;
  for (size_t i = 0; i < w->pending.size();) {
    const Collective& c = w->pending[i];
    if (c.arrived && c.arrived == (c.mask & ~w->exited)) {
      finish_collective(w, i, nullptr, orders_memory(t, c.key));
      i = 0;
    } else {
      i++;
    }
  }
  for (Barrier& bar : b->barriers)
    if (!bar.arrivals.empty() && !bar.expected && bar.arrivals.size() >= b->alive) finish_barrier(b, bar, nullptr);
  if (w->exited == kAllLanes && b->launch->config->stats) flush_records(w);
}

}  // namespace ptx
