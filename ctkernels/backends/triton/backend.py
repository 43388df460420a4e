"""Triton backend: the kernels of this folder, on GPU tensors, or on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ctkernels.backends.triton.interpreter import interpreting, repair
from ctkernels.problem import Prepared, Problem, check_values

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


def tables(*args: Any) -> Tensor:
    """The rows, tiles and visible positions of one direction of a call (`plan.plan_tables`), int32.

    args: q, k, v, prefix_k, prefix_v, prefix_bias, the problem, and whether the direction is backward.
    """
    from ctkernels.backends.triton.launch import run
    from ctkernels.backends.triton.plan import plan_tables

    q, k, _, prefix_k, *_, problem, _ = args
    check_values(q, k, prefix_k, problem)
    with current(q.device):
        plan = plan_tables(*args, target(q.device))
        run(plan.launches)
    return plan.outputs[0]


def order(x: Tensor) -> tuple[Hashable, ...]:
    """The current stream of x's device and the CUDA graph that it is captured into, 0 for none: what was launched under
    one order is complete for later launches under the same, and for no other."""
    if x.device.type == "cpu":
        return 0, 0
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        return stream, capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0


def capture_id(stream: int) -> Hashable:
    """Which graph a stream is being captured into. What equals nothing else, if the driver does not say."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    ask = _capture_info()
    if ask is None or ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number)) != 0:
        return object()
    return number.value


@cache
def _capture_info() -> Callable[..., int] | None:
    """The driver's function for it, which torch does not offer to Python."""
    library, name = (
        ("libcuda.so.1", "cuStreamGetCaptureInfo")
        if torch.version.hip is None
        else ("libamdhip64.so", "hipStreamGetCaptureInfo")
    )
    try:
        return getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None


def recalled(inputs: tuple[Any, ...], backward: bool) -> Tensor:
    """The tables of a call whose mask is not prepared. A CUDA graph makes its own for every call, since it may be
    replayed when those of others have been freed."""
    from ctkernels.backends.triton.call import call_of
    from ctkernels.backends.triton.table_cache import recall

    q, problem = inputs[0], inputs[-1]
    stream, graph = order(q)
    if graph:
        return tables(*inputs, backward)
    key = call_of(*inputs, target(q.device)), backward, stream
    return recall(key, problem, lambda: tables(*inputs, backward))


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
    from ctkernels.backends.triton.launch import run
    from ctkernels.backends.triton.plan import plan_forward

    inputs = q, k, v, prefix_k, prefix_v, prefix_bias, problem
    if prepared.forward_tables is None:
        prepared = prepared._replace(forward_tables=recalled(inputs, False))
    with current(q.device):
        plan = plan_forward(*inputs, target(q.device), prepared)
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
    prepared: Prepared = Prepared(),  # noqa: B008 (immutable)
) -> tuple[Tensor, ...]:
    from ctkernels.backends.triton.launch import run
    from ctkernels.backends.triton.plan import plan_backward

    inputs = q, k, v, prefix_k, prefix_v, prefix_bias
    if prepared.backward_tables is None:
        prepared = prepared._replace(backward_tables=recalled((*inputs, problem), True))
    with current(q.device):
        plan = plan_backward(dout, dlse, *inputs, out, lse, needs, problem, target(q.device), prepared)
        run(plan.launches)
    return plan.outputs
