"""`csrc/cuda/plan.h` from Python: a call as C structures, and the launches that the header plans for it.

The fields mirror `csrc/params.h`, `csrc/mask.h` and `csrc/cuda/{args,plan}.h`; sizes are compared when the library is
loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import subprocess
import tempfile
from ctypes import c_bool, c_char, c_double, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from ptxemu.launch import cache_directory
from torch import Tensor

from ctkernels.problem import Prepared, Problem, row_count

SOURCES = Path(__file__).parents[3] / "csrc"
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
MOST_LAUNCHES = 16
NOTHING = Prepared()


class Tensor4(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int32), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class ContextRule(ctypes.Structure):
    _fields_ = [("length", c_int64), ("drop_below", c_uint32), ("seed", c_uint64)]


class Params(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("B", "H", "Hk", "D", "Dv", "G", "P", "max_own")),
        ("rows", c_void_p),
        ("rule", ContextRule),
        *((name, Tensor4) for name in ("q", "k", "v", "prefix_k", "prefix_v")),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("bias_prefix", "bias_head")),
        ("alibi", c_void_p),
        ("scale", c_double),
        ("softcap", c_double),
        ("causal", c_bool),
        ("window_prefix", c_bool),
        ("window", c_int64),
        *(
            (name, Tensor4)
            for name in ("out", "lse", "dout", "dlse", "ds_sum", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
        ),
        ("dbias", c_void_p),
        ("dbias_prefix", c_int64),
        ("dbias_head", c_int64),
    ]


class Index(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("wide", c_bool)]


class Call(ctypes.Structure):
    _fields_ = [
        ("p", Params),
        ("S", c_int64),
        ("T", c_int64),
        ("packed", c_bool),
        *((name, Index) for name in ("cu_seqlens", "seq_lens", "prefix_index", "prefix_lens", "hidden", "row_ids")),
        ("keep", c_void_p),
        ("seed", c_void_p),
        ("tf32", c_bool),
    ]


class Launch(ctypes.Structure):
    _fields_ = [("name", c_char * 48), ("grid", c_uint32 * 3), ("block", c_uint32), ("shared", c_uint32)]


@dataclass
class Plan:
    """The launches of a pass, the bytes of their one argument, and every buffer that pointers in there lead to."""

    launches: list[Launch]
    args: bytes
    buffers: list[Tensor]

    @property
    def footprint(self) -> int:
        """Bytes of all buffers: inputs, outputs and scratch memory."""
        return sum({x.data_ptr(): x.nbytes for x in self.buffers}.values())


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("plan_library.cpp")
    texts = [
        path.read_text() for path in (source, *sorted(SOURCES.glob("*.h")), *sorted((SOURCES / "cuda").glob("*.h")))
    ]
    target = cache_directory() / f"plan-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:20]}.so"
    if not target.exists():
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as built:
            command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1"]
            subprocess.run([*command, f"-I{SOURCES}", str(source), "-o", built.name], check=True)
        Path(built.name).replace(target)
    library = ctypes.CDLL(str(target))
    for name, kind in (("call", Call), ("launch", Launch)):
        assert getattr(library, f"size_of_{name}")() == ctypes.sizeof(kind), f"{kind.__name__} differs from the header"
    return library


class Builder:
    """Collects the tensors behind a Call's pointers."""

    def __init__(self) -> None:
        self.call = Call()
        self.tables: int | None = None
        self.buffers: list[Tensor] = []

    def pointer(self, x: Tensor | None) -> int | None:
        if x is None or x.numel() == 0:
            return None
        self.buffers.append(x)
        return x.data_ptr()

    def tensor(self, name: str, x: Tensor | None) -> None:
        if x is not None:
            strides = (*x.stride(), 0)[:3]
            setattr(self.call.p, name, Tensor4(self.pointer(x), TYPES[x.dtype], *strides))

    def index(self, name: str, x: Tensor | None) -> None:
        if x is not None:
            x = x.contiguous()
            setattr(self.call, name, Index(self.pointer(x), x.dtype == torch.int64))

    def inputs(self, q, k, v, prefix_k, prefix_v, bias: Tensor | None, problem: Problem, tf32: bool) -> None:
        p, packed = self.call.p, problem.cu_seqlens is not None
        p.B, p.H, p.Hk, p.D, p.Dv = row_count(q, problem), q.shape[1], k.shape[1], q.shape[3], v.shape[3]
        p.G, p.P = prefix_k.shape[0], prefix_k.shape[2]
        self.call.S, self.call.T, self.call.packed, self.call.tf32 = q.shape[2], k.shape[2], packed, tf32
        p.rule = ContextRule(problem.context_length, math.floor(problem.drop_p * 2**32), problem.seed & 2**64 - 1)
        for name, x in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
            self.tensor(name, x)
        for name in ("cu_seqlens", "seq_lens", "prefix_index", "prefix_lens", "hidden", "row_ids"):
            self.index(name, getattr(problem, name))
        self.call.seed = self.pointer(problem.seed_in_memory)
        if problem.keep is not None:
            self.call.keep = self.pointer(problem.keep.contiguous().view(torch.uint8))
        if bias is not None and bias.numel():
            bias = bias.detach().float().contiguous()
            p.bias = self.pointer(bias)
            p.bias_prefix, p.bias_head = (bias.stride(i) if bias.shape[i] > 1 else 0 for i in range(2))
        if problem.alibi_slopes is not None:
            p.alibi = self.pointer(problem.alibi_slopes.float().contiguous())
        p.scale, p.softcap, p.causal = problem.scale, problem.softcap, problem.causal
        p.window, p.window_prefix = problem.window, problem.window_prefix

    def prepared(self, tables: Tensor | None, prefix_k: Tensor | None, prefix_v: Tensor | None) -> None:
        """What is there already: `ctkernels.problem.Prepared`, for one direction."""
        self.tables = self.pointer(tables)
        for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
            self.tensor(name, x)

    def plan(self, backward: bool, multiprocessors: int, only_tables: bool = False) -> Plan:
        """The launches, on a workspace of exactly the size that they ask for, filled with NaN."""
        library = _library()
        args = ctypes.create_string_buffer(library.size_of_args())
        launches = (Launch * MOST_LAUNCHES)()
        size = c_int64()

        def build(workspace: int | None) -> int:
            return library.plan(
                ctypes.byref(self.call), c_int(multiprocessors), int(backward), int(only_tables), c_void_p(workspace),
                c_void_p(self.tables), args, launches, MOST_LAUNCHES, ctypes.byref(size),
            )  # fmt: skip

        build(None)
        storage = torch.full((size.value + 256,), 0xFF, dtype=torch.uint8)
        start = -storage.data_ptr() % 256
        workspace = storage[start : start + size.value]
        count = build(workspace.data_ptr())
        assert count <= MOST_LAUNCHES
        return Plan(list(launches[:count]), args.raw, [*self.buffers, workspace])


def tables(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None, problem: Problem,
    backward: bool, multiprocessors: int,
) -> tuple[Tensor, Plan]:  # fmt: skip
    """The tables of a direction, and what makes them; as `Prepared` asks of a backend."""
    builder = Builder()
    builder.inputs(q, k, v, prefix_k, prefix_v, bias, problem, False)
    plan = builder.plan(backward, multiprocessors, only_tables=True)
    return plan.buffers[-1], plan


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None, problem: Problem,
    multiprocessors: int, tf32: bool = False, prepared: Prepared = NOTHING,
) -> tuple[tuple[Tensor, Tensor], Plan]:  # fmt: skip
    """out and lse, and what computes them; as `ops.py` asks of a backend."""
    B, H, S, _ = q.shape
    out = torch.full((B, S, H, v.shape[3]), math.nan, dtype=q.dtype).transpose(1, 2)
    lse = torch.full((B, H, S), math.nan)
    builder = Builder()
    builder.inputs(q, k, v, prefix_k, prefix_v, bias, problem, tf32)
    builder.prepared(prepared.forward_tables, prepared.prefix_k, prepared.prefix_v)
    builder.tensor("out", out), builder.tensor("lse", lse)
    plan = builder.plan(False, multiprocessors)
    if not plan.launches:
        out.fill_(0), lse.fill_(-math.inf)
    return (out, lse), plan


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    bias: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], problem: Problem, multiprocessors: int,
    tf32: bool = False, prepared: Prepared = NOTHING,
) -> tuple[tuple[Tensor, ...], Plan]:  # fmt: skip
    """The gradients that `needs` asks for (others are empty), and what computes them; as `ops.py` asks of a backend."""
    builder = Builder()
    builder.inputs(q, k, v, prefix_k, prefix_v, bias, problem, tf32)
    builder.prepared(prepared.backward_tables, prepared.prefix_k, prepared.prefix_v)
    builder.tensor("out", out), builder.tensor("lse", lse)
    builder.tensor("dout", dout if dout.stride(-1) == 1 else dout.contiguous())
    builder.tensor("dlse", None if dlse is None else dlse.float())
    gradients = []
    for name, x, need in zip(("dq", "dk", "dv"), (q, k, v), needs[:3], strict=True):
        grad = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), math.nan, dtype=x.dtype).transpose(1, 2)
        gradients.append(grad if need else x.new_empty(0))
        builder.tensor(name, grad if need else None)
    for name, x, need in zip(("dprefix_k", "dprefix_v"), (prefix_k, prefix_v), needs[3:5], strict=True):
        grad = torch.full(x.shape, math.nan, dtype=x.dtype)
        gradients.append(grad if need else x.new_empty(0))
        builder.tensor(name, grad if need else None)
    dbias = torch.empty(0)
    if needs[5]:
        p = builder.call.p
        dbias = torch.full(bias.shape, math.nan)
        p.dbias = builder.pointer(dbias)
        p.dbias_prefix, p.dbias_head = (dbias.stride(i) if dbias.shape[i] > 1 else 0 for i in range(2))
    plan = builder.plan(True, multiprocessors)
    gradients.append(dbias)
    if not plan.launches:
        for grad in gradients:
            grad.zero_()
    gradients[5] = dbias if bias is None else dbias.to(bias.dtype)
    return tuple(gradients), plan
