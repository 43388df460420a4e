"""Compiles the CUDA C++ kernels for GPUs that are not here, with the flags of `setup.py`, and reads what they need.

What nvcc made and said is kept on disk by the code of the sources (`CACHE`), so that a repeat takes no time, also
after a change of comments.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from ptxemu import toolchain

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = Path(os.environ.get("CTKERNELS_AOT_CACHE", ROOT / "build" / "aot"))


@dataclass(frozen=True)
class Kernel:
    """A kernel that `plan.h` can name: threads of a block, and the most dynamic shared memory in bytes (with a bias
    gradient, 4 heads per group)."""

    name: str
    threads: int
    shared: int

    @property
    def D(self) -> int | None:
        """The padded head dimension that it is compiled for; None: any."""
        found = re.search(r"_(\d+)_(?:plain|general)$", self.name)
        return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Needs:
    """What ptxas says of a kernel: registers per thread, spills and stack in bytes per thread, static shared bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


@cache
def kernels() -> list[Kernel]:
    """Every kernel that a plan can name, asked of `plan.h` itself."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "list_kernels"
        source = Path(__file__).with_name("list_kernels.cpp")
        toolchain.run_tool(["g++", "-std=c++17", "-o", program, source])
        lines = toolchain.run_tool([program]).stdout.split("\n")
    return [
        Kernel(name, int(threads), int(shared)) for name, threads, shared in (line.split() for line in lines if line)
    ]


@cache
def setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ctkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags() -> tuple[str, ...]:
    """nvcc's flags as `setup.py` has them, and warnings as errors."""
    return (*setup().NVCC_FLAGS, "-Werror=all-warnings")


@cache
def nvcc_version() -> str:
    """For instance "13.0"."""
    told = toolchain.run_tool([toolchain.find_tool("nvcc"), "--version"]).stdout
    return re.search(r"release ([\d.]+)", told).group(1)


def sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def cubin(source: Path, architecture: str) -> tuple[bytes, dict[str, Needs]]:
    """Machine code of a source for "sm_80" or the like, and what each of its kernels needs. Warnings are errors.

    Raises:
        ptxemu.CompileError: nvcc refuses the source.
    """
    return _compile(source.stem, source.read_text(), architecture)


def instances(dtype: str, variant: str, architecture: str) -> tuple[bytes, dict[str, Needs]]:
    """As `cubin`, of the kernels of one type ("bf16", "fp16", "fp32") and variant ("plain", "general") alone."""
    cpp_type = {"fp32": "float"}.get(dtype, dtype)
    define = f"CTK_{variant.upper()}(CTK_DEFINE, {cpp_type}, {dtype})"
    text = f'#include "instances.cuh"\nnamespace ctk::cuda {{\n{define}\n}}\n'
    return _compile(f"{dtype}_{variant}", text, architecture)


def _compile(name: str, text: str, architecture: str) -> tuple[bytes, dict[str, Needs]]:
    stem = CACHE / f"{name}-{architecture}-{_digest(text, architecture)}"
    if not stem.with_suffix(".log").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            source, target, log = (Path(folder) / f"kernels.{suffix}" for suffix in ("cu", "cubin", "log"))
            source.write_text(text)
            command = [toolchain.find_tool("nvcc"), *flags(), "-Xptxas=-v", f"-arch={architecture}", "-cubin"]
            done = toolchain.run_tool([*command, f"-I{SOURCES}", "-o", target, source])
            log.write_text(done.stdout + done.stderr)
            os.replace(target, stem.with_suffix(".cubin"))
            os.replace(log, stem.with_suffix(".log"))
    return stem.with_suffix(".cubin").read_bytes(), read_log(stem.with_suffix(".log").read_text())


def _digest(text: str, architecture: str) -> str:
    """Of everything that decides what nvcc makes."""
    return _hash((code_of(text), flags(), nvcc_version(), architecture, _headers()))


def digest() -> str:
    """Of the code of the kernels and their headers."""
    return _hash(([code_of(path.read_text()) for path in sources()], _headers()))


def _headers() -> list[tuple[str, str]]:
    headers = sorted((*SOURCES.glob("*.*h"), *SOURCES.parent.glob("*.h")))
    return [(path.name, code_of(path.read_text())) for path in headers]


def _hash(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]


def code_of(text: str) -> str:
    """C++ without comments, indentation and empty lines, none of which changes what nvcc makes of it."""
    kept = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or " ", text, flags=re.DOTALL)
    return "\n".join(line.strip() for line in kept.split("\n") if line.strip())


def read_log(log: str) -> dict[str, Needs]:
    """The output of `ptxas -v`: kernel -> needs."""
    found = {}
    pattern = re.compile(
        r"Function properties for (?P<name>\w+)\s*\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r"\s*\n"
        r".*?Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    for match in pattern.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[match["name"]] = Needs(
            registers=int(match["registers"]),
            spill_stores=int(match["stores"]),
            spill_loads=int(match["loads"]),
            stack=int(match["stack"]),
            static_shared=int(shared.group(1)) if shared else 0,
        )
    return found
