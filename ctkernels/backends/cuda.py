"""CUDA backend: the CUDA C++ kernels of `csrc/cuda`, bound by `python_bindings/cuda.cpp`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ctkernels.backends import extension
from ctkernels.problem import Prepared, Problem

LEAST_CAPABILITY = (8, 0)  # mma.sync of bf16 and cp.async


@cache
def load_library() -> str | None:
    """Register the compiled operators, which needs no GPU: None, or the reason in words."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return extension.load(
        "_cuda",
        "the CUDA extension is not built; run `CTKERNELS_CUDA=1 pip install --no-build-isolation -e .` (needs nvcc)",
    )


@cache
def unavailable() -> str | None:
    """None if the kernels can run on this machine, else the reason in words."""
    return load_library() or (None if torch.cuda.is_available() else "torch finds no GPU")


def refusal(device: torch.device, dtype: torch.dtype, wide: int = 0) -> str | None:
    """Why the kernels cannot take rows of `dtype` on `device`, or None. All head dimensions (`wide`) are served."""
    if dtype == torch.float64:
        return "it computes in fp32, got fp64 tensors"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 (Ampere) or newer, got {major}.{minor}"
    return None


def tables(*args: Any) -> Tensor:
    """The rows, tiles and visible positions of one direction of a call (csrc/cuda/setup.cuh), uint8.

    args: q, k, v, prefix_k, prefix_v, prefix_bias, the problem, and whether the direction is backward.
    """
    *inputs, problem, backward = args
    return torch.ops.ctkernels.cuda_tables(*inputs, *problem, backward)


def order(x: Tensor) -> tuple[int, ...]:
    """The current stream of x's device and the CUDA graph that it is captured into, 0 for none: what was launched under
    one order is complete for later launches under the same, and for no other."""
    return tuple(torch.ops.ctkernels.cuda_order(x))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None,
    problem: Problem,
    prepared: Prepared = Prepared(),  # noqa: B008 (immutable)
) -> tuple[Tensor, Tensor]:
    made, _, *prefixes = prepared
    return torch.ops.ctkernels.cuda_forward(q, k, v, prefix_k, prefix_v, prefix_bias, *problem, made, *prefixes)


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
    prepared: Prepared = Prepared(),  # noqa: B008 (immutable)
) -> tuple[Tensor, ...]:
    _, made, *prefixes = prepared
    return torch.ops.ctkernels.cuda_backward(
        dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, out, lse, needs, *problem, made, *prefixes
    )
