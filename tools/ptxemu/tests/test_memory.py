"""Loads, stores, atomics, device functions, module variables, printf and assert."""

import numpy as np
import ptxemu
import pytest
from harness import HEADER

PTX = (
    HEADER
    + """
.global .align 4 .u32 counter = 5;
.const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};
.global .align 8 .u64 table_address = generic(counter);
.shared .align 16 .b8 block_static[64];
.extern .shared .align 16 .b8 dynamic[];

.visible .entry vectors(.param .u64 src, .param .u64 dst) {
  .reg .b64 %a<3>; .reg .b32 %r<9>; .reg .b16 %h<5>; .reg .f32 %f<5>;
  ld.param.u64 %a1, [src]; ld.param.u64 %a2, [dst];
  ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r1, %r2, %r3, %r4}, [%a1];
  st.global.v4.b32 [%a2], {%r4, %r3, %r2, %r1};
  ld.global.v2.u16 {%h1, %h2}, [%a1+16];
  st.global.v2.u16 [%a2+16], {%h2, %h1};
  ld.global.s8 %r5, [%a1+20];
  st.global.b32 [%a2+20], %r5;
  ld.global.u8 %r6, [%a1+20];
  st.volatile.global.u32 [%a2+24], %r6;
  ld.const.f32 %f1, [table+8];
  st.global.f32 [%a2+28], %f1;
  ld.relaxed.gpu.global.u64 %a1, [%a1+24];
  st.release.sys.global.u64 [%a2+32], %a1;
  ret;
}

.visible .entry spaces(.param .u64 dst) {
  .local .align 4 .b8 depot[32];
  .reg .b64 %a<6>; .reg .b32 %r<6>; .reg .pred %p<3>;
  ld.param.u64 %a1, [dst];
  mov.u64 %a2, depot;
  mov.u32 %r1, 41;
  st.local.u32 [%a2+4], %r1;
  cvta.local.u64 %a3, %a2;
  ld.u32 %r2, [%a3+4];
  add.u32 %r2, %r2, 1;
  mov.u32 %r3, dynamic;
  st.shared.u32 [%r3+8], %r2;
  cvt.u64.u32 %a4, %r3;
  cvta.shared.u64 %a4, %a4;
  ld.u32 %r4, [%a4+8];
  isspacep.shared %p1, %a4;
  selp.u32 %r5, 1, 0, %p1;
  st.global.u32 [%a1], %r4;
  st.u32 [%a1+4], %r5;
  st.shared.u32 [block_static+60], %r4;
  ld.shared.u32 %r4, [block_static+60];
  st.global.u32 [%a1+8], %r4;
  st.global.u32 [%a1+12], %r3;
  ret;
}

.visible .entry atomics(.param .u64 dst) {
  .reg .b64 %a<4>; .reg .b32 %r<9>; .reg .f32 %f<6>; .reg .b32 %t; .reg .b16 %h<3>;
  ld.param.u64 %a1, [dst];
  mov.u32 %t, %tid.x;
  atom.global.add.u32 %r1, [counter], 1;
  atom.global.add.u32 %r1, [%a1], %t;
  red.global.max.s32 [%a1+4], %t;
  red.global.min.u32 [%a1+8], %t;
  atom.global.inc.u32 %r2, [%a1+12], 9;
  mov.f32 %f1, 0f3F000000;
  red.relaxed.gpu.global.add.f32 [%a1+16], %f1;
  mov.b32 %r3, 0x3C003C00;
  red.global.add.noftz.f16x2 [%a1+20], %r3;
  mov.b32 %r4, 0x3F803F80;
  red.global.add.noftz.bf16x2 [%a1+24], %r4;
  atom.global.cas.b32 %r5, [%a1+28], 0, %t;
  red.global.add.v4.f32 [%a1+32], {%f1, %f1, %f1, %f1};
  atom.global.exch.b64 %a2, [%a1+48], 77;
  red.global.or.b32 [%a1+56], 6;
  red.global.and.b32 [%a1+60], 12;
  ret;
}

.func (.param .align 8 .b8 result[16]) sums(.param .b32 x, .param .align 4 .b8 pair[8]) {
  .reg .b32 %r<6>;
  .local .align 4 .b8 scratch[64];
  ld.param.u32 %r1, [x]; ld.param.u32 %r2, [pair]; ld.param.u32 %r3, [pair+4];
  add.u32 %r4, %r1, %r2; st.param.u32 [result], %r4;
  add.u32 %r5, %r4, %r3; st.param.u32 [result+12], %r5;
  ret;
}

.visible .entry calls(.param .u64 dst, .param .u32 n) {
  .reg .b64 %a<2>; .reg .b32 %r<6>;
  ld.param.u64 %a1, [dst]; ld.param.u32 %r1, [n];
  { // callseq
  .reg .b32 temp_param_reg;
  .param .b32 param0; st.param.b32 [param0+0], %r1;
  .param .align 4 .b8 param1[8]; st.param.b32 [param1+0], 10; st.param.b32 [param1+4], 100;
  .param .align 8 .b8 retval0[16];
  call.uni (retval0), sums, (param0, param1);
  ld.param.b32 %r2, [retval0+0]; ld.param.b32 %r3, [retval0+12];
  }
  st.global.u32 [%a1], %r2; st.global.u32 [%a1+4], %r3;
  ret;
}

.visible .entry inner_scopes(.param .u64 dst) {
  .reg .b64 %a<2>; .reg .b32 %r<4>; .reg .pred %p<2>;
  ld.param.u64 %a1, [dst];
  mov.u32 %r1, 0;
  LOOP:
  { .reg .b32 %r<3>; .reg .pred p; mov.u32 %r1, 5; setp.eq.u32 p, %r1, 5; @p bra SKIP; st.global.u32 [%a1+4], %r1; SKIP: }
  { .reg .pred p; setp.eq.u32 p, 1, 1; @p bra SKIP; st.global.u32 [%a1+4], 3; SKIP: }
  add.u32 %r1, %r1, 1;
  setp.lt.u32 %p1, %r1, 10;
  @%p1 bra LOOP;
  st.global.u32 [%a1], %r1;
  ret;
}
"""
)


@pytest.fixture(scope="module")
def module():
    return ptxemu.compile_ptx(PTX)


def test_vectors(module):
    src = np.arange(1, 33, dtype=np.uint8).repeat(1)
    src[20] = 0x85
    dst = np.zeros(40, np.uint8)
    module.launch("vectors", 1, 1, [src, dst])
    words = src[:16].view(np.uint32)
    assert (dst[:16].view(np.uint32) == words[::-1]).all()
    assert (dst[16:20].view(np.uint16) == src[16:20].view(np.uint16)[::-1]).all()
    assert dst[20:24].view(np.int32)[0] == 0x85 - 256 and dst[24:28].view(np.int32)[0] == 0x85
    assert dst[28:32].view(np.float32)[0] == 3.0
    assert (dst[32:] == src[24:32]).all()


def test_spaces(module):
    dst = np.zeros(4, np.uint32)
    module.launch("spaces", 1, 1, [dst], shared_bytes=16)
    assert dst.tolist() == [42, 1, 42, 64]


def test_atomics(module):
    dst = np.zeros(16, np.uint32)
    dst[2] = 1000
    dst[15] = 15
    before = module.variables["counter"].view(np.uint32)[0]
    module.launch("atomics", 3, 32, [dst], workers=2)
    assert module.variables["counter"].view(np.uint32)[0] == before + 96
    assert dst[:4].tolist() == [3 * 496, 31, 0, 96 % 10]
    assert dst[4:5].view(np.float32)[0] == 48
    assert dst[5:6].view(np.float16).tolist() == [96, 96]
    assert dst[6] >> 16 == dst[6] & 0xFFFF == 0x42C0  # 96 in bf16
    assert 1 <= dst[7] <= 31
    assert dst[8:12].view(np.float32).tolist() == [48] * 4
    assert dst[12] == 77 and dst[14] == 6 and dst[15] == 12


def test_variables(module):
    assert module.variables["table"].view(np.float32).tolist() == [1, 2, 3, 4]
    address = module.variables["table_address"].view(np.uint64)[0]
    assert address == ptxemu.pointer(module.variables["counter"])


def test_calls(module):
    dst = np.zeros(2, np.uint32)
    module.launch("calls", 1, 1, [dst, 7])
    assert dst.tolist() == [17, 117]


def test_inner_scopes(module):
    dst = np.zeros(2, np.uint32)
    module.launch("inner_scopes", 1, 1, [dst])
    assert dst.tolist() == [10, 0]


def test_argument_errors(module):
    with pytest.raises(TypeError, match="takes 2 arguments"):
        module.launch("calls", 1, 1, [1])
    with pytest.raises(ptxemu.PtxError, match="no kernel `nothing`"):
        module.launch("nothing", 1, 1, [])
    with pytest.raises(ValueError, match="1024 threads"):
        module.launch("calls", 1, 2048, [np.zeros(2, np.uint32), 1])


@pytest.mark.parametrize("statement", ["tcgen05.fence::before_thread_sync;", "frobnicate.b32 %r1, %r1;",
                                       "cvt.rn.frob.f32 %r1, %r1;"])  # fmt: skip
def test_unsupported_names_the_line(statement):
    text = HEADER + ".visible .entry k() {\n.reg .b32 %r<3>;\n" + statement + "\nret;\n}\n"
    with pytest.raises(ptxemu.Unsupported, match=r"k, PTX line 6 `"):
        ptxemu.compile_ptx(text)


@pytest.mark.needs_nvcc
def test_printf_assert_and_cuda_features(capfd):
    module = ptxemu.compile_cuda(
        """
        #include <cassert>
        #include <cstdio>
        __device__ __noinline__ float twice(float x) { return x + x; }
        __device__ int total;
        extern "C" __global__ void k(float* out, int n) {
          if (threadIdx.x == 0) printf("n=%d half=%.2f %s\\n", n, n / 2.0, "end");
          float local[8];
          for (int i = 0; i < 8; i++) local[i] = twice(i + threadIdx.x);
          atomicAdd(&total, 1);
          out[threadIdx.x] = local[n & 7] + expf(0.f) + sinf(0.f);
          assert(threadIdx.x != n);
        }
        """,
        defines={"UNUSED": None},
    )
    out = np.zeros(32, np.float32)
    module.launch("k", 1, 32, [out, 35])
    assert out.tolist() == [2 * (3 + t) + 1 for t in range(32)]
    assert module.variables["total"].view(np.int32)[0] == 32
    assert capfd.readouterr().out == "n=35 half=17.50 end\n"
    with pytest.raises(ptxemu.KernelFault, match=r"assertion `threadIdx\.x != n' failed") as caught:
        module.launch("k", 1, 32, [out, 3])
    assert caught.value.kind == "trap" and caught.value.thread == (3, 0, 0)


def test_missing_tool_is_explained(monkeypatch):
    from ptxemu import toolchain

    monkeypatch.setattr(toolchain.shutil, "which", lambda *a, **k: None)
    with pytest.raises(ptxemu.ToolMissing, match="nvcc was not found"):
        ptxemu.compile_cuda("__global__ void k() {}\n")
