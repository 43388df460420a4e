"""wgmma from unswizzled shared memory, and the hazards of its asynchronous reads."""

import numpy as np
import pytest

from tests import ptxemu

from .harness import HEADER

torch = pytest.importorskip("torch")

# D[64,16] = A[64,16] * B[16,16]: A and B (as 16 rows of n, K-major) are stored as 8x8 cores of 128
# contiguous bytes; the cores of one row block are 128 bytes apart, row blocks 256 bytes.
KERNEL = """
.visible .entry NAME(.param .u64 a, .param .u64 b, .param .u64 d) {
  .shared .align 128 .b8 tile[2560];
  .reg .b64 %a<6>, %x<5>; .reg .b32 %r<9>, %t, %z; .reg .f32 %f<9>; .reg .pred %p;
  ld.param.u64 %a1, [a]; ld.param.u64 %a2, [b]; ld.param.u64 %a3, [d];
  mov.u32 %t, %tid.x; mov.u32 %z, tile;
  mad.wide.u32 %a1, %t, 16, %a1; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a1];
  mad.lo.u32 %r5, %t, 16, %z; st.shared.v4.u32 [%r5], {%r1, %r2, %r3, %r4};
  setp.lt.u32 %p, %t, 32; mad.wide.u32 %a2, %t, 16, %a2;
  @%p ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a2];
  @%p st.shared.v4.u32 [%r5+2048], {%r1, %r2, %r3, %r4};
  fence.proxy.async; BARRIER
  // start address, leading (k) core offset 128, row block offset 256, all in units of 16
  cvt.u64.u32 %x1, %z; shr.u64 %x1, %x1, 4; or.b64 %x1, %x1, 0x0000001000080000; add.u64 %x2, %x1, 128;
  mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
  mov.f32 %f5, %f1; mov.f32 %f6, %f1; mov.f32 %f7, %f1; mov.f32 %f8, %f1;
  setp.eq.u32 %p, 1, ACCUMULATE;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4,%f5,%f6,%f7,%f8}, %x1, %x2, %p, 1, SIGN, 0, 0;
  wgmma.commit_group.sync.aligned;
  WAIT
  bar.sync 0;
  st.shared.u32 [%r5], 0;
  wgmma.wait_group.sync.aligned 0;
  mad.wide.u32 %a3, %t, 32, %a3;
  st.global.v4.f32 [%a3], {%f1,%f2,%f3,%f4}; st.global.v4.f32 [%a3+16], {%f5,%f6,%f7,%f8};
  ret;
}
"""
DONE = "wgmma.wait_group.sync.aligned 0;"


def kernel(name, barrier="bar.sync 0;", wait=DONE, accumulate=0, sign=1):
    text = KERNEL.replace("NAME", name).replace("BARRIER", barrier).replace("WAIT", wait)
    return text.replace("ACCUMULATE", str(accumulate)).replace("SIGN", str(sign))


@pytest.fixture(scope="module")
def module():
    return ptxemu.compile_ptx(
        HEADER.replace("sm_100a", "sm_90a")
        + kernel("plain")
        + kernel("accumulating", accumulate=1, sign=-1)
        + kernel("no_barrier", barrier="")
        + kernel("no_wait", wait="")
    )


def cores(matrix):
    """Rows x 16 -> 8x8 cores in memory order."""
    return matrix.reshape(-1, 8, 2, 8).transpose(1, 2).contiguous()


def run(module, name, **options):
    torch.manual_seed(0)
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.zeros(128, 8)
    module.launch(name, 1, 128, [cores(a), cores(b), out], **options)
    result = torch.zeros(64, 16)
    for thread in range(128):
        for i in range(8):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            result[row, 8 * (i // 4) + thread % 4 * 2 + i % 2] = out[thread, i]
    return result.double(), a.double() @ b.double().T


@pytest.mark.parametrize("seed", [0, 1])
def test_product(module, seed):
    result, expected = run(module, "plain", schedule_seed=seed)
    assert (result - expected).abs().max() < 1e-4
    result, expected = run(module, "accumulating", schedule_seed=seed)
    assert (result - (1 - expected)).abs().max() < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_hazards(module, seed):
    with pytest.raises(ptxemu.KernelFault) as caught:
        run(module, "no_wait", schedule_seed=seed)
    assert caught.value.kind == "async_hazard" and "wait for the wgmma" in str(caught.value)
    with pytest.raises(ptxemu.KernelFault) as caught:
        run(module, "no_barrier", schedule_seed=seed)
    assert caught.value.kind == "shared_race"


def test_counters(module):
    data = [np.zeros(2048, np.uint8), np.zeros(512, np.uint8), np.zeros(4096, np.uint8)]
    counters = module.launch("plain", 1, 128, data, counters=True).counters
    assert counters.warp_instructions == {"wgmma": 1}
    assert counters.matrix_flops == 2 * 64 * 16 * 16
