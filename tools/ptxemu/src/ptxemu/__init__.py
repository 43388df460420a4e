"""Runs compiled CUDA and Triton kernels (PTX) on the CPU, with checks and counters.

    module = ptxemu.compile_cuda("kernel.cu", arch="sm_80")
    module.launch("kernel", grid, block, [tensor, 3, 1.5], shared_bytes=4096)

See README.md for what is modelled and what is not.
"""

from .counters import Counters
from .errors import CompileError, KernelFault, ParseError, PtxError, ToolMissing, Unsupported
from .launch import CHECKS, FAULT_KINDS, LaunchResult, Module, pointer
from .report import disassemble, resources, sass_histogram
from .toolchain import TritonModule, compile_cuda, compile_triton, cuda_to_ptx


def compile_ptx(ptx_text, kernels=None, optimise="-O1"):
    """Translates PTX text; `kernels` optionally restricts it to some entry points."""
    return Module(ptx_text, kernels, optimise)


__all__ = [
    "CHECKS",
    "FAULT_KINDS",
    "CompileError",
    "Counters",
    "KernelFault",
    "LaunchResult",
    "Module",
    "ParseError",
    "PtxError",
    "ToolMissing",
    "TritonModule",
    "Unsupported",
    "compile_cuda",
    "compile_ptx",
    "compile_triton",
    "cuda_to_ptx",
    "disassemble",
    "pointer",
    "resources",
    "sass_histogram",
]  # fmt: skip
