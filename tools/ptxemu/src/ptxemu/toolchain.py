"""Compiles CUDA C++ with nvcc and Triton kernels ahead of time, and finds the CUDA tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import CompileError, ToolMissing
from .launch import Module


def find_tool(*names):
    """The first of several programs found on PATH, in a CUDA toolkit, in NVIDIA's wheels, or shipped with Triton."""
    directories = [None]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            directories.append(str(Path(os.environ[variable]) / "bin"))
    directories += sorted((str(p) for p in Path("/usr/local").glob("cuda*/bin")), reverse=True)
    wheels = importlib.util.find_spec("nvidia")  # nvidia-cuda-nvcc and its like
    for folder in wheels.submodule_search_locations if wheels else ():
        directories += [str(p) for p in Path(folder).glob("cu*/bin")]
    try:
        import triton.backends.nvidia as nvidia

        directories.append(str(Path(nvidia.__file__).parent / "bin"))
    except ImportError:
        pass
    for name in names:
        for directory in directories:
            found = shutil.which(name, path=directory)
            if found:
                return found
    raise ToolMissing(
        f"{' or '.join(names)} was not found on PATH, in $CUDA_HOME/bin, in /usr/local/cuda*/bin, in NVIDIA's wheels "
        "(pip install nvidia-cuda-nvcc) or in an installed Triton"
    )


def run_tool(arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(map(str, arguments))} failed:\n{(done.stderr or done.stdout)[-6000:]}")
    return done


def cuda_to_ptx(source, arch="sm_80", include=(), defines=None, options=()):
    """PTX text of a .cu file (a path) or of CUDA C++ source text."""
    nvcc = find_tool("nvcc")
    is_path = isinstance(source, os.PathLike) or ("\n" not in source and os.path.exists(source))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(source).resolve() if is_path else Path(directory) / "source.cu"
        if not is_path:
            path.write_text(source)
        target = Path(directory) / "out.ptx"
        flags = [f"-I{d}" for d in include]
        flags += [f"-D{k}" if v is None else f"-D{k}={v}" for k, v in (defines or {}).items()]
        run_tool(
            [
                nvcc,
                "-std=c++17",
                "-O3",
                "-lineinfo",
                f"-arch={arch}",
                "-ptx",
                *flags,
                *options,
                "-o",
                target,
                path,
            ]
        )
        return target.read_text()


def compile_cuda(source, arch="sm_80", include=(), defines=None, options=(), kernels=None):
    """Compiles CUDA C++ (a path or source text) with nvcc and translates the result."""
    return Module(cuda_to_ptx(source, arch, include, defines, options), kernels)


class TritonModule(Module):
    """A Module made from one Triton kernel.

    ``metadata`` holds ``name``, ``shared`` (bytes), ``num_warps``, ``num_stages``, ``arch`` and
    ``signature`` (the names of the runtime arguments); ``cubin`` is the machine code from ptxas.
    """

    def __init__(self, ptx, metadata, cubin):
        super().__init__(ptx)
        self.metadata = metadata
        self.cubin = cubin

    def run(self, grid, args, **options):
        """Launches with the block size and shared memory that Triton chose.

        Arguments are those of the kernel without its constexprs.  Scratch pointers that Triton
        appends are passed as null.
        """
        name = self.metadata["name"]
        missing = len(self.kernels[name].parameters) - len(args)
        block = (32 * self.metadata["num_warps"],)
        options.setdefault("shared_bytes", self.metadata["shared"])
        return self.launch(name, grid, block, [*args, *[None] * max(missing, 0)], **options)


def compile_triton(
    kernel,
    signature,
    constexprs,
    arch=80,
    num_warps=4,
    num_stages=2,
    divisible_by_16=None,
    options=None,
):
    """Compiles a ``@triton.jit`` function ahead of time, without a GPU.

    signature: argument name -> Triton type, e.g. ``{"x": "*bf16", "n": "i32"}``.
    constexprs: name -> value of the ``tl.constexpr`` arguments.
    divisible_by_16: names of arguments that Triton may assume to be multiples of 16, which it
        infers from values when it compiles at run time; by default all pointers.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise ToolMissing(f"compile_triton needs the triton package: {error}") from error
    arch = int(re.sub(r"\D", "", str(arch)))
    names = list(kernel.arg_names)
    full = {n: "constexpr" if n in constexprs else signature[n] for n in names}
    if divisible_by_16 is None:
        divisible_by_16 = [n for n, kind in full.items() if kind.startswith("*")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible_by_16}
    source = ASTSource(fn=kernel, signature=full, constexprs=dict(constexprs), attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
    )
    metadata = {
        "name": compiled.metadata.name,
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "num_stages": num_stages,
        "arch": arch,
        "signature": [n for n in names if full[n] != "constexpr"],
    }
    return TritonModule(compiled.asm["ptx"], metadata, compiled.asm.get("cubin"))
