"""Which backend computes a call, and why another one cannot. Backends never import one another."""

from __future__ import annotations

import importlib
import platform
import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from ctkernels import dispatch_table

# name -> (module, device types it serves). "auto" takes the first one that can serve the call: on CPU tensors the C++
# kernels; on CUDA tensors the one that `dispatch_table` names, or the other one if that one cannot serve the call; on
# ROCm tensors Triton's. Under TRITON_INTERPRET=1 Triton also serves CPU tensors.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("ctkernels.backends.cpu", ("cpu",)),
    "cuda": ("ctkernels.backends.cuda", ("cuda",)),
    "triton": ("ctkernels.backends.triton.backend", ("cuda", "cpu")),
    "reference": ("ctkernels.backends.reference", ()),  # () = every device
}

# of the CPU features that torch reports, those that decide how fast the kernels can be
FEATURES = ("avx2", "fma3", "f16c", "avx512_f", "avx512_bw", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
# builds of the CPU kernels that multiply bf16 itself; they take subnormal numbers for zero
BF16_ISAS = ("amx", "avx512_bf16")


class Choice(NamedTuple):
    """Names of `BACKENDS`: which one computes the forward pass of a call, and which one its backward pass."""

    forward: str
    backward: str


def load(name: str) -> ModuleType:
    """The module of a backend.

    A kernel backend provides `unavailable() -> str | None` (the reason in words),
    `forward(q, k, v, prefix_k, prefix_v, prefix_bias, problem)` and `backward(...)` as `ops.py` calls them. If it
    cannot serve every call on its devices, it also provides `refusal(device, dtype, wide) -> str | None`. If its
    backward relies on ds adding up to dlse over the keys of a query, it sets `USES_DS_SUM = True`; with sinks it then
    gets `ds_sum`, what ds adds up to instead. If calls of a step can share what it computes first, it has `tables` and
    `order`, and both passes take `prepared` (`problem.Prepared`).
    """
    return _module(BACKENDS[name][0])


@cache
def _module(path: str) -> ModuleType:
    return importlib.import_module(path)


@cache
def _unavailable(name: str) -> str | None:
    return None if name == "reference" else load(name).unavailable()


def availability() -> dict[str, str | None]:
    """Name of each backend -> None if it can be used on this machine, else the reason in words."""
    return {name: _unavailable(name) for name in BACKENDS}


def refusal(name: str, device: torch.device, dtype: torch.dtype = torch.float32, wide: int = 0) -> str | None:
    """Why backend `name` cannot compute rows of `dtype` on `device`, or None. `wide`: 0 where D = Dv <= 256, else 256
    or 512, which holds both."""
    devices = BACKENDS[name][1]
    if devices and device.type not in devices:
        return f"it computes on {', '.join(devices)} tensors, got {device.type}"
    reason = _unavailable(name)
    if reason is None and hasattr(load(name), "refusal"):
        reason = load(name).refusal(device, dtype, wide)
    return reason


def choose(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    wide: int = 0,
) -> Choice:
    """The backends of a call. `wide` as in `refusal`.

    A named backend serves both directions, or an error gives the reason why it cannot. "auto" (or None) may take a
    different one for each direction, and warns if it falls back to the reference.

    Raises:
        TypeError: backend is not a string.
        ValueError: an unknown backend, or one that cannot serve this call.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a string or None, got {type(backend).__name__}")
    if backend not in (None, "auto"):
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
        reason = refusal(backend, device, dtype, wide)
        if reason is not None:
            raise ValueError(f"backend={backend!r} is unavailable: {reason}")
        return Choice(backend, backend)
    usable = (name for name in BACKENDS if refusal(name, device, dtype, wide) is None)
    first = next(usable)  # the reference accepts every call
    if first == "reference":
        _warn_fallback(device, dtype, wide)
    if device.type != "cuda" or not {first, *usable}.issuperset(dispatch_table.GPU_BACKENDS):
        return Choice(first, first)  # nothing to choose
    table = {d: dispatch_table.pick(architecture(device), dtype, head_dim, d) for d in dispatch_table.DIRECTIONS}
    return Choice(**table)


# torch.compile keeps the result and does not trace the function. torch.compiler.assume_constant_result does just this,
# but first imports the whole compiler, which takes as long as importing torch.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def architecture(device: torch.device) -> str:
    """A GPU's architecture as compilers write it, for instance "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def _warn_fallback(device: torch.device, dtype: torch.dtype, wide: int) -> None:
    reasons = "; ".join(f"{name}: {refusal(name, device, dtype, wide)}" for name in BACKENDS if name != "reference")
    warnings.warn(f"ctkernels uses the slow reference backend on {device.type} ({reasons})", stacklevel=5)


def cpu_info() -> dict[str, object]:
    """The CPU, its vector and matrix features, torch's threads, and the kernels' threads and instruction sets: the one
    in use and all possible ones (None and [] if the kernels are not built)."""
    built = _unavailable("cpu") is None
    in_use, *possible = load("cpu").isas() if built else [None]
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "name": known.get("cpu_name", platform.processor()),
        "features": [name for name in FEATURES if known.get(name)],
        "threads": torch.get_num_threads(),
        "workers": load("cpu").workers() if built else None,
        "isa": in_use,
        "isa_available": possible,
    }


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels: "portable", "avx2", "avx512", "avx512_bf16" or "amx".

    Raises:
        ValueError: this machine cannot run it.
        RuntimeError: the extension is not built.
    """
    load("cpu").set_isa(name)
