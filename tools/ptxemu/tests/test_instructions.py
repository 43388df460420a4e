"""Arithmetic, logic, comparison, conversion and move instructions against numpy and torch."""

import numpy as np
import pytest
from harness import Case, build

torch = pytest.importorskip("torch")

N = 64
rng = np.random.default_rng(0)
F1, F2, F3 = ((rng.standard_normal(N) * 4).astype(np.float32) for _ in range(3))
F1[:4], F2[:4] = [np.nan, 1, -0.0, np.inf], [1, np.nan, 0.0, -np.inf]
D1, D2, D3 = (rng.standard_normal(N) for _ in range(3))
U1, U2, U3 = (rng.integers(0, 2**32, N, dtype=np.uint32) for _ in range(3))
S1, S2, S3 = (x.view(np.int32) for x in (U1, U2, U3))
L1, L2 = (rng.integers(0, 2**63, N, dtype=np.uint64) * np.uint64(3) for _ in range(2))
H1, H2 = (rng.integers(0, 2**16, N, dtype=np.uint16) for _ in range(2))
SHIFT = (np.arange(N) % 40).astype(np.uint32)
BIG = [int(x) for x in U1], [int(x) for x in U2], [int(x) for x in U3]
SBIG = [int(x) for x in S1], [int(x) for x in S2], [int(x) for x in S3]


def u32(values):
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def u64(values):
    return np.array([v & (2**64 - 1) for v in values], np.uint64)


def halves(kind, pairs=True):
    """Random finite f16/bf16 values as raw words and as float64 arrays of shape (N, 1 or 2)."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    values = torch.randn(N, 2 if pairs else 1, generator=torch.Generator().manual_seed(len(CASES))).to(dtype)
    raw = values.view(torch.int16).numpy().copy().view(np.uint32 if pairs else np.uint16).reshape(N)
    return raw, values.double()


def to_raw(kind, values):
    """float64 tensor (N, 1 or 2) -> raw words, rounded once to nearest even."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    out = values.to(dtype).view(torch.int16).numpy().copy()
    return out.view(np.uint32 if values.shape[1] == 2 else np.uint16).reshape(N)


CASES = []


def case(name, body, inputs, result, expected, tolerance=0.0, registers=""):
    CASES.append(Case(name, body, list(inputs), np.dtype(result), expected, tolerance, registers))


with np.errstate(all="ignore"):
    # -- float --------------------------------------------------------------------------------
    for op, f in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        case(f"{op}.f32", f"{op}.f32 %d, %a, %b;", (F1, F2), "f4", f(F1, F2))
        case(f"{op}.f64", f"{op}.f64 %d, %a, %b;", (D1, D2), "f8", f(D1, D2))
    case("div.rn.f32", "div.rn.f32 %d, %a, %b;", (F1, F2), "f4", F1 / F2)
    case("div.full.f32", "div.full.f32 %d, %a, %b;", (F1, F2), "f4", F1 / F2)
    case("fma.rn.f64", "fma.rn.f64 %d, %a, %b, %c;", (D1, D2, D3), "f8", D1 * D2 + D3, 1e-15)
    exact = F1.astype(np.float64) * F2 + F3
    case("fma.rn.f32", "fma.rn.f32 %d, %a, %b, %c;", (F1, F2, F3), "f4", exact.astype("f4"))
    down = exact.astype("f4")
    down = np.where(down.astype("f8") > exact, np.nextafter(down, np.float32(-np.inf)), down)
    case("fma.rm.f32", "fma.rm.f32 %d, %a, %b, %c;", (F1, F2, F3), "f4", down)
    case("min.f32", "min.f32 %d, %a, %b;", (F1, F2), "f4", np.fmin(F1, F2))
    case("max.f32", "max.f32 %d, %a, %b;", (F1, F2), "f4", np.fmax(F1, F2))
    case("max.NaN.f32", "max.NaN.f32 %d, %a, %b;", (F1, F2), "f4", np.maximum(F1, F2))
    case("max3", "max.f32 %d, %a, %b, %c;", (F1, F2, F3), "f4", np.fmax(np.fmax(F1, F2), F3))
    case("add.sat", "add.sat.f32 %d, %a, %b;", (F1, F2), "f4", np.nan_to_num(np.clip(F1 + F2, 0, 1)))
    case("abs.f32", "abs.f32 %d, %a;", (F1,), "f4", np.abs(F1))
    case("neg.f32", "neg.f32 %d, %a;", (F1,), "f4", -F1)
    case("copysign", "copysign.f32 %d, %a, %b;", (F1, F3), "f4", np.copysign(F3, F1))
    positive = np.abs(F3) + np.float32(0.1)
    for op, f in (
        ("ex2.approx.ftz.f32", np.exp2), ("sin.approx.f32", np.sin), ("cos.approx.f32", np.cos),
        ("tanh.approx.f32", np.tanh), ("lg2.approx.f32", np.log2), ("sqrt.rn.f32", np.sqrt),
        ("rcp.approx.f32", lambda x: 1 / x), ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
    ):  # fmt: skip
        case(op, f"{op} %d, %a;", (positive,), "f4", f(positive.astype("f8")), 1e-6)
    tiny = np.full(N, 1e-40, np.float32)
    case("add.ftz", "add.ftz.f32 %d, %a, %b;", (tiny, tiny), "f4", np.zeros(N))
    pair = np.stack([F1, F2], 1).copy().view(np.uint64).reshape(N)
    squares = torch.from_numpy(np.stack([F1, F2], 1)).double()
    squares = (squares.square() + squares).float().numpy().view(np.uint64).reshape(N)
    case("fma.f32x2", "fma.rn.f32x2 %d, %a, %a, %a;", (pair,), "u8", squares)

    # -- half precision -------------------------------------------------------------------------
    for kind in ("f16", "bf16"):
        for suffix in ("", "x2"):
            t, word = kind + suffix, "u4" if suffix else "u2"
            (a, x), (b, y), (c, z) = (halves(kind, bool(suffix)) for _ in range(3))
            b, y = np.roll(b, 1), y.roll(1, 0)
            c, z = np.roll(c, 2), z.roll(2, 0)
            case(f"add.{t}", f"add.rn.{t} %d, %a, %b;", (a, b), word, to_raw(kind, x + y))
            case(f"sub.{t}", f"sub.rn.{t} %d, %a, %b;", (a, b), word, to_raw(kind, x - y))
            case(f"mul.{t}", f"mul.rn.{t} %d, %a, %b;", (a, b), word, to_raw(kind, x * y))
            case(f"fma.{t}", f"fma.rn.{t} %d, %a, %b, %c;", (a, b, c), word, to_raw(kind, x * y + z))
            case(f"fma.relu.{t}", f"fma.rn.relu.{t} %d, %a, %b, %c;", (a, b, c), word,
                 to_raw(kind, (x * y + z).clamp(min=0)))  # fmt: skip
            case(f"min.{t}", f"min.{t} %d, %a, %b;", (a, b), word, to_raw(kind, torch.minimum(x, y)))
            case(f"max.{t}", f"max.{t} %d, %a, %b;", (a, b), word, to_raw(kind, torch.maximum(x, y)))
            case(f"neg.{t}", f"neg.{t} %d, %a;", (a,), word, to_raw(kind, -x))
            case(f"abs.{t}", f"abs.{t} %d, %a;", (a,), word, to_raw(kind, x.abs()))
            # float32 exp2 is rounded twice, which cannot be told apart at this size
            if kind == "f16":
                case(f"ex2.{t}", f"ex2.approx.{t} %d, %a;", (a,), word, to_raw(kind, torch.exp2(x)))

    # -- integers -------------------------------------------------------------------------------
    case("add.s32", "add.s32 %d, %a, %b;", (U1, U2), "u4", U1 + U2)
    case("sub.s32", "sub.s32 %d, %a, %b;", (U1, U2), "u4", U1 - U2)
    case("add.sat.s32", "add.sat.s32 %d, %a, %b;", (S1, S2), "i4",
         np.clip(S1.astype("i8") + S2, -(2**31), 2**31 - 1))  # fmt: skip
    case("mul.lo", "mul.lo.s32 %d, %a, %b;", (U1, U2), "u4", U1 * U2)
    case(
        "mul.hi.u32",
        "mul.hi.u32 %d, %a, %b;",
        (U1, U2),
        "u4",
        u32(x * y >> 32 for x, y in zip(*BIG[:2], strict=False)),
    )
    case(
        "mul.hi.s32",
        "mul.hi.s32 %d, %a, %b;",
        (U1, U2),
        "u4",
        u32(x * y >> 32 for x, y in zip(*SBIG[:2], strict=False)),
    )
    case("mul.hi.u64", "mul.hi.u64 %d, %a, %b;", (L1, L2), "u8",
         u64(int(x) * int(y) >> 64 for x, y in zip(L1, L2, strict=False)))  # fmt: skip
    case(
        "mul.wide.s32",
        "mul.wide.s32 %d, %a, %b;",
        (U1, U2),
        "u8",
        u64(x * y for x, y in zip(*SBIG[:2], strict=False)),
    )
    case("mad.lo", "mad.lo.s32 %d, %a, %b, %c;", (U1, U2, U3), "u4", U1 * U2 + U3)
    case("mad.wide.u32", "cvt.u64.u32 %rd1, %c; mad.wide.u32 %d, %a, %b, %rd1;", (U1, U2, U3), "u8",
         u64(x * y + z for x, y, z in zip(*BIG, strict=False)))  # fmt: skip
    case("div.s32", "div.s32 %d, %a, %b;", (S1, S2), "i4", [int(x / y) for x, y in zip(*SBIG[:2], strict=False)])
    case("rem.s32", "rem.s32 %d, %a, %b;", (S1, S2), "i4", np.fmod(S1.astype("i8"), S2))
    case(
        "div.u64",
        "div.u64 %d, %a, %b;",
        (L1, L2 >> np.uint64(20)),
        "u8",
        L1 // (L2 >> np.uint64(20)),
    )
    case("min.s32", "min.s32 %d, %a, %b;", (S1, S2), "i4", np.minimum(S1, S2))
    case("max.u32", "max.u32 %d, %a, %b;", (U1, U2), "u4", np.maximum(U1, U2))
    case("max.relu", "max.relu.s32 %d, %a, %b;", (S1, S2), "i4", np.maximum(np.maximum(S1, S2), 0))
    case("abs.s32", "abs.s32 %d, %a;", (S1,), "i4", np.abs(S1))
    case("neg.s32", "neg.s32 %d, %a;", (S1,), "i4", -S1)
    case("sad", "sad.s32 %d, %a, %b, %c;", (U1, U2, U3), "u4",
         u32(abs(x - y) + z for x, y, z in zip(*SBIG, strict=False)))  # fmt: skip
    case("dp4a", "dp4a.s32.u32 %d, %a, %b, %c;", (U1, U2, U3), "u4",
         (U1.view(np.int8).reshape(N, 4).astype("i8") * U2.view(np.uint8).reshape(N, 4)).sum(1) + U3 & 0xFFFFFFFF)  # fmt: skip
    case(
        "carry",
        """.reg .b32 %lo<4>, %hi<4>; mov.b64 {%lo1, %hi1}, %a; mov.b64 {%lo2, %hi2}, %b;
         add.cc.u32 %lo3, %lo1, %lo2; addc.u32 %hi3, %hi1, %hi2; mov.b64 %d, {%lo3, %hi3};""",
        (L1, L2),
        "u8",
        L1 + L2,
    )
    case(
        "borrow",
        """.reg .b32 %lo<4>, %hi<4>; mov.b64 {%lo1, %hi1}, %a; mov.b64 {%lo2, %hi2}, %b;
         sub.cc.u32 %lo3, %lo1, %lo2; subc.u32 %hi3, %hi1, %hi2; mov.b64 %d, {%lo3, %hi3};""",
        (L1, L2),
        "u8",
        L1 - L2,
    )
    case(
        "mad.cc",
        """.reg .b32 %s<4>; mad.lo.cc.u32 %s1, %a, %b, %c; madc.hi.u32 %s2, %a, %b, 0; mov.b64 %d, {%s1, %s2};""",
        (U1, U2, U3),
        "u8",
        u64(x * y + z for x, y, z in zip(*BIG, strict=False)),
    )

    # -- bits -----------------------------------------------------------------------------------
    case("and", "and.b32 %d, %a, %b;", (U1, U2), "u4", U1 & U2)
    case("not", "not.b32 %d, %a;", (U1,), "u4", ~U1)
    case("cnot", "cnot.b32 %d, %a;", (U1 % 2,), "u4", U1 % 2 == 0)
    case("lop3", "lop3.b32 %d, %a, %b, %c, 0xca;", (U1, U2, U3), "u4", (U1 & U2) | (~U1 & U3))
    case(
        "shl",
        "shl.b32 %d, %a, %b;",
        (U1, SHIFT),
        "u4",
        u32(x << int(s) for x, s in zip(BIG[0], SHIFT, strict=False)),
    )
    case(
        "shr.u32",
        "shr.u32 %d, %a, %b;",
        (U1, SHIFT),
        "u4",
        u32(x >> int(s) for x, s in zip(BIG[0], SHIFT, strict=False)),
    )
    case(
        "shr.s32",
        "shr.s32 %d, %a, %b;",
        (U1, SHIFT),
        "u4",
        u32(x >> int(s) for x, s in zip(SBIG[0], SHIFT, strict=False)),
    )
    case("shf.l.wrap", "shf.l.wrap.b32 %d, %a, %b, %c;", (U1, U2, SHIFT), "u4",
         u32((x | y << 32) << (int(s) & 31) >> 32 for x, y, s in zip(*BIG[:2], SHIFT, strict=False)))  # fmt: skip
    case("shf.r.clamp", "shf.r.clamp.b32 %d, %a, %b, %c;", (U1, U2, SHIFT), "u4",
         u32((x | y << 32) >> min(int(s), 32) for x, y, s in zip(*BIG[:2], SHIFT, strict=False)))  # fmt: skip
    case("prmt", "prmt.b32 %d, %a, %b, 0x7531;", (U1, U2), "u4",
         np.concatenate([U1[:, None].view(np.uint8)[:, 1::2], U2[:, None].view(np.uint8)[:, 1::2]], 1).copy().view(np.uint32)[:, 0])  # fmt: skip
    case("bfe.u32", "bfe.u32 %d, %a, 5, 9;", (U1,), "u4", U1 >> 5 & 511)
    case("bfe.s32", "bfe.s32 %d, %a, 5, 9;", (U1,), "i4", (U1 << 18).view(np.int32) >> 23)
    case(
        "bfi",
        "bfi.b32 %d, %a, %b, 4, 8;",
        (U1, U2),
        "u4",
        (U2 & ~np.uint32(0xFF0)) | (U1 & 255) << 4,
    )
    case("popc", "popc.b32 %d, %a;", (U1,), "u4", [bin(x).count("1") for x in BIG[0]])
    case(
        "clz",
        "clz.b32 %d, %a;",
        (U1 >> SHIFT % 32,),
        "u4",
        [32 - int(x).bit_length() for x in U1 >> SHIFT % 32],
    )
    case("brev", "brev.b32 %d, %a;", (U1,), "u4", [int(f"{x:032b}"[::-1], 2) for x in BIG[0]])
    case("bfind", "bfind.u32 %d, %a;", (U1,), "u4", u32(int(x).bit_length() - 1 for x in U1))
    case("bmsk", "bmsk.clamp.b32 %d, 3, 5;", (U1,), "u4", np.full(N, 0xF8))

    # -- moves, selection, comparison -------------------------------------------------------------
    case(
        "mov pack",
        "mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};",
        (U1,),
        "u4",
        U1 >> 16 | U1 << 16,
    )
    case(
        "selp",
        "setp.lt.s32 %p1, %a, %b; selp.b32 %d, %a, %b, %p1;",
        (S1, S2),
        "i4",
        np.minimum(S1, S2),
    )
    case("slct", "slct.b32.s32 %d, %a, %b, %c;", (U1, U2, U3), "u4", np.where(S3 >= 0, U1, U2))
    for op, f in (("lt", F1 < F2), ("ge", F1 >= F2), ("ne", (F1 < F2) | (F1 > F2)), ("neu", F1 != F2),
                  ("ltu", ~(F1 >= F2)), ("num", ~(np.isnan(F1) | np.isnan(F2))), ("nan", np.isnan(F1) | np.isnan(F2))):  # fmt: skip
        case(f"setp.{op}", f"setp.{op}.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", (F1, F2), "u4", f)
    case(
        "setp.and",
        """setp.gt.s32 %p3, %c, 0; setp.lt.and.s32 %p1|%p2, %a, %b, %p3; selp.b32 %r1, 1, 0, %p1;
         selp.b32 %r2, 2, 0, %p2; add.u32 %d, %r1, %r2;""",
        (S1, S2, S3),
        "u4",
        np.where(S3 > 0, np.where(S1 < S2, 1, 2), 0),
    )
    case("set", "set.lt.u32.s32 %d, %a, %b;", (S1, S2), "u4", np.where(S1 < S2, 0xFFFFFFFF, 0))
    case(
        "predicate",
        "mov.b32 %d, 7; setp.gt.s32 %p1, %a, 0; @!%p1 mov.b32 %d, 9;",
        (S1,),
        "u4",
        np.where(S1 > 0, 7, 9),
    )

    # -- conversions ------------------------------------------------------------------------------
    finite = np.clip(np.nan_to_num(F1), -100, 100).astype("f4")
    case("cvt.rzi", "cvt.rzi.s32.f32 %d, %a;", (finite,), "i4", np.trunc(finite))
    case("cvt.rni", "cvt.rni.s32.f32 %d, %a;", (finite,), "i4", np.rint(finite))
    case("cvt.rmi.f32", "cvt.rmi.f32.f32 %d, %a;", (finite,), "f4", np.floor(finite))
    case("cvt.rpi.f64", "cvt.rpi.f64.f64 %d, %a;", (D1,), "f8", np.ceil(D1))
    case("cvt.saturating", "mul.f32 %a, %a, 0f4F000000; cvt.rzi.s32.f32 %d, %a;", (finite,), "i4",
         np.clip(np.trunc(finite.astype("f8") * 2**31), -(2**31), 2**31 - 1))  # fmt: skip
    case("cvt.f32.u32", "cvt.rn.f32.u32 %d, %a;", (U1,), "f4", U1.astype("f4"))
    case("cvt.f32.s64", "cvt.rn.f32.s64 %d, %a;", (L1,), "f4", L1.view("i8").astype("f4"))
    case("cvt.f64.f32", "cvt.f64.f32 %d, %a;", (F1,), "f8", F1.astype("f8"))
    case("cvt.f32.f64", "cvt.rn.f32.f64 %d, %a;", (D1,), "f4", D1.astype("f4"))
    case("cvt.sat.f32", "cvt.sat.f32.f32 %d, %a;", (F1,), "f4", np.nan_to_num(np.clip(F1, 0, 1)))
    case("cvt.s8", "cvt.s32.s8 %d, %a;", (U1,), "i4", U1.astype(np.uint8).view(np.int8))
    case("cvt.u16", "cvt.u16.u32 %h1, %a; cvt.u32.u16 %d, %h1;", (U1,), "u4", U1 & 0xFFFF)
    case("cvt.sat.s8", "cvt.sat.s8.s32 %d, %a;", (S1 >> 22,), "i4", np.clip(S1 >> 22, -128, 127))
    T1, T2 = torch.from_numpy(finite), torch.from_numpy(np.roll(finite, 3))
    both = torch.stack([T2, T1], 1).double()
    for kind in ("f16", "bf16"):
        case(
            f"cvt.{kind}x2",
            f"cvt.rn.{kind}x2.f32 %d, %a, %b;",
            (finite, T2.numpy()),
            "u4",
            to_raw(kind, both),
        )
        case(f"cvt.{kind}x2.relu", f"cvt.rn.relu.{kind}x2.f32 %d, %a, %b;", (finite, T2.numpy()), "u4",
             to_raw(kind, both.clamp(min=0) + 0.0))  # fmt: skip
        case(
            f"cvt.{kind}",
            f"cvt.rn.{kind}.f32 %d, %a;",
            (finite,),
            "u2",
            to_raw(kind, T1[:, None].double()),
        )
        raw, values = halves(kind, False)
        case(f"cvt.f32.{kind}", f"cvt.f32.{kind} %d, %a;", (raw,), "f4", values[:, 0].numpy())
    case("cvt.rz.bf16", "cvt.rz.bf16.f32 %d, %a;", (finite,), "u2", finite.view(np.uint32) >> 16)
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        largest = torch.finfo(dtype).max
        wide = both.float() * torch.logspace(-4, 2, N)[:, None]
        packed = wide.clamp(-largest, largest).to(dtype).view(torch.uint8).numpy().copy().view(np.uint16)[:, 0]
        lo, hi = (wide[:, n].contiguous().numpy() for n in (0, 1))
        case(f"cvt.{kind}x2", f"cvt.rn.satfinite.{kind}x2.f32 %d, %a, %b;", (hi, lo), "u2", packed)
        codes = np.arange(N * 2, dtype=np.uint8).reshape(N, 2)
        codes = np.where(np.isfinite(torch.from_numpy(codes).view(dtype).float().numpy()), codes, 1)
        as_half = torch.from_numpy(codes).view(dtype).half().view(torch.int16).numpy().copy().view(np.uint32)[:, 0]
        case(
            f"cvt.f16x2.{kind}x2",
            f"cvt.rn.f16x2.{kind}x2 %d, %a;",
            (codes.view(np.uint16)[:, 0].copy(),),
            "u4",
            as_half,
        )
    rounded = ((finite.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view("f4")
    case("cvt.rna.tf32", "cvt.rna.tf32.f32 %d, %a;", (finite,), "f4", rounded)


@pytest.fixture(scope="module")
def module():
    return build(CASES)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_instruction(module, c):
    c.run(module)
