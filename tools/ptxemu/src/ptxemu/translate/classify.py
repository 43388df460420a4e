"""Instruction classes and arithmetic work, for the counters."""

from __future__ import annotations

import math

from .matrix import mma_shape
from .table import state_space

_SPECIAL = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}
_FIXED = {
    "mma": "mma", "ldmatrix": "ldmatrix", "stmatrix": "stmatrix", "movmatrix": "shuffle", "shfl":
    "shuffle", "vote": "warp_vote", "match": "warp_vote", "redux": "warp_vote", "activemask":
    "warp_vote", "elect": "warp_vote", "atom": "atomic", "red": "atomic", "cvt": "convert", "mov":
    "move", "selp": "move", "cvta": "move", "prmt": "integer", "bra": "branch", "ret": "branch",
    "exit": "branch", "call": "branch", "trap": "branch", "mbarrier": "barrier",
}  # fmt: skip


def classify(i):
    name = i.opcode[0]
    if name in _SPECIAL:
        return "special_function"
    if name in _FIXED:
        return _FIXED[name]
    if name in ("ld", "ldu", "st"):
        kind = "store" if name == "st" else "load"
        space = state_space(i) or "generic"
        return f"{space}_{kind}"
    if name == "wgmma":
        return "wgmma" if i.opcode[1] == "mma_async" else "other"
    if name == "cp":
        return "cp_async" if not {"commit_group", "wait_group", "wait_all"} & set(i.opcode) else "other"
    if name in ("bar", "barrier"):
        return "warp_barrier" if "warp" in i.opcode else "barrier"
    if name in ("and", "or", "xor", "not", "lop3", "shl", "shr", "shf", "bfe", "bfi"):
        return "logic" if i.opcode[-1] == "pred" else "integer"
    kind = i.opcode[-1]
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return "half"
    if kind in ("f32", "f32x2"):
        return "float"
    if kind == "f64":
        return "double"
    if kind[0] in "bus" and kind[1:].rstrip("x2").isdigit():
        return "integer"
    return "other"


def threads_per_instruction(i):
    """How many threads execute one instance of a collective matrix instruction together."""
    return 128 if i.opcode[0] == "wgmma" else 32


def matrix_flops(i):
    """Multiplications plus additions of one warp- or warpgroup-level matrix instruction."""
    if i.opcode[0] == "mma" or i.opcode[:2] == ["wgmma", "mma_async"]:
        return 2 * math.prod(mma_shape(i))
    return 0


def scalar_flops(i):
    """Multiplications plus additions of one thread-level instruction."""
    width = {"f32": 1, "f64": 1, "f16": 1, "bf16": 1, "f16x2": 2, "bf16x2": 2, "f32x2": 2}.get(i.opcode[-1], 0)
    return width * {"add": 1, "sub": 1, "mul": 1, "fma": 2, "mad": 2}.get(i.opcode[0], 0)
