"""A backend for tests: the Triton kernels, compiled for a GPU, executed by the PTX emulator on CPU tensors.

`ctkernels.dispatch` loads it by name like any other backend, so that the public functions, autograd and all helpers of
the op tests run on it unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ctkernels import dispatch
from ctkernels.backends.triton.plan import plan_backward, plan_forward, plan_tables
from ctkernels.problem import Prepared, Problem
from ctkernels.testing.backends import Backend
from tools.gpu.triton import plans
from tools.gpu.triton.emulate import Emulator

NAME = "emulator"
BACKEND = Backend(NAME)
_current: list[Emulator] = []


@contextlib.contextmanager
def running_on(emulator: Emulator) -> Iterator[Emulator]:
    """Inside, backend "emulator" runs on `emulator`."""
    dispatch.BACKENDS[NAME] = (__name__, ("cpu",))
    _current.append(emulator)
    try:
        yield emulator
    finally:
        _current.pop()
        del dispatch.BACKENDS[NAME]


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Inside, new tensors hold NaN where nothing was written yet."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def unavailable() -> None:
    return None


def order(x: Tensor) -> tuple[int, ...]:
    """As `ops.py` asks of a backend."""
    return (id(_current[-1]),)


def tables(*args: Tensor | Problem | bool | None) -> Tensor:
    """As `ops.py` asks of a backend."""
    with nan_filled_memory():
        return _run(plan_tables(*args, plans.target(_current[-1].architecture)))[0]


def forward(*args: Tensor | Problem | None, prepared: Prepared = Prepared()) -> tuple[Tensor, ...]:  # noqa: B008
    """As `ops.py` asks of a backend."""
    with nan_filled_memory():
        return _run(plan_forward(*args, plans.target(_current[-1].architecture), prepared))


def backward(*args: Tensor | list[bool] | Problem | None, prepared: Prepared = Prepared()) -> tuple[Tensor, ...]:  # noqa: B008
    """As `ops.py` asks of a backend."""
    with nan_filled_memory():
        return _run(plan_backward(*args, plans.target(_current[-1].architecture), prepared))


def _run(plan) -> tuple[Tensor, ...]:
    for launch in plan.launches:
        _current[-1](launch)
    return plan.outputs
