"""Runs Triton launches in the PTX emulator (`tools/ptxemu`): what executes is the PTX that Triton emits for a GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import ptxemu

from ctkernels.backends.triton.launch import Launch
from tools.gpu.architectures import Architecture
from tools.gpu.triton import aot

_MODULES: dict[str, ptxemu.Module] = {}  # by Triton's hash of source, signature, options and target


@dataclass
class Emulator:
    """A GPU of an architecture on the CPU's memory.

    mode: when the data of `cp.async` arrives, "eager" at issue or "lazy" at the wait.  schedule_seed: 0 runs threads in
    order, other seeds pick one at random at every step.  check: as `ptxemu.Module.launch`.  With `counters`, those of
    each launch are appended to `counted` by kernel name.
    """

    architecture: Architecture
    mode: str = "eager"
    schedule_seed: int = 0
    check: bool | Collection[str] = True
    counters: bool = False
    workers: int | None = None
    counted: list[tuple[str, ptxemu.Counters]] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)

    def __call__(self, launch: Launch) -> None:
        """Run one launch to completion.

        Raises:
            ptxemu.KernelFault: the kernel left its memory, raced, read what was not written, or hung.
        """
        compiled = aot.compile_launch(launch, self.architecture)
        key = compiled.metadata.hash
        if key not in _MODULES:
            _MODULES[key] = ptxemu.compile_ptx(compiled.asm["ptx"])
        module, name = _MODULES[key], compiled.metadata.name
        # absent pointers and ones are compiled into the code
        args = [launch.args[parameter] for parameter, kind in compiled.src.signature.items() if kind != "constexpr"]
        scratch = len(module.kernels[name].parameters) - len(args)  # pointers that Triton appends and these never use
        result = module.launch(
            name,
            launch.grid,
            self.architecture.warp * compiled.metadata.num_warps,
            [*args, *[None] * scratch],
            shared_bytes=compiled.metadata.shared,
            mode=self.mode,
            schedule_seed=self.schedule_seed,
            check=self.check,
            counters=self.counters,
            workers=self.workers,
        )
        self.launched.append(name)
        if self.counters:
            self.counted.append((name, result.counters))
