"""Races, uninitialised reads, deadlocks: small kernels with one mistake each, and correct twins."""

import numpy as np
import ptxemu
import pytest
from harness import HEADER, expect

# Each kernel's 128 threads get %t (thread), %s (shared address of slot %t) and %n (that of %t ^ 32,
# another warp's), %m (that of %t ^ 1, the same warp's).
PROLOGUE = """
  .shared .align 16 .b8 slots[1024];
  .reg .b32 %t, %s, %n, %m, %z, %r<9>; .reg .b64 %a<4>; .reg .pred %p<5>; .reg .b16 %h<3>;
  ld.param.u64 %a1, [out]; cvta.to.global.u64 %a1, %a1;
  mov.u32 %t, %tid.x; mov.u32 %z, slots;
  mad.lo.u32 %s, %t, 4, %z; xor.b32 %n, %t, 32; mad.lo.u32 %n, %n, 4, %z; xor.b32 %m, %t, 1; mad.lo.u32 %m, %m, 4, %z;
  mad.wide.u32 %a2, %t, 4, %a1;
  setp.lt.u32 %p1, %t, 64;
"""

INIT = "st.shared.u32 [%s], 0; bar.sync 0; "

# Thread 0 copies 512 bytes, and 16 more in a second phase; threads see a phase to be complete.
COPY = """setp.eq.u32 %p2, %t, 0; add.u32 %r5, %z, 512; @!%p2 bra WAIT; mbarrier.init.shared::cta.b64 [%r5], 1;
  mbarrier.arrive.expect_tx.shared::cta.b64 %a3, [%r5], 512;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%z], [%a1], 512, [%r5]; """
COPY_AGAIN = """mbarrier.arrive.expect_tx.shared::cta.b64 %a3, [%r5], 16; add.u32 %r6, %z, 528;
  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%a1], 16, [%r5]; """
OUT = """st.shared.u32 [%s], %t; FENCE bar.sync 0; setp.ne.u32 %p2, %t, 0; @%p2 bra END;
  cp.async.bulk.global.shared::cta.bulk_group [%a1], [%z], 512; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:"""
SEEN = "AGAIN{0}: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5], {0}; @!%p3 bra AGAIN{0}; "
KERNELS = {
    # name: (body, expected fault kind or None, words in the message)
    "barrier": ("st.shared.u32 [%s], %t; bar.sync 0; ld.shared.u32 %r1, [%n];", None, ()),
    "no_barrier": (INIT + "st.shared.u32 [%s], %t; ld.shared.u32 %r1, [%n];", "shared_race", ["no barrier orders"]),
    "warp_sync": ("st.shared.u32 [%s], %t; bar.warp.sync -1; ld.shared.u32 %r1, [%m];", None, ()),
    "warp_sync_is_not_a_barrier": (
        INIT + "st.shared.u32 [%s], %t; bar.warp.sync -1; ld.shared.u32 %r1, [%n];", "shared_race", ["no barrier orders"]),
    "no_warp_sync": (
        INIT + "st.shared.u32 [%s], %t; ld.shared.u32 %r1, [%m];", "shared_race", ["barrier or warp synchronisation"]),
    "shuffle_orders": (
        "st.shared.u32 [%s], %t; shfl.sync.bfly.b32 %r2, %t, 1, 31, -1; ld.shared.u32 %r1, [%m];", None, ()),
    "write_after_read": (
        "st.shared.u32 [%s], %t; bar.sync 0; ld.shared.u32 %r1, [%n]; st.shared.u32 [%s], %r1;", "shared_race", ["no barrier orders"]),
    "write_after_read_in_warp": (
        "st.shared.u32 [%s], %t; bar.warp.sync -1; ld.shared.u32 %r1, [%m]; st.shared.u32 [%s], 0;", "shared_race", []),
    "write_after_barrier": (
        "st.shared.u32 [%s], %t; bar.sync 0; ld.shared.u32 %r1, [%n]; bar.sync 0; st.shared.u32 [%s], %r1;", None, ()),
    "write_write": ("st.shared.u32 [%z], %t;", "shared_race", ["write of shared memory offset 0 races with the write"]),
    "same_value": ("st.shared.u32 [%z], 7;", None, ()),
    "atomics": (
        "setp.eq.u32 %p2, %t, 0; @%p2 st.shared.u32 [%z], 0; bar.sync 0; atom.shared.add.u32 %r1, [%z], 1;", None, ()),
    "atomic_and_read": (
        "setp.eq.u32 %p2, %t, 0; @%p2 st.shared.u32 [%z], 0; bar.sync 0; atom.shared.add.u32 %r1, [%z], 1; ld.shared.u32 %r2, [%z];",
        "shared_race", []),
    "bytes_of_a_word": (
        "mad.lo.u32 %r1, %t, -3, %s; cvt.u16.u32 %h1, %t; st.shared.u8 [%r1], %h1; bar.sync 0; ld.shared.u8 %h2, [%r1];", None, ()),
    "named_barriers": (
        "@%p1 st.shared.u32 [%s], %t; @%p1 bar.arrive 2, 128; @!%p1 bar.sync 2, 128; @!%p1 ld.shared.u32 %r1, [%s+-256];", None, ()),
    "arrive_does_not_acquire": (
        "@!%p1 st.shared.u32 [%s], %t; @%p1 bar.arrive 2, 128; @!%p1 bar.sync 2, 128; @%p1 ld.shared.u32 %r1, [%s+256];",
        ("shared_race", "uninitialised_shared"), []),
    "half_barrier": (
        "@%p1 st.shared.u32 [%s], %t; @%p1 bar.sync 3, 64; @!%p1 bar.sync 4, 64; @!%p1 ld.shared.u32 %r1, [%s+-256];",
        ("shared_race", "uninitialised_shared"), []),
    "uninitialised": ("ld.shared.u32 %r1, [%s];", "uninitialised_shared", ["byte", "never written in this block"]),
    "partly_initialised": (
        "cvt.u16.u32 %h1, %t; st.shared.u16 [%s], %h1; ld.shared.u32 %r1, [%s];", "uninitialised_shared", ["4 bytes"]),
    "copy": ("cp.async.ca.shared.global [%s], [%a2], 4; cp.async.wait_all; bar.sync 0; ld.shared.u32 %r1, [%n];", None, ()),
    "copy_without_wait": (
        "cp.async.ca.shared.global [%s], [%a2], 4; bar.sync 0; ld.shared.u32 %r1, [%s];", "async_hazard", ["cp.async into it", "still in flight"]),
    "copy_without_barrier": (
        "cp.async.ca.shared.global [%s], [%a2], 4; cp.async.wait_all; ld.shared.u32 %r1, [%n];",
        ("shared_race", "uninitialised_shared"), []),
    "copy_wait_then_own_read": (
        "cp.async.ca.shared.global [%s], [%a2], 4; cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r1, [%s];", None, ()),
    "copy_over_a_read": (
        "st.shared.u32 [%s], 0; bar.sync 0; ld.shared.u32 %r1, [%n]; cp.async.ca.shared.global [%s], [%a2], 4; cp.async.wait_all;",
        "shared_race", ["no barrier orders"]),
    "deadlock": ("@%p1 bar.sync 1, 128;", "deadlock", ["threads 0-63 wait in bar.sync 1", "64 of 128", "threads 64-127 have exited"]),
    "exited_threads_do_not_count": ("@!%p1 ret; bar.sync 0;", None, ()),
    "two_barriers_in_one_warp": (
        "setp.lt.u32 %p2, %t, 5; @%p2 bra FEW; bar.sync 0; bra.uni DONE; FEW: bar.sync 0; DONE: bar.sync 0;",
        "barrier_divergence", ["of the same", "different barrier instruction"]),
    "two_barriers_in_one_block": (
        "@%p1 bra LOW; bar.sync 0; bra.uni DONE; LOW: bar.sync 0; DONE: bar.sync 0;",
        "barrier_divergence", ["thread", "same block", "different barrier instruction"]),
    "two_voting_barriers_in_one_block": (
        "setp.ne.u32 %p2, %t, 0; @%p1 bra LOW; bar.red.or.pred %p3, 0, %p2; bra.uni DONE; LOW: bar.red.or.pred %p3, 0, %p2; DONE:",
        "barrier_divergence", ["same block", "different barrier instruction"]),
    "a_named_barrier_on_two_paths": ("@%p1 bra LOW; bar.sync 1, 128; bra.uni DONE; LOW: bar.sync 1, 128; DONE: bar.sync 0;", None, ()),
    "barrier_counts_differ": (
        "@%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 96;", ("barrier_divergence", "deadlock"), []),
    "missing_lane": (
        "setp.eq.u32 %p2, %t, 3; @%p2 bra WAIT; shfl.sync.bfly.b32 %r2, %t, 1, 31, -1; WAIT: bar.sync 0;",
        "deadlock", ["wait in shfl.sync", "wait in bar.sync"]),
    "lane_not_in_mask": ("shfl.sync.bfly.b32 %r2, %t, 1, 31, 0xff;", "warp_sync", ["not in its own mask 0x000000ff"]),
    "shared_overrun": ("ld.shared.u32 %r1, [%s+1024];", "out_of_bounds", ["outside the block's 1024 bytes"]),
    "global_overrun": ("st.global.u32 [%a2+4], %t;", "out_of_bounds", ["4 bytes past the end of argument `out`"]),
    "global_misaligned": ("st.global.u16 [%a1+1], 0;", "misaligned", ["not 2-byte aligned"]),
    "division_by_zero": ("sub.u32 %r1, %t, %t; div.u32 %r1, %t, %r1;", "arithmetic", ["division by zero"]),
    "trap": ("trap;", "trap", ["trap instruction"]),
    "spin_within_block": (
        """setp.eq.u32 %p2, %t, 0; st.shared.u32 [%s+512], 0; bar.sync 0; @%p2 bra SPIN; setp.eq.u32 %p3, %t, 127;
           @%p3 st.volatile.shared.u32 [%z+512], 1; bra.uni END;
           SPIN: ld.volatile.shared.u32 %r1, [%z+512]; setp.ne.u32 %p4, %r1, 1; @%p4 bra SPIN; END:""", None, ()),
    "mbarrier": (
        """setp.eq.u32 %p2, %t, 0; add.u32 %r5, %z, 512; @%p2 mbarrier.init.shared::cta.b64 [%r5], 128; bar.sync 0;
           st.shared.u32 [%s], %t; mbarrier.arrive.shared::cta.b64 %a3, [%r5];
           AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5], 0; @!%p3 bra AGAIN; ld.shared.u32 %r1, [%n];""", None, ()),
    "mbarrier_polled": (
        """setp.eq.u32 %p2, %t, 0; add.u32 %r5, %z, 512; @%p2 mbarrier.init.shared::cta.b64 [%r5], 128; bar.sync 0;
           st.shared.u32 [%s], %t; mbarrier.arrive.shared::cta.b64 %a3, [%r5];
           AGAIN: mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r5], 0; @!%p3 bra AGAIN; ld.shared.u32 %r1, [%n];""", None, ()),
    "bulk_copy_out": (OUT.replace("FENCE", "fence.proxy.async;"), None, ()),
    "bulk_copy_out_without_fence": (OUT.replace("FENCE", ""), "async_hazard", ["no fence.proxy.async comes between"]),
    "bulk_copy": (COPY + "WAIT: bar.sync 0; " + SEEN.format(0) + "ld.shared.u32 %r1, [%n];", None, ()),
    "bulk_copy_without_wait": (COPY + "WAIT: bar.sync 0; ld.shared.u32 %r1, [%n];", "async_hazard", ["still in flight"]),
    "bulk_copy_read_by_its_thread": (COPY + "ld.shared.u32 %r1, [%z]; WAIT: bar.sync 0;", "async_hazard", ["still in flight"]),
    "bulk_copies_in_two_phases": (
        COPY + SEEN.format(0) + COPY_AGAIN + "WAIT: bar.sync 0; " + SEEN.format(1) +
        "ld.shared.u32 %r1, [%n]; ld.shared.u32 %r1, [%z+528];", None, ()),
    "the_second_bulk_copy_without_wait": (
        COPY + SEEN.format(0) + COPY_AGAIN + "WAIT: bar.sync 0; ld.shared.u32 %r1, [%z+528];",
        "async_hazard", ["still in flight"]),
}  # fmt: skip

REGISTERS = """
.visible .entry NAME() .maxnreg 64 { .reg .pred %p; .reg .b32 %t; mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 128;
  @%p bra FIRST; setmaxnreg.inc.sync.aligned.u32 INC; bra.uni END; FIRST: setmaxnreg.dec.sync.aligned.u32 DEC; END: ret; }
"""
BUDGETS = {  # 64 registers per thread in two warpgroups: dec, inc, kind and words of the fault
    "all_that_was_given_up": (40, 88, None, []),
    "more_than_was_given_up": (40, 96, "deadlock", ["setmaxnreg", "for 96 registers", "their thread has 64"]),
    "dec_to_more": (72, 64, "invalid", ["setmaxnreg.dec to 72 registers, but the thread has 64"]),
    "no_multiple_of_8": (44, 64, "invalid", ["multiple of 8 from 24 to 256, got 44"]),
}

GRID = """
.visible .entry blocks_write(.param .u64 out) { .reg .b64 %a; .reg .b32 %r; ld.param.u64 %a, [out];
  mov.u32 %r, %ctaid.x; st.global.u32 [%a], %r; ret; }
.visible .entry blocks_read(.param .u64 out) { .reg .b64 %a<3>; .reg .b32 %r<3>; ld.param.u64 %a1, [out];
  mov.u32 %r1, %ctaid.x; mad.wide.u32 %a2, %r1, 4, %a1; st.global.u32 [%a2], %r1; ld.global.u32 %r2, [%a1]; ret; }
.visible .entry blocks_add(.param .u64 out) { .reg .b64 %a; .reg .b32 %r; ld.param.u64 %a, [out];
  red.global.add.u32 [%a], 1; ret; }
.visible .entry last_block_sums(.param .u64 out) { .reg .b64 %a<3>; .reg .b32 %r<6>; .reg .pred %p; ld.param.u64 %a1, [out];
  mov.u32 %r1, %ctaid.x; mad.wide.u32 %a2, %r1, 4, %a1; st.global.u32 [%a2+8], %r1; membar.gl;
  atom.global.add.u32 %r2, [%a1], 1; setp.ne.u32 %p, %r2, 3; @%p bra END;
  ld.global.u32 %r2, [%a1+8]; ld.global.u32 %r3, [%a1+12]; add.u32 %r2, %r2, %r3;
  ld.global.u32 %r4, [%a1+16]; ld.global.u32 %r5, [%a1+20]; add.u32 %r4, %r4, %r5; add.u32 %r2, %r2, %r4;
  st.global.u32 [%a1+4], %r2; END: ret; }
.visible .entry forever(.param .u64 out) { LOOP: bra LOOP; }
"""


@pytest.fixture(scope="module")
def module():
    text = HEADER
    for name, (body, _, _) in KERNELS.items():
        text += f".visible .entry {name}(.param .u64 out) {{{PROLOGUE}{body} ret; }}\n"
    for name, (dec, inc, _, _) in BUDGETS.items():
        text += REGISTERS.replace("NAME", name).replace("DEC", str(dec)).replace("INC", str(inc))
    return ptxemu.compile_ptx(text + GRID)


@pytest.mark.parametrize("mode, seed", [("eager", 0), ("lazy", 0), ("eager", 5), ("lazy", 6)])
@pytest.mark.parametrize("name", KERNELS)
def test_block(module, name, mode, seed):
    _, kind, words = KERNELS[name]
    out = np.zeros(128, np.uint32)
    options = dict(mode=mode, schedule_seed=seed, timeout_seconds=20)
    expect(kind, words, lambda: module.launch(name, 1, 128, [out], **options))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BUDGETS)
def test_register_budget(module, name, seed):
    _, _, kind, words = BUDGETS[name]
    expect(kind, words, lambda: module.launch(name, 1, 256, [], schedule_seed=seed))


def test_strict_warp_sync(module):
    """Shuffles promise no memory ordering; the stricter reading can be asked for."""
    with pytest.raises(ptxemu.KernelFault, match="shared_race"):
        module.launch("shuffle_orders", 1, 128, [np.zeros(128, np.uint32)], strict_warp_sync=True)
    module.launch("warp_sync", 1, 128, [np.zeros(128, np.uint32)], strict_warp_sync=True)


@pytest.mark.parametrize("name, words", [("blocks_write", "races with a write by block"),
                                         ("blocks_read", "races with a")])  # fmt: skip
def test_global_race(module, name, words):
    for _ in range(5):
        with pytest.raises(ptxemu.KernelFault, match=words) as caught:
            module.launch(name, 4, 1, [np.zeros(8, np.uint32)])
        assert caught.value.kind == "global_race"
    module.launch(name, 4, 1, [np.zeros(8, np.uint32)], check=("bounds",))


def test_global_atomics_are_clean(module):
    out = np.zeros(8, np.uint32)
    module.launch("blocks_add", 4, 32, [out])
    assert out[0] == 128
    out[:] = 0
    module.launch("last_block_sums", 4, 1, [out])
    assert out.tolist() == [4, 6, 0, 1, 2, 3, 0, 0]


def test_timeout(module):
    with pytest.raises(ptxemu.KernelFault) as caught:
        module.launch("forever", 1, 1, [np.zeros(1, np.uint32)], timeout_seconds=0.3)
    assert caught.value.kind == "timeout"
