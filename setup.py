"""Builds the C++ extension. Everything else about the package is in pyproject.toml.

CTKERNELS_CXXFLAGS adds compiler flags (for instance "-g -fsanitize=address,undefined").
"""

import os
import shlex

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = [
    "python_bindings/cpu.cpp",
    "csrc/cpu/kernels_portable.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_avx512_bf16.cpp",
]
HEADERS = [
    "csrc/mask.h",
    "csrc/params.h",
    *(f"csrc/cpu/{name}.h" for name in ("backward", "build", "common", "forward", "gemm", "kernels")),
    *(f"csrc/cpu/{name}.h" for name in ("logits", "narrow", "operands", "select", "simd", "tiles")),
]
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # fused multiply-add; order of operations is kept, so bits are reproducible
    "-fno-math-errno",
    "-fno-trapping-math",
    # at::parallel_for is a header that needs it. Only for the compiler: at link time the OpenMP runtime must remain
    # torch's own, which libtorch brings along, and not a second one with threads of its own.
    "-fopenmp",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    *shlex.split(os.environ.get("CTKERNELS_CXXFLAGS", "")),
]

setup(
    ext_modules=[
        CppExtension(
            "ctkernels._C",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=FLAGS,
            extra_link_args=shlex.split(os.environ.get("CTKERNELS_CXXFLAGS", "")),
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
)
