"""Builds the C++ extensions. Everything else about the package is in pyproject.toml.

ctkernels/_C: the CPU kernels, always.  ctkernels/_cuda: the CUDA kernels, where nvcc and a CUDA build of torch are.

CTKERNELS_CUDA        1: insist on the CUDA kernels; 0: leave them out
CUDA_HOME             a CUDA toolkit, of torch's major version (default: where nvcc is, else NVIDIA's wheels on PyPI)
TORCH_CUDA_ARCH_LIST  GPU architectures, as everywhere in torch (default below)
CTKERNELS_CXXFLAGS    more flags of the C++ compiler (for instance "-g -fsanitize=address,undefined")
MAX_JOBS              compilers that run at once
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

BINDING_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS = [
    *BINDING_FLAGS,
    "-ffp-contract=fast",  # fused multiply-add; order of operations is kept, so bits are reproducible
    "-fno-math-errno",
    "-fno-trapping-math",
    # at::parallel_for is a header that needs it. Only for the compiler: at link time the OpenMP runtime must remain
    # torch's own, which libtorch brings along, and not a second one with threads of its own.
    "-fopenmp",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-Xcompiler=-fvisibility=hidden",
    # torch takes the conversions of 16-bit types away; the kernels, which know no torch, use CUDA's
    *(f"-U__CUDA_NO_{name}__" for name in ("HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF_OPERATORS")),
]
# Code for 8.0 is what 8.6 and 8.9 run, too: the kernels use nothing that came with those. PTX for what comes later.
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;9.0+PTX"


def find_toolkit() -> Path | None:
    """A folder with nvcc of torch's major version, headers and the runtime library."""
    home, major = cpp_extension.CUDA_HOME, torch.version.cuda.split(".")[0]
    if home and (Path(home) / "include/cuda_runtime.h").exists() and _major(Path(home) / "bin/nvcc") in (major, ""):
        return Path(home)
    spec = find_spec("nvidia")
    for wheels in (Path(folder) / f"cu{major}" for folder in (spec.submodule_search_locations if spec else ())):
        if (wheels / "bin/nvcc").exists() and (wheels / "include/cuda_runtime.h").exists():
            return _as_toolkit(wheels)
    return None


def _major(nvcc: Path) -> str | None:
    """Major version of a compiler, "" if it does not say, None if there is none."""
    if not nvcc.exists():
        return None
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    found = re.search(r"release (\d+)\.", told)
    return found[1] if found else ""


def _as_toolkit(wheels: Path) -> Path:
    """The wheels' folder as a toolkit has it: they lack the names that a linker looks for."""
    toolkit = Path("build/cuda").absolute()
    (toolkit / "lib64").mkdir(parents=True, exist_ok=True)
    links = {toolkit / name: wheels / name for name in ("bin", "include", "nvvm")}
    links |= {toolkit / "lib64" / f"{f.name.split('.so')[0]}.so": f for f in (wheels / "lib").glob("*.so.*")}
    links |= {toolkit / "lib64" / f.name: f for f in (wheels / "lib").glob("*.a")}
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return toolkit


def cuda_left_out(choice: str) -> str | None:
    """Why the CUDA kernels are not built, or None. `choice`: the value of CTKERNELS_CUDA.

    Raises:
        SystemExit: they were asked for and cannot be built, or the value means nothing.
    """
    if choice not in ("", "0", "1"):
        raise SystemExit(f"CTKERNELS_CUDA must be 0, 1 or unset, got {choice!r}")
    if choice == "0":
        return "CTKERNELS_CUDA=0"
    reason = None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif find_toolkit() is None:
        reason = (
            f"no fitting nvcc was found; set CUDA_HOME to a CUDA {torch.version.cuda} toolkit, as torch was built with"
        )
    if choice == "1" and reason is not None:
        raise SystemExit(f"CTKERNELS_CUDA=1 asks for the CUDA kernels, but {reason}")
    return reason


def extensions() -> list:
    """What there is to build here."""
    flags = shlex.split(os.environ.get("CTKERNELS_CXXFLAGS", ""))
    cpu = CppExtension(
        "ctkernels._C",
        ["python_bindings/cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*.h"), "python_bindings/problem.h"],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=flags,
    )
    reason = cuda_left_out(os.environ.get("CTKERNELS_CUDA", ""))
    if reason is not None:
        print(f"ctkernels: CPU kernels only, without the CUDA kernels: {reason}", file=sys.stderr)
        return [cpu]
    cpp_extension.CUDA_HOME = str(find_toolkit())
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES if version >= (12, 8) else ARCHITECTURES_BEFORE_12_8)
    cuda = CUDAExtension(
        "ctkernels._cuda",
        ["python_bindings/cuda.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        depends=[*glob("csrc/*.h"), *glob("csrc/cuda/*.*h"), *glob("python_bindings/*.h")],
        # architectures of a file two at a time: the last file does not keep all but one core waiting
        extra_compile_args={"cxx": [*BINDING_FLAGS, *flags], "nvcc": [*NVCC_FLAGS, "--threads=2"]},
        extra_link_args=flags,
    )
    return [cpu, cuda]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    )
