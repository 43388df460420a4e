"""Stage smoke: forward and backward of each backend and type, beside the reference in fp64, twice for the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.cases import Case, Inputs
from ctkernels import dispatch

TYPES = (torch.bfloat16, torch.float32, torch.float16)
SMALL = Case("smoke", B=6, H=8, Hk=2, S=24, P=320, D=64, segments=6, drop_p=0.05)
CASES = (
    SMALL,
    replace(SMALL, D=128),
    replace(SMALL, D=80),
    replace(SMALL, D=256),
    replace(SMALL, B=2, P=16384, segments=2),
    replace(SMALL, B=1, S=1, past=200, P=4096, segments=0, drop_p=0.0),
)
TOYS = (replace(SMALL, B=2, S=3, P=20, D=16, segments=2),)
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
POISON_BYTES = 1 << 26


def jobs(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """A case per backend, type and problem; all backends in one type before the next type."""
    return {
        f"{backend}: {case.sizes}": partial(check, case, device, backend)
        for dtype in TYPES
        for backend in BACKENDS[device]
        for case in (replace(case, dtype=dtype) for case in (CASES if device == "cuda" else TOYS))
    }


def not_available(case: Case, backend: str, device: str) -> dict[str, Any]:
    """What a case records whose backend cannot take it; empty if it can."""
    reason = dispatch.refusal(backend, torch.device(device), case.dtype)
    return {} if reason is None else {"failure": f"{backend} is not available: {reason}"}


def check(case: Case, device: str, backend: str) -> dict[str, Any]:
    """The largest relative error, or why a backend is not there.

    Raises:
        ArithmeticError: a wrong result, or two runs with different bits.
    """
    if missing := not_available(case, backend, device):
        return missing
    x = Inputs(case, device, backend)
    expected = peers.truth(x)
    # what is freed here is what the call allocates next: memory that is read before it is written is no number
    torch.full((POISON_BYTES // 4 if device == "cuda" else 1 << 10,), float("nan"), device=device)
    x.require_grad(True)
    first, second = (peers.results(peers.ours(x), x, expected.dout) for _ in range(2))
    error = peers.check(backend, first, expected, case.dtype)
    require_same_bits(first, second)
    return {"error": error}


def require_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Raises ArithmeticError: a tensor of two runs differs."""
    different = [name for name in first if not torch.equal(first[name], second[name])]
    if different:
        raise ArithmeticError(f"two runs gave different bits: {', '.join(different)}")
