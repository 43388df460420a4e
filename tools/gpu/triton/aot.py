"""Compiles Triton launches for GPUs that are not here, exactly as Triton would at run time.

A stand-in for Triton's driver names the target, so that Triton's own code specialises the arguments (alignment, ones,
absent pointers), picks the passes and calls the assembler. Triton keeps what it compiled on disk; what the assembler
said about it is kept beside (`RECORDS`), so that a repeat takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from ctkernels.backends.triton.launch import Launch
from tools.gpu.architectures import Architecture

RECORDS = Path(os.environ.get("CTKERNELS_AOT_CACHE", Path(__file__).resolve().parents[3] / "build" / "aot"))


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, architecture: Architecture) -> None:
        self._target = GPUTarget(architecture.backend, architecture.arch, architecture.warp)
        self._device = f"ahead of time: {architecture.name}"  # Triton's kernels are kept per device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return self._device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(architecture: Architecture) -> Iterator[None]:
    """Inside, Triton compiles for `architecture`, whatever this machine has."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(architecture))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


@dataclass(frozen=True)
class Resources:
    """What a kernel needs: spills in bytes per thread (NVIDIA) or registers (AMD), `shared` bytes per block."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    warps: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def compile_launch(launch: Launch, architecture: Architecture) -> Any:
    """Triton's compiled kernel of a launch, without launching it."""
    return _compile(launch, architecture)[0]


def resources(launch: Launch, architecture: Architecture) -> Resources:
    """Compile a launch if need be, and say what it needs."""
    compiled, log = _compile(launch, architecture)
    record = RECORDS / f"{compiled.metadata.hash}.json"
    if record.exists():
        return Resources(**json.loads(record.read_text()))
    if architecture.backend == "hip":
        found = _of_amdgcn(compiled.asm["amdgcn"])
    else:
        found = _of_ptxas(log or _assemble(compiled.asm["ptx"], architecture))
    result = Resources(**found, shared=compiled.metadata.shared, warps=compiled.metadata.num_warps)
    RECORDS.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=RECORDS, delete=False) as file:
        json.dump(asdict(result), file)
    os.replace(file.name, record)
    return result


def _compile(launch: Launch, architecture: Architecture) -> tuple[Any, str]:
    """The compiled kernel, and the assembler's log if it ran."""
    output, nvidia = io.StringIO(), triton.knobs.nvidia
    with compiling_for(architecture), nvidia.scope(), contextlib.redirect_stdout(output):
        nvidia.dump_ptxas_log = True
        compiled = launch.kernel.warmup(
            **launch.args,
            **launch.constexprs,
            grid=(1,),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return compiled, output.getvalue()


def _assemble(ptx: str, architecture: Architecture) -> str:
    """The assembler's log for PTX that Triton compiled earlier."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        name = sm_arch_from_capability(architecture.arch)
        # the options are those of Triton: other ones allocate other registers
        options = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", "-o", f"{folder}/kernel.o"]
        command = [get_ptxas(architecture.arch).path, *options, str(source)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _of_ptxas(log: str) -> dict[str, int]:
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    ).groups()
    (registers,) = re.search(r"Used (\d+) registers", log).groups()
    return dict(registers=int(registers), spill_stores=int(stores), spill_loads=int(loads), stack=int(stack))


def _of_amdgcn(assembly: str) -> dict[str, int]:
    def field(name: str) -> int:
        return int(re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)", assembly, re.MULTILINE).group(1))

    # accumulation registers come out of the same file as the others on CDNA 3, and `vgpr_count` is their sum
    spilled = field("vgpr_spill_count")  # each is stored once and loaded at least once
    return dict(
        registers=field("vgpr_count"),
        spill_stores=spilled,
        spill_loads=spilled,
        stack=field("private_segment_fixed_size"),
    )
