"""Triton backend: the kernels of this folder, on GPU tensors, or on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ctkernels.backends.triton.interpreter import interpreting, repair
from ctkernels.problem import Problem, check_values

LEAST_TRITON = (3, 2)  # tl.gather
LEAST_CAPABILITY = (8, 0)
WIDE_FP32 = ("sm_80", "sm_90", "sm_100", "gfx942")  # their blocks hold the 131 KiB of the backward pass, or need less


@cache
def unavailable() -> str | None:
    """None if the kernels can run on this machine, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        return f"it needs Triton {'.'.join(map(str, LEAST_TRITON))} or newer, got {triton.__version__}"
    if interpreting():
        return repair()
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, for tests)"
    return None


def refusal(device: torch.device, dtype: torch.dtype, wide: int = 0) -> str | None:
    """Why the kernels cannot take rows of `dtype` on `device`, or None."""
    if dtype == torch.float64:
        return "it computes in fp32, got fp64 tensors"
    if device.type == "cpu":
        return None if interpreting() else "it computes on cuda tensors, got cpu (unless TRITON_INTERPRET=1 is set)"
    if interpreting():
        return f"TRITON_INTERPRET=1 makes it compute on cpu tensors, got {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0 (Ampere) or newer, got {major}.{minor}"
    if wide > 256 and dtype == torch.float32 and (arch := target(device).arch) not in WIDE_FP32:
        return f"fp32 rows of head dimensions above 256 need shared memory of {', '.join(WIDE_FP32)}, got {arch}"
    return None


@cache
def target(device: torch.device):
    """The architecture that tiles are chosen for. The interpreter stands in for an A100."""
    from ctkernels.backends.triton.config import A100, Target

    if device.type == "cpu":
        return A100
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device and its stream, whatever device its arguments are on."""
    if device.type != "cpu":
        return torch.cuda.device(device)
    repair()
    return nullcontext()


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_bias: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    from ctkernels.backends.triton.launch import run
    from ctkernels.backends.triton.plan import plan_forward

    check_values(q, k, prefix_k, problem)
    with current(q.device):
        plan = plan_forward(q, k, v, prefix_k, prefix_v, prefix_bias, problem, target(q.device))
        run(plan.launches)
    out, lse = plan.outputs
    return out, lse


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
) -> tuple[Tensor, ...]:
    from ctkernels.backends.triton.launch import run
    from ctkernels.backends.triton.plan import plan_backward

    check_values(q, k, prefix_k, problem)
    with current(q.device):
        plan = plan_backward(
            dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, out, lse, needs, problem, target(q.device)
        )
        run(plan.launches)
    return plan.outputs
