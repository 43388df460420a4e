"""Matrix instructions against float64, through the fragment layouts of the PTX manual."""

import math
from fractions import Fraction

import numpy as np
import ptxemu
import pytest
from harness import HEADER

torch = pytest.importorskip("torch")

# name: (a/b type, accumulator type, k, elements per register)
MMA = {
    "bf16": ("bf16", "f32", 16, 2),
    "f16": ("f16", "f32", 16, 2),
    "f16_k8": ("f16", "f32", 8, 2),
    "f16_f16": ("f16", "f16", 16, 2),
    "tf32": ("tf32", "f32", 8, 1),
    "tf32_k4": ("tf32", "f32", 4, 1),
    "e4m3": ("e4m3", "f32", 32, 4),
    "e5m2": ("e5m2", "f32", 32, 4),
    "s8": ("s8", "s32", 32, 4),
    "u8": ("u8", "s32", 16, 4),
}
DTYPE = {
    "bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2, "s8": torch.int8, "u8": torch.uint8, "f32": torch.float32, "s32": torch.int32,
}  # fmt: skip


def mma_kernel(name):
    kind, acc, k, per = MMA[name]
    na, nb, nc = 16 * k // 32 // per, 8 * k // 32 // per, 2 if acc == "f16" else 4
    loads = ""
    for base, pointer, count in ((0, 1, na), (8, 2, nb), (16, 3, nc)):
        loads += f"mad.wide.u32 %a{pointer}, %t, {4 * count}, %a{pointer};"
        loads += "".join(f"ld.global.b32 %r{base + i}, [%a{pointer}+{4 * i}];" for i in range(count))

    def join(base, count):
        return "{" + ",".join(f"%r{base + i}" for i in range(count)) + "}"

    stores = "".join(f"st.global.b32 [%a3+{4 * i}], %r{24 + i};" for i in range(nc))
    return f"""
.visible .entry mma_{name}(.param .u64 a, .param .u64 b, .param .u64 c) {{
  .reg .b64 %a<4>; .reg .b32 %r<32>, %t;
  ld.param.u64 %a1, [a]; ld.param.u64 %a2, [b]; ld.param.u64 %a3, [c]; mov.u32 %t, %tid.x; {loads}
  mma.sync.aligned.m16n8k{k}.row.col.{acc}.{kind}.{kind}.{acc} {join(24, nc)}, {join(0, na)}, {join(8, nb)}, {join(16, nc)};
  {stores} ret; }}
"""


COPIES = """
.visible .entry copies(.param .u64 src, .param .u64 dst) {
  .shared .align 16 .b8 tile[1024];
  .reg .b64 %a<4>; .reg .b32 %r<32>, %t, %s, %z;
  ld.param.u64 %a1, [src]; ld.param.u64 %a2, [dst]; mov.u32 %t, %tid.x; mov.u32 %z, tile;
  mad.lo.u32 %s, %t, 16, %z; mad.wide.u32 %a1, %t, 16, %a1; mad.wide.u32 %a2, %t, 48, %a2;
  ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%a1]; st.shared.v4.u32 [%s], {%r0, %r1, %r2, %r3};
  bar.sync 0;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%s];
  ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%r8, %r9, %r10, %r11}, [%s];
  st.global.v4.u32 [%a2], {%r4, %r5, %r6, %r7};
  st.global.v4.u32 [%a2+16], {%r8, %r9, %r10, %r11};
  movmatrix.sync.aligned.m8n8.trans.b16 %r12, %r4;
  st.global.u32 [%a2+32], %r12;
  add.u32 %s, %s, 512;
  stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%s], {%r8, %r9, %r10, %r11};
  bar.sync 0;
  ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [%s];
  st.global.v4.u32 [%a1], {%r3, %r2, %r1, %r0};
  ret;
}
"""

REPLICAS = """
.visible .entry replicas(.param .u32 differ) {
  .shared .align 16 .b8 tile[512];
  .reg .b32 %t, %w, %s, %z, %f;
  ld.param.u32 %f, [differ]; mov.u32 %t, %tid.x; mov.u32 %z, tile;
  and.b32 %s, %t, 31; mad.lo.u32 %s, %s, 16, %z;
  shr.u32 %w, %t, 5; mul.lo.u32 %w, %w, %f;
  stmatrix.sync.aligned.m8n8.x4.shared.b16 [%s], {%w, %w, %w, %w};
  ret;
}
"""


@pytest.fixture(scope="module")
def module():
    return ptxemu.compile_ptx(HEADER + "".join(mma_kernel(n) for n in MMA) + COPIES + REPLICAS)


def fragment(matrix, rows, per):
    """A 16 x k (rows=2) or transposed 8 x k (rows=1) matrix as the 32 lanes' elements in PTX order."""
    out = []
    k = matrix.shape[1]
    for lane in range(32):
        for half in range(k // (4 * per)):
            for block in range(rows):
                row, first = lane // 4 + 8 * block, lane % 4 * per + 4 * per * half
                out.append(matrix[row, first : first + per])
    return torch.cat(out)


def accumulator(matrix):
    return torch.stack([matrix[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for lane in range(32) for i in range(4)])


def values(shape, kind):
    if kind in ("s8", "u8", "s32"):
        low, high = {"s8": (-128, 128), "u8": (0, 256), "s32": (-1000, 1000)}[kind]
        return torch.randint(low, high, shape, dtype=DTYPE[kind])
    x = torch.randn(shape)
    if kind == "tf32":  # representable values, with junk in the bits that are ignored
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(DTYPE[kind])


@pytest.mark.parametrize("name", MMA)
def test_mma(module, name):
    kind, acc, k, per = MMA[name]
    torch.manual_seed(1)
    a, b, c = values((16, k), kind), values((8, k), kind), values((16, 8), acc)

    def raw(x):
        return x.contiguous().view(torch.uint8).numpy().copy()

    a_raw, b_raw = raw(fragment(a, 2, per)), raw(fragment(b, 1, per))
    if kind == "tf32":
        a_raw.view(np.uint32)[:] |= 0x0FFF
    out = raw(accumulator(c))
    module.launch(f"mma_{name}", 1, 32, [a_raw, b_raw, out])
    expected = accumulator(a.double() @ b.double().T + c.double())
    result = torch.from_numpy(out).view(DTYPE[acc]).double()
    tolerance = 1e-2 if kind in ("e4m3", "e5m2") else {"f32": 1e-4, "f16": 2e-2, "s32": 0}[acc]
    assert (result - expected).abs().max() <= tolerance * max(1, expected.abs().max().item() / 8)


def exponent(x):
    return math.frexp(x)[1] - 1


def truncated(x, bits):
    """A fraction, towards zero, to `bits` behind the binary point."""
    return Fraction(math.trunc(x * Fraction(2) ** bits), 1) / Fraction(2) ** bits


def tensor_core_sum(c, products, fraction_bits, terms):
    """A sum as ptx_sums.cpp describes it, in exact fractions. products: pairs of factors, normal numbers or zeros."""
    for first in range(0, len(products), terms):
        step = [(x, y) for x, y in products[first : first + terms] if x and y]
        exponents = [exponent(x) + exponent(y) for x, y in step] + ([exponent(c)] if c else [])
        bits = fraction_bits - max(exponents, default=0)
        total = sum((truncated(Fraction(x) * Fraction(y), bits) for x, y in step), truncated(Fraction(c), bits))
        c = float(truncated(total, 23 - exponent(float(total)))) if total else 0.0
    return c


@pytest.mark.parametrize("guard_bits", [0, 1, 2])
@pytest.mark.parametrize("name", ["bf16", "f16", "f16_k8", "tf32", "tf32_k4", "e4m3", "e5m2"])
def test_mma_truncates_as_tensor_cores_do(module, name, guard_bits):
    """Bit for bit, with terms of very different sizes and signs."""
    kind, _, k, per = MMA[name]
    torch.manual_seed(2)
    a, b, c = values((16, k), kind), values((8, k), kind), 3 * torch.randn(16, 8)
    a, c = (a.float() * 2.0 ** torch.randint(-3, 4, a.shape)).to(a.dtype), c * 2.0 ** torch.randint(-6, 3, c.shape)
    out = accumulator(c).numpy().copy()
    fragments = [fragment(x, rows, per).contiguous().view(torch.uint8).numpy().copy() for x, rows in ((a, 2), (b, 1))]
    module.launch(f"mma_{name}", 1, 32, [*fragments, out], guard_bits=guard_bits)
    bits = 13 if per == 4 else 23 + guard_bits
    a, b = a.float().tolist(), b.float().tolist()
    expected = [
        [tensor_core_sum(c[m, n].item(), list(zip(a[m], b[n], strict=True)), bits, 4 * per) for n in range(8)]
        for m in range(16)
    ]
    assert torch.equal(torch.from_numpy(out), accumulator(torch.tensor(expected)))


@pytest.mark.parametrize(
    "guard_bits, c, small, count, expected",
    [
        (0, 1.0, 2.0**-24, 2, 1.0),  # each is lost where it is aligned
        (1, 1.0, 2.0**-24, 2, 1.0 + 2.0**-23),
        (1, 1.0, 2.0**-24, 3, 1.0 + 2.0**-23),  # the sum is exact, its result is truncated
        (1, -1.0, -(2.0**-24), 3, -1.0 - 2.0**-23),  # towards zero
        (0, 1.0, -(2.0**-24), 1, 1.0),
        (1, 1.0, -(2.0**-24), 1, 1.0 - 2.0**-24),
        (1, 1.0, 2.0**-25, 4, 1.0),
        (2, 1.0, 2.0**-25, 4, 1.0 + 2.0**-23),
    ],
)
def test_guard_bits(module, guard_bits, c, small, count, expected):
    """Probes as in Fasi et al. (2021): how many bits below the accumulator's take part in a sum."""
    a, b = torch.zeros(16, 16), torch.ones(8, 16)
    a[:, :count] = small
    out = accumulator(torch.full((16, 8), c)).numpy().copy()
    raw = [fragment(x.bfloat16(), rows, 2).view(torch.uint8).numpy().copy() for x, rows in ((a, 2), (b, 1))]
    module.launch("mma_bf16", 1, 32, [*raw, out], guard_bits=guard_bits)
    assert (out == np.float32(expected)).all()


def test_infinities_and_nan_stay(module):
    a, b, c = torch.ones(16, 16), torch.ones(8, 16), torch.zeros(16, 8)
    a[1, 3], b[2, 5], c[4, 4], a[6, 0] = math.inf, -math.inf, math.nan, 3e38
    out = accumulator(c).numpy().copy()
    raw = [fragment(x.bfloat16(), rows, 2).view(torch.uint8).numpy().copy() for x, rows in ((a, 2), (8 * b, 1))]
    module.launch("mma_bf16", 1, 32, [*raw, out])
    expected = accumulator(a.double() @ (8 * b.double()).T + c)
    seen = torch.from_numpy(out)
    torch.testing.assert_close(seen, expected.float(), equal_nan=True, rtol=1e-2, atol=0)


def test_matrix_copies(module):
    tiles = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    src, dst = tiles.copy(), np.zeros((32, 12), np.uint32)
    module.launch("copies", 1, 32, [src, dst])

    def pair(m, lane):
        return int(m[lane // 4, lane % 4 * 2]) | int(m[lane // 4, lane % 4 * 2 + 1]) << 16

    for lane in range(32):
        assert dst[lane, :4].tolist() == [pair(m, lane) for m in tiles]
        assert dst[lane, 4:8].tolist() == [pair(m.T, lane) for m in tiles]
        assert dst[lane, 8] == pair(tiles[0].T, lane)
    # stmatrix undid the transposing load
    assert (src.view(np.uint32).reshape(32, 4)[:, ::-1] == tiles.view(np.uint32).reshape(32, 4)).all()


def test_stmatrix_of_two_warps_to_one_place(module):
    """Compilers give several warps the same lines of a small tile: a race unless they write the same."""
    module.launch("replicas", 1, 64, [0])
    with pytest.raises(ptxemu.KernelFault, match="races with the write"):
        module.launch("replicas", 1, 64, [1])


def test_incomplete_warp_is_reported(module):
    with pytest.raises(ptxemu.KernelFault, match="needs all 32 lanes"):
        module.launch(
            "mma_bf16",
            1,
            24,
            [np.zeros(512, np.uint8), np.zeros(512, np.uint8), np.zeros(512, np.uint8)],
        )
