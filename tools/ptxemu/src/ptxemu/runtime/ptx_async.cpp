// Copies that finish later, and the barriers in shared memory that count them.
#include "ptx_internal.h"

namespace ptx {

// ---------------------------------------------------------------------------------------------
// cp.async

static void deliver(const PendingCopy& c) {
  u8* to = c.issuer->shared + c.offset;
  memcpy(to, c.source, c.valid);
  memset(to + c.valid, 0, c.total - c.valid);
}

// From now on, threads that know the issuer's time `time` may access the data.
static void settle(const PendingCopy& c, u32 time) {
  (void)time;
#if PTX_LEVEL >= 1
  Fiber* t = c.issuer;
  BlockState* b = t->owner;
  memset(&b->initialised[c.offset], 1, c.total);
  b->max_touched = std::max(b->max_touched, c.offset + c.total);
  if (checks(t) & kCheckSharedRace)
    for (u32 word = c.offset / 4; word < (c.offset + c.total + 3) / 4; word++) {
      AccessRecord* w = &b->writes[word * 4];
      for (int i = 0; i < 4 && w[i].mask; i++)
        if ((w[i].flags & kInFlightFlag) && w[i].thread == t->linear) {
          w[i].flags &= ~kInFlightFlag;
          w[i].time = time;
        }
    }
#endif
}

void async_copy(Thread* thread, u64 shared_address, u64 global_address, u32 total, s64 valid, int instr) {
  Fiber* t = fiber(thread);
  u32 offset = (u32)shared_address;
  valid = valid < 0 ? 0 : std::min<s64>(valid, total);
  shared_bounds(t, offset, total, instr);
  bool lazy = t->owner->launch->config->lazy_copies;
#if PTX_LEVEL >= 1
  if (valid) check_global(t, global_address, (u32)valid, total, instr, kRead);
  if (checks(t) & kCheckSharedRace) race_check(t, offset, total, instr, kWrite, kInFlightFlag);
#if PTX_LEVEL >= 2
  t->records.push_back(MemoryRecord{offset, instr, (u16)total, true});
#endif
#endif
  PendingCopy c{t, offset, (const u8*)global_address, (u32)valid, total, t->copy_group, instr, 0};
  if (!lazy) deliver(c);
  if (lazy || PTX_LEVEL >= 1) t->copies.push_back(c);
}

void async_commit(Thread* t) { fiber(t)->copy_group++; }

void async_wait(Thread* thread, int pending_groups) {
  Fiber* t = fiber(thread);
  bool lazy = t->owner->launch->config->lazy_copies;
  size_t kept = 0;
  for (PendingCopy& c : t->copies) {
    if (pending_groups >= 0 && c.group + pending_groups >= t->copy_group) {
      t->copies[kept++] = c;
      continue;
    }
    if (lazy) deliver(c);
    settle(c, t->now);
  }
  t->copies.resize(kept);
}

// ---------------------------------------------------------------------------------------------

// mbarrier and bulk copies (one CTA per cluster)

static MBarrier& mbarrier_at(Fiber* t, u64 address, int instr) {
  auto it = t->owner->mbarriers.find((u32)address);
  if (it == t->owner->mbarriers.end())
    fail(t, kInvalid, instr, address, 8, "no mbarrier was initialised at shared offset %u", (u32)address);
  return it->second;
}

// A thread sees that the phases of the first `count` landed copies are complete.
static void settle_landed(MBarrier& m, size_t count) {
  for (size_t i = 0; i < count; i++) settle(m.landed[i], m.landed[i].landed_at);
  m.landed.erase(m.landed.begin(), m.landed.begin() + count);
  m.complete = 0;
}

void mbarrier_init(Thread* thread, u64 address, u32 count, int instr) {
  Fiber* t = fiber(thread);
  shared_access_uncounted(t, (u32)address, 8, instr, kWrite);
  MBarrier& m = t->owner->mbarriers[(u32)address];
  settle_landed(m, m.landed.size());
  m = MBarrier();
  m.count = m.pending = count;
}

static void mbarrier_check(Fiber* t, MBarrier& m) {
  if (m.pending || m.bytes) return;
  BlockState* b = t->owner;
  if ((checks(t) & kCheckSharedRace) && !m.arrivals.empty()) {
    VectorClock* c = joined_clock(b, m.arrivals.data(), m.arrivals.size());
    c->references++;
    release_clock(m.completed);
    m.completed = c;
  }
  for (Arrival& a : m.arrivals) release_clock(a.seen);
  m.arrivals.clear();
  m.pending = m.count;
  m.phase ^= 1;
  m.complete = m.landed.size();
  for (Fiber* f : m.waiters) wake(f);
  m.waiters.clear();
}

static void mbarrier_release(Fiber* t, MBarrier& m, int instr) {  // what t did so far is published
  if (!t->seen) return;
  m.arrivals.push_back(arrival_of(t, false, instr));
  t->seen->references++;
  t->now++;
}

u64 mbarrier_arrive(Thread* thread, u64 address, u32 count, int instr) {
  Fiber* t = fiber(thread);
  MBarrier& m = mbarrier_at(t, address, instr);
  u64 state = m.phase;
  if (count > m.pending)
    fail(t, kInvalid, instr, address, 8, "mbarrier at shared offset %u receives more arrivals than its count %u",
         (u32)address, m.count);
  mbarrier_release(t, m, instr);
  m.pending -= count;
  mbarrier_check(t, m);
  return state;
}

void mbarrier_expect(Thread* thread, u64 address, s64 bytes, int instr) {
  mbarrier_at(fiber(thread), address, instr).bytes += bytes;
}

void mbarrier_arrive_after_copies(Thread* thread, u64 address, bool no_increment, int instr) {
  async_wait(thread, -1);  // modelled as if the copies had finished by now
  if (no_increment) mbarrier_arrive(thread, address, 1, instr);
  else mbarrier_release(fiber(thread), mbarrier_at(fiber(thread), address, instr), instr);
}

// The data is there, and its bytes are counted. Threads may access it once they have seen the phase complete.
static void land(MBarrier& m, PendingCopy c) {
  deliver(c);
  c.landed_at = c.issuer->now;
  m.landed.push_back(c);
  mbarrier_release(c.issuer, m, c.instr);
  m.bytes -= c.total;
}

static void land_bulk(MBarrier& m) {
  std::vector<PendingCopy> copies;
  copies.swap(m.copies);
  for (PendingCopy& c : copies) land(m, c);
}

bool mbarrier_test(Thread* thread, u64 address, u64 wanted, bool wait, int instr) {
  Fiber* t = fiber(thread);
  u32 parity = (u32)(wanted & 1);
  for (;;) {
    MBarrier& m = mbarrier_at(t, address, instr);
    if (m.phase != parity) {
      settle_landed(m, m.complete);
      if (m.completed && (checks(t) & kCheckSharedRace)) {
        Arrival both[2] = {arrival_of(t, true, instr), {t, m.completed, t->now, false, instr}};
        VectorClock* c = joined_clock(t->owner, both, 2);
        set_clock(t, c);
        t->now++;
      }
      return true;
    }
    if (!m.copies.empty()) {
      land_bulk(m);
      mbarrier_check(t, m);
      continue;
    }
    if (!wait) {
      yield(t);
      if (mbarrier_at(t, address, instr).phase == parity) return false;
      continue;
    }
    m.waiters.push_back(t);
    block_fiber(t, "mbarrier.try_wait", instr, (u32)address);
  }
}

void bulk_copy_in(Thread* thread, u64 shared_address, u64 global_address, u32 bytes, u64 barrier, int instr) {
  Fiber* t = fiber(thread);
  u32 offset = (u32)shared_address;
  if ((u64)offset + bytes > t->shared_bytes) shared_fault(t, offset, bytes, instr);
  if ((offset | global_address | bytes) & 15)
    fail(t, kMisaligned, instr, offset, bytes, "cp.async.bulk needs 16-byte aligned addresses and size");
#if PTX_LEVEL >= 1
  check_global(t, global_address, bytes, 16, instr, kRead);
  if (checks(t) & kCheckSharedRace) race_check(t, offset, bytes, instr, kWrite, kInFlightFlag | kAsyncProxyFlag);
#endif
  MBarrier& m = mbarrier_at(t, barrier, instr);
  PendingCopy c{t, offset, (const u8*)global_address, bytes, bytes, 0, instr, 0};
  if (t->owner->launch->config->lazy_copies) {
    m.copies.push_back(c);
    for (Fiber* f : m.waiters) wake(f);
    m.waiters.clear();
  } else {
    land(m, c);
    mbarrier_check(t, m);
  }
}

// Registers that setmaxnreg moves between the warps of a block. A warp that asks for more than are free waits.
void set_max_registers(Thread* thread, bool more, u32 count, int instr) {
  Fiber* t = fiber(thread);
  if (!(checks(t) & kCheckSync)) return;
  BlockState* b = t->owner;
  if (count < 24 || count > 256 || count % 8)
    fail(t, kInvalid, instr, 0, 0, "setmaxnreg takes a multiple of 8 from 24 to 256, got %u", count);
  if (more ? count < t->register_limit : count > t->register_limit)
    fail(t, kInvalid, instr, 0, 0, "setmaxnreg.%s to %u registers, but the thread has %u", more ? "inc" : "dec", count,
         t->register_limit);
  if (!more) {
    b->free_registers += t->register_limit - count;
    for (Fiber* f : b->register_waiters) wake(f);
    b->register_waiters.clear();
  } else {
    while (b->free_registers < count - t->register_limit) {
      b->register_waiters.push_back(t);
      block_fiber(t, "setmaxnreg", instr, count);
    }
    b->free_registers -= count - t->register_limit;
  }
  t->register_limit = count;
}

void bulk_copy_out(Thread* thread, u64 global_address, u64 shared_address, u32 bytes, int instr) {
  Fiber* t = fiber(thread);
  u32 offset = (u32)shared_address;
  if ((u64)offset + bytes > t->shared_bytes) shared_fault(t, offset, bytes, instr);
#if PTX_LEVEL >= 1
  check_global(t, global_address, bytes, 16, instr, kWrite);
  if (checks(t) & kCheckSharedRace) {
    race_check(t, offset, bytes, instr, kRead, 0);
    check_proxy(t, offset, bytes, instr);
  }
#endif
  memcpy((u8*)global_address, t->shared + offset, bytes);
}

}  // namespace ptx
