"""Kernel launches as plain data, which Triton can launch, its interpreter run, or a tool compile and inspect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch of `kernel`, a function decorated with triton.jit.

    args: run-time arguments by name, in the kernel's order (tensors, ints, floats); constexprs: the rest of its
    parameters, by name.
    """

    kernel: object
    grid: tuple[int, int, int]
    args: dict[str, Tensor | int | float]
    constexprs: dict[str, int | bool | str]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def run(self) -> None:
        options = dict(num_warps=self.num_warps, num_stages=self.num_stages)
        self.kernel[self.grid](**self.args, **self.constexprs, **options)


@dataclass(frozen=True)
class Plan:
    """Outputs, and the launches that fill them, in order."""

    outputs: tuple[Tensor, ...]
    launches: list[Launch]


def run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.run()
