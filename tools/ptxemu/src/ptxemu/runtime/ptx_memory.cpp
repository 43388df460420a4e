// Checked accesses to shared and global memory.
#include <cstdio>

#include "ptx_internal.h"

namespace ptx {

// ---------------------------------------------------------------------------------------------
// Shared memory

void shared_fault(Thread* t, u32 offset, u32 bytes, int instr) {
  if ((u64)offset + bytes > t->shared_bytes)
    fail(t, kOutOfBounds, instr, offset, bytes,
         "shared memory access of %u bytes at offset %u is outside the block's %u bytes", bytes, offset,
         t->shared_bytes);
  fail(t, kMisaligned, instr, offset, bytes,
       "shared memory access of %u bytes at offset %u is not %u-byte aligned", bytes, offset, bytes);
}

void local_fault(Thread* t, u64 offset, u32 bytes, u64 size, int instr) {
  fail(t, kOutOfBounds, instr, offset, bytes,
       "local memory access of %u bytes at offset %lld is outside the function's %llu bytes", bytes,
       (long long)offset, (unsigned long long)size);
}

static inline bool ordered(const Fiber* t, const AccessRecord& a) {
  return a.thread == t->linear || a.time <= t->seen->time[a.thread];
}

static bool in_flight(const Fiber* t, const AccessRecord& a) {
  return (a.flags & kInFlightFlag) && a.time > t->owner->clock_base;
}

static const char* kind_name(AccessKind k) {
  switch (k) {
    case kRead: return "read";
    case kWrite: return "write";
    case kStrongRead: return "volatile read";
    case kStrongWrite: return "volatile write";
    default: return "atomic";
  }
}

[[noreturn]] static void shared_race(Fiber* t, u32 word, AccessKind kind, int instr,
                                     const AccessRecord& other, const char* other_kind) {
  const Fiber& o = t->owner->fibers[other.thread];
  fault_other_instr = other.instr;
  if (in_flight(t, other)) {
    bool copy = !strcmp(other_kind, "write");
    fail(t, kAsyncHazard, instr, word * 4, 4,
         "%s of shared memory offset %u while %s by thread (%u,%u,%u) at {instr:%d} is still in flight: %s",
         kind_name(kind), word * 4, copy ? "a cp.async into it" : "a wgmma reading it", o.tid[0], o.tid[1],
         o.tid[2], other.instr, copy ? "wait for its group first" : "wait for the wgmma first");
  }
  bool same_warp = o.warp == t->warp;
  fail(t, kSharedRace, instr, word * 4, 4,
       "%s of shared memory offset %u races with the %s by thread (%u,%u,%u) at {instr:%d}: no %s orders "
       "them", kind_name(kind), word * 4, other_kind, o.tid[0], o.tid[1], o.tid[2], other.instr,
       same_warp ? "barrier or warp synchronisation" : "barrier");
}

static inline bool is_strong(AccessKind k) { return k >= kAtomic; }

static void race_check_read(Fiber* t, u32 word, u8 mask, int instr, AccessKind kind, u8 flags) {
  BlockState* b = t->owner;
  AccessRecord* w = &b->writes[word * 4];
  for (int i = 0; i < 4 && w[i].mask; i++)
    if ((w[i].mask & mask) && (in_flight(t, w[i]) || !ordered(t, w[i])))
      if (!(is_strong(kind) && (w[i].flags & kStrongFlag))) shared_race(t, word, kind, instr, w[i], "write");
  // Remember the two latest reads by different lanes of this warp.
  AccessRecord* r = &b->reads[(word * b->warp_count + t->linear / 32) * 2];
  AccessRecord mine{t->now, instr, (u16)t->linear, mask, (u8)(flags | (is_strong(kind) ? kStrongFlag : 0))};
  if (r[0].mask && r[0].thread == t->linear && r[0].time == t->now)
    mine.mask |= r[0].mask, mine.flags &= r[0].flags | kInFlightFlag;
  else if (r[0].thread != t->linear || in_flight(t, r[0]))
    r[1] = r[0];
  r[0] = mine;
  b->newest_read[word] = std::max(b->newest_read[word], (flags & kInFlightFlag) ? ~0u : t->now);
}

// True if the bytes of `mask` already hold `value` (which is indexed like the word).
static bool same_value(const Fiber* t, u32 word, u8 mask, const u8* value) {
  for (int i = 0; i < 4; i++)
    if ((mask >> i & 1) && t->shared[word * 4 + i] != value[i]) return false;
  return true;
}

static void race_check_write(Fiber* t, u32 word, u8 mask, int instr, AccessKind kind, u8 flags,
                             const u8* value) {
  BlockState* b = t->owner;
  AccessRecord* w = &b->writes[word * 4];
  bool strong = is_strong(kind);
  if (b->newest_read[word] > t->seen->floor) {
    AccessRecord* r = &b->reads[word * b->warp_count * 2];
    for (u32 i = 0; i < b->warp_count * 2; i++)
      if ((r[i].mask & mask) && (in_flight(t, r[i]) || !ordered(t, r[i])))
        if (!(strong && (r[i].flags & kStrongFlag))) shared_race(t, word, kind, instr, r[i], "read");
  }
  int kept = 0;
  AccessRecord keep[4] = {};
  for (int i = 0; i < 4 && w[i].mask; i++) {
    if (w[i].mask & mask) {
      bool harmless = (strong && (w[i].flags & kStrongFlag)) ||
                      (value && !in_flight(t, w[i]) && same_value(t, word, w[i].mask & mask, value));
      if (!harmless && (in_flight(t, w[i]) || !ordered(t, w[i]))) shared_race(t, word, kind, instr, w[i], "write");
      w[i].mask &= ~mask;
    }
    if (w[i].mask) keep[kept++] = w[i];
  }
  memcpy(w + 1, keep, sizeof(AccessRecord) * 3);
  w[0] = AccessRecord{t->now, instr, (u16)t->linear, mask, (u8)(flags | (strong ? kStrongFlag : 0))};
}

void race_check(Fiber* t, u32 offset, u32 bytes, int instr, AccessKind kind, u8 flags, const u8* value) {
  bool read = kind == kRead || kind == kStrongRead;
  for (u32 at = offset; at < offset + bytes;) {
    u32 word = at / 4, end = std::min(offset + bytes, word * 4 + 4);
    u8 mask = 0;
    for (; at < end; at++) mask |= 1 << (at & 3);
    if (read) race_check_read(t, word, mask, instr, kind, flags);
    else race_check_write(t, word, mask, instr, kind, flags, value ? value + ((s64)word * 4 - offset) : nullptr);
  }
}

void shared_bounds(Fiber* t, u32 offset, u32 bytes, int instr) {
  if (PTX_UNLIKELY((u64)offset + bytes > t->shared_bytes || (offset & (bytes - 1))))
    shared_fault(t, offset, bytes, instr);
}

u8* shared_access_uncounted(Fiber* t, u32 offset, u32 bytes, int instr, AccessKind kind, const u8* value) {
  shared_bounds(t, offset, bytes, instr);
#if PTX_LEVEL >= 1
  u32 enabled = checks(t);
  BlockState* b = t->owner;
  bool writes = kind != kRead && kind != kStrongRead, reads = kind != kWrite && kind != kStrongWrite;
  if (enabled & kCheckSharedRace) race_check(t, offset, bytes, instr, kind, 0, value);
  if ((enabled & kCheckUninitialised) && reads)
    for (u32 i = 0; i < bytes; i++)
      if (PTX_UNLIKELY(!b->initialised[offset + i]))
        fail(t, kUninitialised, instr, offset + i, bytes,
             "read of %u bytes of shared memory at offset %u: byte %u was never written in this block",
             bytes, offset, offset + i);
  if (writes) {
    memset(&b->initialised[offset], 1, bytes);
    b->max_touched = std::max(b->max_touched, offset + bytes);
  }
#else
  (void)kind; (void)value;
#endif
  return t->shared + offset;
}

void note_wgmma_read(Fiber* t, u32 offset, u32 bytes, int instr) {
  (void)instr;
#if PTX_LEVEL >= 1
  if (!(checks(t) & kCheckSharedRace)) return;
  race_check(t, offset, bytes, instr, kRead, kInFlightFlag);
  check_proxy(t, offset, bytes, instr);
  if (!t->wgmma_reads.empty()) {
    PendingRead& last = t->wgmma_reads.back();
    if (last.group == t->wgmma_group && last.offset + last.bytes == offset) {
      last.bytes += bytes;
      return;
    }
  }
  t->wgmma_reads.push_back(PendingRead{offset, bytes, t->wgmma_group});
#else
  (void)t; (void)offset; (void)bytes;
#endif
}

void proxy_fence(Thread* thread) {
  Fiber* t = fiber(thread);
  if (!t->seen) return;
  t->proxy_fences.push_back(t->now);
  t->seen->references++;
  release_clock(t->seen_at_proxy_fence);
  t->seen_at_proxy_fence = t->seen;
  t->now++;
}

// The writer's fence must come between its write and what orders the reader after it; or the reader has a fence of its
// own after that.
static bool fenced(const Fiber* reader, const AccessRecord& write) {
  const Fiber& writer = reader->owner->fibers[write.thread];
  auto fence = std::lower_bound(writer.proxy_fences.begin(), writer.proxy_fences.end(), write.time);
  if (fence != writer.proxy_fences.end() &&
      (write.thread == reader->linear || *fence <= reader->seen->time[write.thread]))
    return true;
  return reader->seen_at_proxy_fence && write.time <= reader->seen_at_proxy_fence->time[write.thread];
}

void check_proxy(Fiber* t, u32 offset, u32 bytes, int instr) {
  BlockState* b = t->owner;
  for (u32 word = offset / 4; word <= (offset + bytes - 1) / 4; word++) {
    AccessRecord* w = &b->writes[word * 4];
    for (int i = 0; i < 4 && w[i].mask; i++)
      if (w[i].time > b->clock_base && !(w[i].flags & kAsyncProxyFlag) && !fenced(t, w[i])) {
        const Fiber& o = b->fibers[w[i].thread];
        fault_other_instr = w[i].instr;
        fail(t, kAsyncHazard, instr, word * 4, 4,
             "shared memory offset %u, written by thread (%u,%u,%u) at {instr:%d}, is read through the async proxy: no "
             "fence.proxy.async comes between", word * 4, o.tid[0], o.tid[1], o.tid[2], w[i].instr);
      }
  }
}

// A register of a warpgroup's products: what may still access it, and whether a fence is due.
static bool in_flight(const Fiber* t, const WgmmaRegister& r) { return r.role && r.group >= t->wgmma_done; }

static void check_register(Fiber* t, const WgmmaRegister& r, int instr) {
  if (!in_flight(t, r)) return;
  fault_other_instr = r.instr;
  fail(t, kAsyncHazard, instr, 0, 0, "a register that the wgmma at {instr:%d} %s is accessed before wgmma.wait_group",
       r.instr, r.role == kWgmmaResult ? "accumulates in" : "reads");
}

void wgmma_registers_used(Thread* thread, WgmmaRegister* state, std::initializer_list<u32> used,
                          std::initializer_list<u32> written, int instr) {
  Fiber* t = fiber(thread);
  if (!(checks(t) & kCheckSync)) return;
  for (u32 k : used) check_register(t, state[k], instr);
  for (u32 k : written) state[k] = WgmmaRegister{0, 0, true, instr};
}

void wgmma_register_moved(Thread* thread, WgmmaRegister* state, u32 to, int from, int instr) {
  Fiber* t = fiber(thread);
  if (!(checks(t) & kCheckSync)) return;
  check_register(t, state[to], instr);
  state[to] = from < 0 ? WgmmaRegister{} : state[from];
}

void wgmma_registers_taken(Thread* thread, WgmmaRegister* state, std::initializer_list<u32> results,
                           std::initializer_list<u32> operands, int instr) {
  Fiber* t = fiber(thread);
  if (!(checks(t) & kCheckSync)) return;
  if (!t->wgmma_fenced)
    fail(t, kAsyncHazard, instr, 0, 0, "the first wgmma.mma_async of a thread needs a wgmma.fence before it");
  const auto take = [&](u32 k, u8 role) {
    WgmmaRegister& r = state[k];
    if (r.dirty) {
      fault_other_instr = r.instr;
      fail(t, kAsyncHazard, instr, 0, 0, "a register of this wgmma was written at {instr:%d}: no wgmma.fence comes between",
           r.instr);
    }
    if (r.role != role) check_register(t, r, instr);  // products that accumulate in the same registers are in order
    r = WgmmaRegister{t->wgmma_group, role, false, instr};
  };
  for (u32 k : operands) take(k, kWgmmaOperand);
  for (u32 k : results) take(k, kWgmmaResult);
}

void wgmma_fence(Thread* t, WgmmaRegister* state, u32 count) {
  fiber(t)->wgmma_fenced = true;
  for (u32 k = 0; k < count; k++) state[k].dirty = false;
}

void wgmma_commit(Thread* t) { fiber(t)->wgmma_group++; }

void wgmma_wait(Thread* thread, u32 pending_groups) {
  Fiber* t = fiber(thread);
  BlockState* b = t->owner;
  if (t->wgmma_group > pending_groups) t->wgmma_done = std::max(t->wgmma_done, t->wgmma_group - pending_groups);
  size_t kept = 0;
  for (PendingRead& p : t->wgmma_reads) {
    if (p.group + pending_groups >= t->wgmma_group) {
      t->wgmma_reads[kept++] = p;
      continue;
    }
    for (u32 word = p.offset / 4; word <= (p.offset + p.bytes - 1) / 4; word++) {
      AccessRecord* r = &b->reads[(word * b->warp_count + t->linear / 32) * 2];
      for (int i = 0; i < 2; i++)
        if ((r[i].flags & kInFlightFlag) && r[i].thread == t->linear) {
          r[i].flags &= ~kInFlightFlag;
          r[i].time = t->now;
        }
    }
  }
  t->wgmma_reads.resize(kept);
}

// ---------------------------------------------------------------------------------------------
// Global memory

#if PTX_LEVEL >= 1
static GlobalRange* find_range(Fiber* t, u64 address, u64 bytes) {
  std::vector<GlobalRange>& ranges = t->owner->launch->ranges;
  if (t->last_range < ranges.size()) {
    GlobalRange& r = ranges[t->last_range];
    if (address >= r.begin && address + bytes <= r.end) return &r;
  }
  size_t low = 0, high = ranges.size();
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (ranges[middle].end <= address) low = middle + 1;
    else high = middle;
  }
  if (low < ranges.size() && address >= ranges[low].begin && address + bytes <= ranges[low].end) {
    t->last_range = (u32)low;
    return &ranges[low];
  }
  return nullptr;
}

[[noreturn]] static void global_fault(Fiber* t, u64 address, u32 bytes, int instr, AccessKind kind) {
  std::vector<GlobalRange>& ranges = t->owner->launch->ranges;
  char where[200] = "no buffer is registered";
  u64 best = ~0ull;
  for (size_t i = 0; i < ranges.size(); i++) {
    const GlobalRange& r = ranges[i];
    bool below = address < r.begin;
    u64 distance = below ? r.begin - address : address + bytes - r.end;
    if (distance >= best) continue;
    best = distance;
    if (below)
      snprintf(where, sizeof where, "it starts %llu bytes before {range:%zu}", (unsigned long long)distance, i);
    else
      snprintf(where, sizeof where, "it ends %llu bytes past the end of {range:%zu}",
               (unsigned long long)distance, i);
  }
  fail(t, kOutOfBounds, instr, address, bytes,
       "global memory %s of %u bytes at 0x%llx is outside every buffer passed or registered; %s",
       kind_name(kind), bytes, (unsigned long long)address, where);
}

// Blocks are unordered unless one has synchronised after the other through the same address.
static bool block_precedes(Launch* launch, u32 earlier, u32 later) {
  std::lock_guard<std::mutex> guard(launch->order_mutex);
  auto it = launch->before.find(later);
  return it != launch->before.end() && it->second.count(earlier);
}

static bool has_predecessor(Launch* launch, u32 block) {
  std::lock_guard<std::mutex> guard(launch->order_mutex);
  return launch->before.count(block) != 0;
}

static void order_blocks(Fiber* t, u64 address) {
  Launch* launch = t->owner->launch;
  u32 me = (u32)t->owner->index;
  std::lock_guard<std::mutex> guard(launch->order_mutex);
  std::set<u32>& earlier = launch->synced_on[address];
  if (earlier.size() == 1 && *earlier.begin() == me) return;
  std::set<u32>& mine = launch->before[me];
  for (u32 other : earlier)
    if (other != me && mine.insert(other).second) {
      auto it = launch->before.find(other);
      if (it != launch->before.end()) mine.insert(it->second.begin(), it->second.end());
    }
  earlier.insert(me);
}

[[noreturn]] static void global_race(Fiber* t, const GlobalRange& r, u64 address, u32 bytes, int instr,
                                     AccessKind kind, u32 other, const char* what) {
  const u32* n = t->block->nctaid;
  char who[64] = "several other blocks";
  if (other != kManyReaders) {
    u32 o = other - 1;
    snprintf(who, sizeof who, "block (%u,%u,%u)", o % n[0], o / n[0] % n[1], o / n[0] / n[1]);
  }
  size_t index = &r - t->owner->launch->ranges.data();
  fail(t, kGlobalRace, instr, address, bytes,
       "global memory %s of %u bytes at 0x%llx (byte %llu of {range:%zu}) races with a %s by %s in the "
       "same launch", kind_name(kind), bytes, (unsigned long long)address,
       (unsigned long long)(address - r.begin), index, what, who);
}

static void check_global_race(Fiber* t, GlobalRange& r, u64 address, u32 bytes, int instr, AccessKind kind) {
  Launch* launch = t->owner->launch;
  if (kind >= kSyncAtomic) order_blocks(t, address);
  u32 me = (u32)t->owner->index + 1;
  u64 at = address - r.begin;
  u32 *writer = r.writer + at, *reader = r.reader + at;
  bool strong = is_strong(kind), write = kind != kRead && kind != kStrongRead;
  std::atomic_flag& lock = launch->stripes[(address >> 5) % launch->stripes.size()];
  while (lock.test_and_set(std::memory_order_acquire)) {}
  u32 other = 0;
  const char* what = nullptr;
  for (u32 i = 0; i < bytes && !what; i++) {
    u32 w = writer[i] & ~kStrongBit;
    if (w && w != me && !(strong && (writer[i] & kStrongBit)) && !block_precedes(launch, w - 1, me - 1)) {
      other = w;
      what = "write";
    }
    u32 read_by = reader[i] & ~kStrongBit;
    if (write) {
      // Of several readers nothing more is known: any synchronisation by this block excuses them.
      if (read_by && read_by != me && !(strong && (reader[i] & kStrongBit)) &&
          !(read_by == kManyReaders ? has_predecessor(launch, me - 1)
                                    : block_precedes(launch, read_by - 1, me - 1))) {
        other = read_by;
        what = "read";
      }
      writer[i] = me | (strong ? kStrongBit : 0);
    } else if (!read_by) {
      reader[i] = me | (strong ? kStrongBit : 0);
    } else if (read_by != me) {
      reader[i] = kManyReaders | (strong ? reader[i] & kStrongBit : 0);
    } else if (!strong) {
      reader[i] = me;
    }
  }
  lock.clear(std::memory_order_release);
  if (what) global_race(t, r, address, bytes, instr, kind, other, what);
}

void check_global(Fiber* t, u64 address, u32 bytes, u32 alignment, int instr, AccessKind kind) {
  u32 enabled = checks(t);
  GlobalRange* range = find_range(t, address, bytes);
  if (enabled & kCheckBounds) {
    if (PTX_UNLIKELY(!range)) global_fault(t, address, bytes, instr, kind);
    if (PTX_UNLIKELY(address & (alignment - 1)))
      fail(t, kMisaligned, instr, address, bytes,
           "global memory %s of %u bytes at 0x%llx is not %u-byte aligned", kind_name(kind), bytes,
           (unsigned long long)address, alignment);
  }
  if (range && (enabled & kCheckGlobalRace)) check_global_race(t, *range, address, bytes, instr, kind);
#if PTX_LEVEL >= 2
  t->records.push_back(MemoryRecord{address, instr, (u16)bytes, false});
  if (range && kind != kWrite && kind != kStrongWrite) memset(range->read + (address - range->begin), 1, bytes);
  if (range && kind != kRead && kind != kStrongRead) memset(range->written + (address - range->begin), 1, bytes);
#endif
}

u8* shared_access(Thread* thread, u64 address, u32 bytes, int instr, AccessKind kind) {
  Fiber* t = fiber(thread);
#if PTX_LEVEL >= 2
  t->records.push_back(MemoryRecord{(u32)address, instr, (u16)bytes, true});
#endif
  return shared_access_uncounted(t, (u32)address, bytes, instr, kind);
}

void shared_store(Thread* thread, u64 address, const u8* value, u32 bytes, int instr, AccessKind kind) {
  Fiber* t = fiber(thread);
#if PTX_LEVEL >= 2
  t->records.push_back(MemoryRecord{(u32)address, instr, (u16)bytes, true});
#endif
  memcpy(shared_access_uncounted(t, (u32)address, bytes, instr, kind, value), value, bytes);
}

void generic_store(Thread* t, u64 address, const u8* value, u32 bytes, int instr, AccessKind kind) {
  if (is_shared_address(t, address)) shared_store(t, address - (u64)t->shared, value, bytes, instr, kind);
  else memcpy(generic_access(t, address, bytes, instr, kind), value, bytes);
}

u8* global_access(Thread* t, u64 address, u32 bytes, int instr, AccessKind kind) {
  check_global(fiber(t), address, bytes, bytes, instr, kind);
  return (u8*)address;
}

u8* generic_access(Thread* thread, u64 address, u32 bytes, int instr, AccessKind kind) {
  Fiber* t = fiber(thread);
  if (is_shared_address(t, address)) return shared_access(t, address - (u64)t->shared, bytes, instr, kind);
  u64 stack_bytes = t->owner->launch->config->stack_bytes;
  if (address - (u64)t->stack < stack_bytes) return (u8*)address;  // local memory
  if (address - (u64)t->params < t->owner->launch->config->param_bytes) return (u8*)address;
  return global_access(t, address, bytes, instr, kind);
}
#endif  // PTX_LEVEL >= 1

}  // namespace ptx
