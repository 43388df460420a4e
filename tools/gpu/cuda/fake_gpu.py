"""GPUs that are not there, for the bindings of the CUDA backend as they are (fake_gpu.cpp): what they call is recorded,
and what a GPU would refuse is refused. Tensors are in the CPU's memory.

This needs a torch without CUDA, whose place the fake takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import subprocess
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ptxemu import toolchain
from ptxemu.launch import cache_directory
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[3]
SOURCES = Path(os.environ.get("CTKERNELS_FAKE_GPU_SOURCES", ROOT))  # tests plant mistakes into a copy
CODE = (
    "csrc/*.h",
    "csrc/cuda/*.h",
    "python_bindings/*.*",
    "tools/gpu/cuda/planned_kernels.h",
    "tools/gpu/cuda/fake_gpu.cpp",
)
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32, ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_char), ctypes.c_int64,
)  # fmt: skip
# kernel, grid, threads, bytes of shared memory, the one argument
Launched = Callable[[str, tuple[int, int, int], int, int, bytes], None]


def cuda_headers() -> list[str]:
    """Where nvcc finds the headers of CUDA's runtime."""
    told = toolchain.run_tool([toolchain.find_tool("nvcc"), "-dryrun", "-x", "cu", os.devnull]).stderr
    return re.findall(r'"-I([^"]+)"', told)


def build() -> Path:
    """The library, against this torch, kept by content."""
    code = [path.read_bytes() for name in CODE for path in sorted(SOURCES.glob(name))]
    told = [torch.__version__.encode(), *code]
    target = cache_directory() / f"bindings-{hashlib.sha256(b''.join(told)).hexdigest()[:20]}.so"
    if not target.exists():
        torch_root = Path(torch.__file__).parent
        includes = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
        includes += [sysconfig.get_paths()["include"], *cuda_headers()]
        command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wno-psabi", "-Werror", "-fPIC", "-shared"]
        command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", *(f"-isystem{path}" for path in includes)]
        command += [str(SOURCES / CODE[-1])]
        command += [f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu", "-Wl,-z,lazy"]
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / "bindings.so"
            done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-4000:])
            built.replace(target)
    return target


@cache
def library() -> ctypes.CDLL:
    """The loaded library; its operators are those of the CUDA backend from now on in this process."""
    if torch.version.cuda is not None:
        raise RuntimeError(f"the fake GPUs need a torch without CUDA, got {torch.__version__}")
    loaded = ctypes.CDLL(str(build()), mode=os.RTLD_LAZY)
    loaded.fake_calls.restype = loaded.fake_kernels.restype = ctypes.c_char_p
    return loaded


def kernels() -> list[str]:
    """The names of all kernels, as `plan.h` can name them."""
    return library().fake_kernels().decode().split()


def to_gpu(values: Any, device: int = 0) -> Any:
    """The tensors of any structure on a GPU, in the same memory."""
    return pytree.tree_map_only(torch.Tensor, lambda x: torch.ops.ctkernels_fake.to_gpu(x.detach(), device), values)


def to_cpu(values: Any) -> Any:
    """The tensors of any structure on the CPU, in the same memory."""
    return pytree.tree_map_only(torch.Tensor, torch.ops.ctkernels_fake.to_cpu, values)


_running: list[Any] = []  # callbacks, the last of which is in use


@contextlib.contextmanager
def launching(run: Launched) -> Iterator[None]:
    """Inside, `run` is what a GPU does with a launch. If it raises, the launch fails with CUDA's error 719."""

    def call(kernel: bytes, grid: Any, threads: int, shared: int, args: Any, size: int) -> int:
        try:
            run(kernel.decode(), (grid[0], grid[1], grid[2]), threads, shared, args[:size])
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    _running.append(CALLBACK(call))
    library().fake_set_callback(_running[-1])
    try:
        yield
    finally:
        _running.pop()
        library().fake_set_callback(_running[-1] if _running else None)


def calls() -> list[dict]:
    """What was called since the last time, in order."""
    recorded = [json.loads(line) for line in library().fake_calls().decode().splitlines()]
    library().fake_forget_calls()
    return recorded
