"""CPU backend: the C++ kernels of `csrc/cpu`, bound by `python_bindings/cpu.cpp`."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from ctkernels.backends import extension
from ctkernels.problem import Problem

ISA_VARIABLE = "CTKERNELS_CPU_ISA"
USES_DS_SUM = True


@cache
def unavailable() -> str | None:
    """None if the compiled extension is loaded, else the reason in words."""
    reason = extension.load("_C", "the C++ extension is not built; run `pip install -e .` (needs a C++20 compiler)")
    wanted = os.environ.get(ISA_VARIABLE)
    if reason is None and wanted:
        try:
            torch.ops.ctkernels.set_cpu_isa(wanted)
        except ValueError as error:
            reason = f"{ISA_VARIABLE}: {error}"
    return reason


def isas() -> list[str]:
    """Instruction sets: the one in use, then all that this machine can run, best first."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    return torch.ops.ctkernels.cpu_isa()


def workers() -> int:
    """Threads that a call runs on now: torch's intra-op threads, if the extension uses torch's pool."""
    isas()
    return torch.ops.ctkernels.cpu_workers()


def release_memory() -> None:
    """Free the scratch memory (up to a few MB per thread) that later calls would use again."""
    isas()
    torch.ops.ctkernels.cpu_release()


def set_isa(name: str) -> None:
    """Choose the instruction set of later calls. Raises ValueError if this machine cannot run it."""
    isas()
    torch.ops.ctkernels.set_cpu_isa(name)


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_bias: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    return torch.ops.ctkernels.cpu_forward(q, k, v, prefix_k, prefix_v, prefix_bias, *problem)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
    problem: Problem,
    ds_sum: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return torch.ops.ctkernels.cpu_backward(
        dout, dlse, ds_sum, q, k, v, prefix_k, prefix_v, prefix_bias, out, lse, needs, *problem
    )
