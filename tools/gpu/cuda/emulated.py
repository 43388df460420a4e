"""A backend for tests: the CUDA C++ kernels, compiled by nvcc, executed by the PTX emulator on CPU tensors.

`ctkernels.dispatch` loads it by name like any other backend, so that the public functions, autograd and all helpers of
the op tests run on it unchanged. The launches and their argument come from `csrc/cuda/plan.h`, as the bindings get
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import ptxemu
from ptxemu.launch import cache_directory
from torch import Tensor

from ctkernels import dispatch
from ctkernels.problem import Prepared, Problem
from ctkernels.testing.backends import Backend
from tools.gpu.cuda import plan

NAME = "emulated-cuda"
BACKEND = Backend(NAME)
ARCHITECTURE = "sm_80"
TYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "float"}  # in the names of kernels -> in C++


class Build:
    """The kernels of a source tree, compiled in groups when the first of a group is launched: those of one type, width
    and variant, those that exist once per type, or those that exist once."""

    def __init__(self, sources: Path) -> None:
        self.sources = sources
        self._entries: dict[str, str] = {}
        self._modules: dict[str, ptxemu.Module] = {}

    def module(self, kernel: str) -> ptxemu.Module:
        if kernel not in self._modules:
            self._modules[kernel] = ptxemu.compile_ptx(self.ptx(kernel))
        return self._modules[kernel]

    def ptx(self, kernel: str) -> str:
        """PTX of one kernel alone."""
        if kernel not in self._entries:
            self._entries |= split_entries(self._compile(group_source(kernel)))
        return self._entries[kernel]

    def _compile(self, source: str) -> str:
        folder = self.sources / "cuda"
        headers = sorted([*self.sources.glob("*.h"), *folder.glob("*.h"), *folder.glob("*.cuh"), *folder.glob("*.cu")])
        key = hashlib.sha256("\0".join([source, *(path.read_text() for path in headers)]).encode()).hexdigest()[:20]
        cached = cache_directory() / f"cuda-{key}.ptx"
        if not cached.exists():
            partial = cached.with_suffix(f".{os.getpid()}")
            partial.write_text(ptxemu.cuda_to_ptx(source, arch=ARCHITECTURE, include=[folder]))
            partial.replace(cached)
        return cached.read_text()


def group_source(kernel: str) -> str:
    """CUDA C++ that defines a kernel of `plan.h` and those of its group, with the macros of the shipped files."""
    name = re.fullmatch(r"ctk_\w+?_(bf16|fp16|fp32)(?:_(\d+)_(plain|general))?", kernel)
    if name is None:
        return '#include "kernels_common.cu"\n'
    kind, width, variant = name.groups()
    arguments = f"CTK_DEFINE, {TYPES[kind]}, {kind}"
    if width is None:
        group = f"CTK_DEFINE_SMALL({TYPES[kind]}, {kind})"
    elif width == "256":
        group = f"CTK_WIDTH_256({arguments})"
    elif width == "512":
        group = f"CTK_DEFINE_SLICES({TYPES[kind]}, {kind})"
    else:
        group = f"CTK_WIDTH({arguments}, {width}, {variant}, {'true' if variant == 'general' else 'false'})"
    return f'#include "instances.cuh"\nnamespace ctk::cuda {{\n{group}\n}}\n'


def split_entries(ptx: str) -> dict[str, str]:
    """PTX text of several kernels -> PTX text of each."""
    starts = [match.start() for match in re.finditer(r"^(?:\t// \.globl.*\n)?\.visible \.entry", ptx, re.M)]
    end = ptx.index("\n\t.file", starts[-1]) if "\n\t.file" in ptx[starts[-1] :] else len(ptx)
    header, tail = ptx[: starts[0]], ptx[end:]
    bodies = [ptx[a:b] for a, b in zip(starts, [*starts[1:], end], strict=True)]
    return {re.search(r"\.entry (\w+)", body)[1]: header + body + tail for body in bodies}


@cache
def shipped() -> Build:
    """The kernels of this repository."""
    return Build(plan.SOURCES)


@dataclass
class Emulator:
    """A GPU on the CPU's memory. mode, schedule_seed: as `ptxemu.Module.launch`.

    multiprocessors decide into how many ranges work is cut. guard_bits: of the tensor cores' sums; 0 is the least that
    was measured on hardware. launched: names of the kernels that ran.
    """

    mode: str = "eager"
    schedule_seed: int = 0
    multiprocessors: int = 4
    tf32: bool = False
    guard_bits: int = 0
    build: Build = field(default_factory=shipped)
    launched: list[str] = field(default_factory=list)

    def run(self, planned: plan.Plan) -> None:
        """Run the launches in order.

        Raises:
            ptxemu.KernelFault: a kernel left its memory, raced, read what was not written, or hung.
        """
        for launch in planned.launches:
            name = launch.name.decode()
            self.launched.append(name)
            self.build.module(name).launch(
                name, tuple(launch.grid), launch.block, [planned.args], shared_bytes=launch.shared, mode=self.mode,
                schedule_seed=self.schedule_seed, buffers=planned.buffers, guard_bits=self.guard_bits,
            )  # fmt: skip


_current: list[Emulator] = []


@contextlib.contextmanager
def running_on(emulator: Emulator) -> Iterator[Emulator]:
    """Inside, backend "emulated-cuda" runs on `emulator`."""
    dispatch.BACKENDS[NAME] = (__name__, ("cpu",))
    _current.append(emulator)
    try:
        yield emulator
    finally:
        _current.pop()
        del dispatch.BACKENDS[NAME]


def unavailable() -> None:
    return None


def tables(*args: Tensor | Problem | bool | None) -> Tensor:
    """As `ctkernels.problem.Prepared` asks of a backend."""
    emulator = _current[-1]
    made, planned = plan.tables(*args, emulator.multiprocessors)
    emulator.run(planned)
    return made


def order(x: Tensor) -> tuple[int, ...]:
    """The CPU has one stream, and no graphs."""
    return ()


def forward(*args: Tensor | Problem | None, prepared: Prepared = plan.NOTHING) -> tuple[Tensor, ...]:
    """As `ops.py` asks of a backend."""
    emulator = _current[-1]
    outputs, planned = plan.forward(*args, emulator.multiprocessors, emulator.tf32, prepared)
    emulator.run(planned)
    return outputs


def backward(*args: Tensor | list[bool] | Problem | None, prepared: Prepared = plan.NOTHING) -> tuple[Tensor, ...]:
    """As `ops.py` asks of a backend."""
    emulator = _current[-1]
    outputs, planned = plan.backward(*args, emulator.multiprocessors, emulator.tf32, prepared)
    emulator.run(planned)
    return outputs
