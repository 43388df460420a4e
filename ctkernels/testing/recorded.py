"""Graphs of the CPU: what a CUDA graph is, for tests and rehearsals where there is no GPU.

A capture records torch's operators with the very tensors that they got and returned, and undoes what they have written:
as on a GPU, nothing has run. A replay calls them again and writes what they return to the tensors of the recording.
Python between them does not run again; numbers that it passed are as they were. What a GPU cannot capture is an error:
reading a value, and numbers that come from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctkernels import mask

T = TypeVar("T")
aten = torch.ops.aten
# what waits for the device, or copies from the host
NOT_CAPTURED = (
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2),
    *(aten.unique_dim, aten.lift_fresh),
)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in _tensors(values)}


def _unchecked(*_: Any) -> None:
    """In the place of a check that reads values."""


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple, dict, Any, set[int]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of what was written to, and what they were

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in NOT_CAPTURED:
            raise RuntimeError(f"{func} is not permitted while a step is captured")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._keep(kwargs[argument.name])
        got = _storages((args, kwargs))
        outputs = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, outputs, got))
        return outputs

    def _keep(self, written: Any) -> None:
        for x in _tensors(written):
            storage = x.untyped_storage()
            if storage._cdata not in self.before and storage.nbytes():
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage._cdata] = whole, whole.clone()

    def undo(self) -> None:
        for whole, before in self.before.values():
            whole.copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, outputs, got in self.calls:
                again = func(*args, **kwargs)
                for kept, new in zip(_tensors(outputs), _tensors(again), strict=True):
                    if kept.untyped_storage()._cdata not in got:  # neither a view nor written in place
                        kept.detach().copy_(new)


@dataclass
class RecordedGraphs:
    """`ctkernels.tuning.train.graphs.Graphs` of the CPU.

    did: what was asked for, in order: "capture", "replay", "send", "fetch", "wait".
    """

    did: list[str] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def capture(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        self.did.append("capture")
        recording = _Recording()
        try:  # values are checked on the CPU alone
            with patch.multiple(mask, check_spans=_unchecked, check_row_ids=_unchecked), recording:
                outputs = run()
        finally:
            recording.undo()

        def replay() -> None:
            self.did.append("replay")
            recording.replay()

        return replay, outputs

    def fetch(self, tensors: T) -> Callable[[], T]:
        self.did.append("fetch")
        copies = tuple(x.detach().clone() for x in _tensors(tensors))

        def wait() -> Any:
            self.did.append("wait")
            return copies

        return wait

    def send(self, source: Tensor, target: Tensor) -> None:
        self.did.append("send")
        target.copy_(source)
