"""Warp collectives and barriers."""

import numpy as np
import ptxemu
import pytest
from harness import HEADER

PTX = (
    HEADER
    + """
.visible .entry warp(.param .u64 src, .param .u64 dst) {
  .reg .b64 %a<4>; .reg .b32 %r<30>; .reg .pred %p<5>; .reg .b32 %t;
  ld.param.u64 %a1, [src]; ld.param.u64 %a2, [dst];
  mov.u32 %t, %tid.x;
  mad.wide.u32 %a1, %t, 4, %a1;
  mad.wide.u32 %a2, %t, 80, %a2;
  ld.global.u32 %r1, [%a1];
  shfl.sync.up.b32 %r2|%p1, %r1, 3, 0, -1;              st.global.u32 [%a2], %r2;
  selp.u32 %r3, 1, 0, %p1;                              st.global.u32 [%a2+4], %r3;
  shfl.sync.down.b32 %r2, %r1, 4, 0x101f, -1;           st.global.u32 [%a2+8], %r2;
  shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;               st.global.u32 [%a2+12], %r2;
  shfl.sync.idx.b32 %r2, %r1, 9, 0x181f, -1;            st.global.u32 [%a2+16], %r2;
  setp.gt.s32 %p2, %r1, 0;
  vote.sync.ballot.b32 %r2, %p2, -1;                    st.global.u32 [%a2+20], %r2;
  vote.sync.any.pred %p3, %p2, -1; selp.u32 %r2, 1, 0, %p3; st.global.u32 [%a2+24], %r2;
  vote.sync.all.pred %p3, !%p2, -1; selp.u32 %r2, 1, 0, %p3; st.global.u32 [%a2+28], %r2;
  and.b32 %r4, %r1, 3;
  match.any.sync.b32 %r2, %r4, -1;                      st.global.u32 [%a2+32], %r2;
  match.all.sync.b32 %r2|%p3, %r4, -1;                  st.global.u32 [%a2+36], %r2;
  redux.sync.add.s32 %r2, %r1, -1;                      st.global.u32 [%a2+40], %r2;
  redux.sync.max.s32 %r2, %r1, -1;                      st.global.u32 [%a2+44], %r2;
  redux.sync.min.u32 %r2, %r1, -1;                      st.global.u32 [%a2+48], %r2;
  redux.sync.xor.b32 %r2, %r1, -1;                      st.global.u32 [%a2+52], %r2;
  activemask.b32 %r2;                                   st.global.u32 [%a2+56], %r2;
  elect.sync %r2|%p4, -1; selp.u32 %r2, 1, 0, %p4;      st.global.u32 [%a2+60], %r2;
  mov.u32 %r2, %lanemask_lt;                            st.global.u32 [%a2+64], %r2;
  setp.lt.u32 %p1, %t, 16;
  @%p1 bra LOW;
  shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffff0000;       bra.uni JOIN;
LOW:
  shfl.sync.bfly.b32 %r2, %r1, 2, 31, 0x0000ffff;
JOIN:
  bar.warp.sync -1;
  st.global.u32 [%a2+68], %r2;
  setmaxnreg.dec.sync.aligned.u32 40;
  griddepcontrol.wait;
  ret;
}

.visible .entry block(.param .u64 dst) {
  .reg .b64 %a<4>; .reg .b32 %r<9>; .reg .pred %p<5>; .reg .b32 %t;
  .shared .align 4 .b32 slots[128];
  ld.param.u64 %a2, [dst];
  mov.u32 %t, %tid.x;
  mad.wide.u32 %a2, %t, 16, %a2;
  shl.b32 %r1, %t, 2;
  mov.u32 %r2, slots; add.u32 %r1, %r1, %r2;
  st.shared.u32 [%r1], %t;
  setp.lt.u32 %p1, %t, 64;
  @!%p1 bra CONSUMER;
  bar.arrive 1, 128;                 // producers: warps 0 and 1
  bra.uni AFTER;
CONSUMER:
  bar.sync 1, 128;
  ld.shared.u32 %r3, [%r1-256];
  st.global.u32 [%a2], %r3;
AFTER:
  setp.gt.u32 %p2, %t, 99;
  barrier.red.popc.sync.aligned.u32 %r4, 0, %p2;  st.global.u32 [%a2+4], %r4;
  bar.red.or.pred %p3, 0, %p2;   selp.u32 %r5, 1, 0, %p3; st.global.u32 [%a2+8], %r5;
  bar.red.and.pred %p3, 0, %p2;  selp.u32 %r5, 1, 0, %p3; st.global.u32 [%a2+12], %r5;
  ret;
}
"""
)


@pytest.fixture(scope="module")
def module():
    return ptxemu.compile_ptx(PTX)


@pytest.mark.parametrize("seed", [0, 1])
def test_warp(module, seed):
    x = np.random.default_rng(0).integers(-1000, 1000, 32).astype(np.int32)
    out = np.zeros((32, 20), np.int32)
    module.launch("warp", 1, 32, [x, out], schedule_seed=seed)
    lane = np.arange(32)
    expect = [
        np.where(lane >= 3, x[lane - 3], x),
        lane >= 3,
        np.where(lane % 16 + 4 < 16, x[(lane + 4) % 32], x),
        x[lane ^ 5],
        x[lane // 8 * 8 + 9 % 8],
    ]
    for n in range(5):
        assert (out[:, n] == expect[n]).all(), n
    ballot = sum(int(v > 0) << n for n, v in enumerate(x))
    assert (out[:, 5].view(np.uint32) == ballot).all()
    assert (out[:, 6] == 1).all() and (out[:, 7] == 0).all()
    match = [sum(int((v & 3) == (w & 3)) << n for n, v in enumerate(x)) for w in x]
    assert (out[:, 8].astype(np.uint32) == match).all() and (out[:, 9] == 0).all()
    assert (out[:, 10] == x.sum()).all() and (out[:, 11] == x.max()).all()
    assert (out[:, 12] == x.view(np.uint32).min()).all() and (out[:, 13] == np.bitwise_xor.reduce(x)).all()
    assert (out[:, 14] == -1).all() and (out[:, 15] == (lane == 0)).all()
    assert (out[:, 16].view(np.uint32) == (1 << lane) - 1).all()
    assert (out[:, 17] == np.where(lane < 16, x[lane ^ 2], x[lane ^ 1])).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_block(module, seed):
    out = np.zeros((128, 4), np.uint32)
    module.launch("block", 1, 128, [out], schedule_seed=seed)
    assert (out[64:, 0] == np.arange(64)).all()
    assert (out[:, 1] == 28).all() and (out[:, 2] == 1).all() and (out[:, 3] == 0).all()
