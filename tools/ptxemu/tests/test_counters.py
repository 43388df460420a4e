"""Counters on kernels whose traffic is known, and the static reports."""

import numpy as np
import ptxemu
import pytest
from harness import HEADER

PTX = (
    HEADER
    + """
.visible .entry shared_stride(.param .u32 stride, .param .u32 width) {
  .shared .align 16 .b8 tile[32768];
  .reg .b32 %r<9>; .reg .pred %p<3>;
  ld.param.u32 %r1, [stride]; ld.param.u32 %r2, [width];
  mov.u32 %r3, %tid.x; mov.u32 %r4, tile; mad.lo.u32 %r4, %r3, %r1, %r4;
  setp.eq.u32 %p1, %r2, 4; setp.eq.u32 %p2, %r2, 16;
  @%p1 st.shared.u32 [%r4], %r3;
  @%p2 st.shared.v4.u32 [%r4], {%r3, %r3, %r3, %r3};
  ret;
}
.visible .entry broadcast() {
  .shared .align 16 .b8 tile[128];
  .reg .b32 %r<9>;
  mov.u32 %r3, %tid.x; mov.u32 %r4, tile; mad.lo.u32 %r5, %r3, 4, %r4; st.shared.u32 [%r5], %r3; bar.sync 0;
  ld.shared.u32 %r6, [%r4];
  ret;
}
.visible .entry matrix_rows(.param .u32 pitch) {
  .shared .align 16 .b8 tile[8192];
  .reg .b32 %r<12>;
  ld.param.u32 %r1, [pitch]; mov.u32 %r3, %tid.x; mov.u32 %r4, tile; mad.lo.u32 %r5, %r3, %r1, %r4;
  st.shared.v4.u32 [%r5], {%r3, %r3, %r3, %r3};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r5];
  ret;
}
.visible .entry global_stride(.param .u64 data, .param .u32 stride) {
  .reg .b64 %a<3>; .reg .b32 %r<5>;
  ld.param.u64 %a1, [data]; ld.param.u32 %r1, [stride]; mov.u32 %r2, %tid.x; mul.lo.u32 %r3, %r2, %r1;
  mad.wide.u32 %a2, %r3, 4, %a1;
  ld.global.u32 %r4, [%a2]; ld.global.u32 %r4, [%a2];
  st.global.u32 [%a2], %r4;
  ret;
}
.visible .entry loop(.param .u64 data, .param .u32 n) {
  .reg .b64 %a<3>; .reg .b32 %r<5>; .reg .f32 %f<3>; .reg .pred %p;
  ld.param.u64 %a1, [data]; ld.param.u32 %r1, [n]; mov.u32 %r2, %tid.x; mad.wide.u32 %a2, %r2, 4, %a1;
  ld.global.f32 %f1, [%a2]; mov.u32 %r3, 0;
LOOP:
  fma.rn.f32 %f1, %f1, 0f3F800000, 0f3F800000;
  ex2.approx.f32 %f2, %f1;
  add.u32 %r3, %r3, 1;
  setp.lt.u32 %p, %r3, %r1;
  @%p bra LOOP;
  red.global.add.f32 [%a1], %f1;
  ret;
}
.visible .entry multiply() {
  .reg .b32 %r<12>; .reg .f32 %f<9>;
  mov.b32 %r1, 0; mov.f32 %f1, 0f00000000;
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%f1,%f1,%f1,%f1};
  mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r1,%r1,%r1,%r1}, {%r1,%r1}, {%f1,%f1,%f1,%f1};
  shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
  ret;
}
"""
)


@pytest.fixture(scope="module")
def module():
    return ptxemu.compile_ptx(PTX)


def count(module, name, threads, *args, grid=1, check=True):
    return module.launch(name, grid, threads, args, counters=True, check=check).counters


@pytest.mark.parametrize(
    "stride, width, conflict, ideal",
    [
        (4, 4, 1, 1),     # a row: no conflict
        (128, 4, 32, 1),  # a column of a 32-word-wide tile: 32-way
        (132, 4, 1, 1),   # the same, padded by one word
        (8, 4, 2, 1),     # every other word: 2-way
        (16, 16, 4, 4),   # 16-byte accesses, contiguous: a quarter-warp per wavefront
        (128, 16, 32, 4), # 16-byte accesses down a column: 8-way
        (144, 16, 4, 4),  # padded by 16 bytes
    ],
)  # fmt: skip
def test_bank_conflicts(module, stride, width, conflict, ideal):
    c = count(module, "shared_stride", 32, stride, width)
    assert (c.shared_wavefronts, c.shared_ideal) == (conflict, ideal)
    assert c.bank_conflict_ratio == conflict / ideal


def test_broadcast_is_free(module):
    c = count(module, "broadcast", 32)
    assert c.of_class("shared_load")["shared_wavefronts"] == 1


@pytest.mark.parametrize("pitch, wavefronts", [(16, 4), (128, 32), (144, 4), (64, 16), (80, 4)])
def test_ldmatrix_conflicts(module, pitch, wavefronts):
    loads = count(module, "matrix_rows", 32, pitch).of_class("ldmatrix")
    assert (loads["shared_wavefronts"], loads["shared_ideal"]) == (wavefronts, 4)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (8, 32), (64, 32)])
def test_coalescing(module, stride, sectors):
    data = np.zeros(32 * 64 + 64, np.uint32)
    skip = -data.ctypes.data % 128 // 4
    c = count(module, "global_stride", 32, data[skip : skip + 32 * 64], stride)
    assert c.global_requests == 3 and c.global_sectors == 3 * sectors and c.global_ideal == 12
    assert c.coalescing_ratio == sectors / 4
    # the second load of the same bytes adds nothing
    assert (c.global_bytes_read, c.global_bytes_written, c.global_bytes_touched) == (128, 128, 128)


def test_instruction_counts(module):
    data = np.zeros(64, np.float32)
    c = count(module, "loop", 64, data, 10, grid=3, check=False)  # the blocks race on data[0]
    threads = 3 * 64
    assert c.instructions["float"] == c.instructions["special_function"] == 10 * threads
    assert c.instructions["atomic"] == c.atomics == threads
    assert c.instructions["integer"] == (1 + 10 + 10) * threads  # mad, add, setp
    assert c.instructions["branch"] == (9 + 1) * threads  # taken branches and ret
    assert c.scalar_flops == 2 * 10 * threads
    hot = max(c.lines, key=lambda line: line["count"])
    assert hot["count"] == 10 * threads


def test_matrix_work(module):
    c = count(module, "multiply", 64)
    assert c.warp_instructions == {"mma": 4}
    assert c.matrix_flops == 2 * (2 * 16 * 8 * 16 + 2 * 16 * 8 * 8)
    assert c.instructions["shuffle"] == 64


def test_counters_do_not_change_results(module):
    plain, counted = np.zeros(64, np.float32), np.zeros(64, np.float32)
    module.launch("loop", 1, 64, [plain, 5], check=False)
    module.launch("loop", 1, 64, [counted, 5], counters=True, check=False)
    assert (plain == counted).all()


@pytest.mark.needs_nvcc
def test_gemm_work_and_minimum_traffic(kernels):
    module = ptxemu.compile_cuda(kernels / "gemm.cu")
    m, n, k = 128, 64, 96
    a, b = np.zeros((m, k), np.uint16), np.zeros((k, n), np.uint16)
    c = np.zeros((m, n), np.float32)
    counters = module.launch("gemm", (n // 64, m // 64), 128, [a, b, c, m, n, k], counters=True).counters
    assert counters.matrix_flops == 2 * m * n * k
    assert counters.global_bytes_read == a.nbytes + b.nbytes
    assert counters.global_bytes_written == c.nbytes
    assert counters.of_class("ldmatrix")["bank_conflict_ratio"] == 1.0
    assert counters.shared_bytes == 2 * 64 * 40 * 2 + 2 * 32 * 72 * 2
    assert "bank conflicts" in counters.summary()


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) busy(float* out, const float* in) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; i++) x[i] = in[i * 1024 + threadIdx.x];
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int i = 0; i < 96; i++) x[i] = x[i] * x[(i + k + 1) % 96] + 1.f;
#pragma unroll
  for (int i = 0; i < 96; i++) out[i * 1024 + threadIdx.x] = x[i];
}
"""


@pytest.mark.needs_nvcc
@pytest.mark.needs_ptxas
def test_resources_and_sass(kernels):
    ptx = ptxemu.cuda_to_ptx(kernels / "gemm.cu")
    used = ptxemu.resources(ptx)["gemm"]
    assert 32 < used["registers"] <= 255 and used["spill_stores"] == 0 and used["static_shared"] == 19456
    histogram = ptxemu.sass_histogram(ptx)["gemm"]
    for opcode in ("HMMA", "LDSM", "LDGSTS", "STG", "BAR"):
        assert histogram["total"][opcode] > 0
    assert histogram["loop"]["HMMA"] > 0 and histogram["loop"]["STG"] == 0
    spilling = ptxemu.resources(ptxemu.cuda_to_ptx(SPILLING))["busy"]
    assert spilling["registers"] <= 32 and spilling["spill_stores"] > 0 and spilling["stack"] > 0
