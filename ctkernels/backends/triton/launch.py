"""Kernel launches as plain data, which Triton can launch, its interpreter run, or a tool compile and inspect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ctkernels.backends.triton.config import Tile


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


class Template:
    """A launch without its tensors, which many calls fill in.

    values: what the kernel's parameters ask for, by name. Those that are not there are tensors. names: what a tensor is
    called outside of the kernel, where it is not the parameter's name.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tile: Tile,
        values: Mapping[str, Any],
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        values = {**values, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        constexprs = _constexprs(kernel)
        arguments = [name for name in kernel.arg_names if name not in constexprs]
        self.kernel, self.grid, self.tile = kernel, grid, tile
        self.args = {name: values.get(name) for name in arguments}
        self.open = [(name, names.get(name, name)) for name in arguments if name not in values]
        self.constexprs = {name: values[name] for name in kernel.arg_names if name in constexprs}

    def fill(self, tensors: Mapping[str, Any]) -> Launch:
        args = self.args.copy()
        for parameter, name in self.open:
            args[parameter] = tensors[name]
        return Launch(self.kernel, self.grid, args, self.constexprs, self.tile.num_warps, self.tile.num_stages)


@cache
def _constexprs(kernel: Any) -> frozenset[str]:
    """Names of a kernel's compile-time parameters."""
    if hasattr(kernel, "params"):
        return frozenset(p.name for p in kernel.params if p.is_constexpr)
    # an interpreted kernel keeps its Python function alone
    return frozenset(name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind))


def run(launches: Iterable[Launch]) -> None:
    for launch in launches:
        launch.run()
