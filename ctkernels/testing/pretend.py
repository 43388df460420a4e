"""A GPU that is not there: tests that would hand a tensor of the CPU to a GPU backend fail on any machine.

`install()` makes the backends of GPUs claim to be there; the CPU kernels compute for them. Their tests get
`PretendTensor`s, on a device of their own. These refuse what a GPU refuses: operators on tensors of both devices.

    CTKERNELS_PRETEND_GPU=1 pytest tests/op        only the tests of GPU backends
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

from ctkernels import dispatch
from ctkernels.testing import backends

aten = torch.ops.aten
# what a GPU does with tensors of the CPU: it copies them
COPIES = (aten.copy_.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
NAMES = ("cuda", "triton")
DEVICE = "pretend"
BEYOND = {  # tests that this device cannot run, and why
    "test_opcheck": "torch's check knows CPU, CUDA and XPU",
    "test_autocast_is_that_of_sdpa": "autocast has no rules for other devices",
    "test_autocast_unifies_types_and_can_be_switched_off": "autocast has no rules for other devices",
    "test_autocast_packed": "autocast has no rules for other devices",
    "test_inference_mode_and_no_grad": "a wrapped tensor cannot be an inference tensor's view",
}


def pretending() -> bool:
    """Whether the tests of this process pretend."""
    return os.environ.get("CTKERNELS_PRETEND_GPU") == "1"


class PretendTensor(Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE, 0),
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> PretendTensor:
        return PretendTensor(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func not in COPIES and any(not isinstance(x, PretendTensor) and x.dim() for x in tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found two, {DEVICE} and cpu: {func}"
            )
        stays = torch.device(kwargs.get("device") or DEVICE).type == DEVICE
        given = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        unwrapped = pytree.tree_map_only(PretendTensor, lambda x: x.inner, (args, given))
        out = func(*unwrapped[0], **unwrapped[1])
        if not stays:
            return out
        return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map_only(Tensor, PretendTensor, out))


def _on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.empty` or another factory on the device."""

    def made(*sizes: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        return PretendTensor(make(*sizes, dtype=dtype))

    return made


def _copy_from(source: Tensor, target: PretendTensor, non_blocking: bool = False) -> Tensor:
    """How torch.tensor fills what it makes."""
    target.inner.copy_(source)
    return target


def _backend() -> SimpleNamespace:
    """What `dispatch.load` gives for the backends of a GPU."""
    cpu = dispatch.load("cpu")
    assert cpu.unavailable() is None, cpu.unavailable()

    def refusal(device: torch.device, dtype: torch.dtype, wide: int = 0) -> str | None:
        return "it computes in fp32, got fp64 tensors" if dtype == torch.float64 else None

    computing = {name: getattr(cpu, name) for name in ("forward", "backward", "USES_DS_SUM")}
    return SimpleNamespace(unavailable=lambda: None, refusal=refusal, **computing)


def install() -> None:
    """Pretend from now on, in this process."""
    stock = dispatch.load
    pretended = dict.fromkeys(NAMES, _backend())
    dispatch._unavailable.cache_clear()
    for name in NAMES:
        dispatch.BACKENDS[name] = (dispatch.BACKENDS[name][0], (DEVICE,))
    dispatch.load = lambda name: pretended.get(name) or stock(name)  # type: ignore[assignment,return-value]
    dispatch.architecture = lambda device: "sm_90"  # type: ignore[assignment]
    backends.device_of = lambda name: DEVICE if name in NAMES else "cpu"  # type: ignore[assignment]
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    for name, make in (
        ("empty.memory_format", torch.empty),
        ("empty_strided", torch.empty_strided),
        ("arange.start_step", torch.arange),
    ):
        torch.library.impl(f"aten::{name}", "PrivateUse1")(_on_device(make))
    torch.library.impl("aten::_copy_from", "PrivateUse1")(_copy_from)
    torch.get_device_module(DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    plain = next(
        isa for isa in dispatch.load("cpu").isas()[1:] if isa not in dispatch.BF16_ISAS
    )  # they flush subnormals
    dispatch.set_cpu_isa(plain)
