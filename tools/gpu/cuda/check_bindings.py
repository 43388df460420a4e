"""Whether the compiled CUDA extension is whole, on a machine without a GPU: `make cuda-bindings` runs this with a CUDA
build of torch. The extension loads, has every kernel that a plan can name and code for every architecture, its
operators have the schemas of the CPU's and are registered for CUDA tensors, and a training step can be traced with
fake tensors.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for tools/, which is not installed

import ptxemu
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ctkernels as ct
from ctkernels import dispatch, ops
from ctkernels.backends import cpu, cuda
from ctkernels.problem import Prepared, Problem
from tools.gpu.cuda import build as cuda_build


def registered(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ctkernels::{operator}", key)


def check_registrations() -> None:
    """Schemas equal to the CPU's, but for what one backend has alone; kernels under the keys that CUDA tensors arrive
    at, and under no other device's."""
    alone = {"ds_sum", "tables", "prepared_prefix_k", "prepared_prefix_v"}
    for name in ("forward", "backward"):
        schemas = [getattr(torch.ops.ctkernels, f"{device}_{name}").default._schema for device in ("cuda", "cpu")]
        ours, theirs = ([(x.name, str(x.type)) for x in s.arguments if x.name not in alone] for s in schemas)
        assert ours == theirs, f"{schemas[0]} is not {schemas[1]}"
    for name in ("cuda_forward", "cuda_backward", "cuda_tables", "cuda_order"):
        assert registered(name, "CUDA") and not registered(name, "CPU"), name
    for name in ("prefix_attention", "prefix_attention_backward"):
        assert registered(name, "CUDA") and registered(name, "Meta"), name


def check_kernels() -> int:
    """The build has every kernel of the table."""
    missing = [kernel.name for kernel in cuda_build.kernels() if not torch.ops.ctkernels.cuda_has_kernel(kernel.name)]
    assert not missing, f"not in the build: {', '.join(missing)}"
    assert not torch.ops.ctkernels.cuda_has_kernel("ctk_forward_bf16_63_plain")
    return len(cuda_build.kernels())


def check_architectures(library: Path, wanted: str) -> tuple[set[str], set[str]]:
    """Architectures of the machine code and of the PTX in the library: those that were asked for, "8.0;9.0+PTX"."""
    tool = ptxemu.toolchain.find_tool("cuobjdump")
    found = []
    for option in ("--list-elf", "--list-ptx"):
        listed = subprocess.run([tool, option, library], check=True, capture_output=True, text=True).stdout
        found.append(set(re.findall(r"\.(sm_\d+)\.", listed)))
    names = {entry: "sm_" + entry.removesuffix("+PTX").replace(".", "") for entry in wanted.split(";")}
    expected = [set(names.values()), {name for entry, name in names.items() if entry.endswith("+PTX")}]
    assert found == expected, f"machine code for {found[0]} and PTX for {found[1]}, expected {expected}"
    return tuple(found)


def check_refusals() -> None:
    """The reasons that errors give: no GPU, and tensors of another device."""
    assert cuda.unavailable() == "torch finds no GPU" or torch.cuda.is_available()
    try:
        dispatch.choose("cuda", torch.device("cpu"))
    except ValueError as error:
        assert "it computes on cuda tensors, got cpu" in str(error)
    else:
        raise AssertionError("CPU tensors were accepted")


def check_trace() -> None:
    """Forward and backward on fake CUDA tensors: shapes, types, devices and strides, and both operators in the graph.

    The backward operator is called by its name, since autograd's engine asks for a real device.
    """
    B, H, Hk, S, P, D = 3, 4, 2, 5, 11, 64
    fields = dict.fromkeys(Problem._fields)
    fields |= dict(context_length=P, drop_p=0.1, seed=1, scale=0.125, causal=True, window=0, window_prefix=True)
    problem, choice = Problem(**{**fields, "softcap": 0.0}), dispatch.Choice("cuda", "cuda")

    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        settings = *Prepared(), *problem, *choice
        out, lse = ops.prefix_attention(*inputs, None, None, *settings)
        needs = [True] * len(inputs) + [False, False]  # no bias and no sinks
        grads = ops.prefix_attention_backward(out * 2, lse, *inputs, None, None, out, lse, needs, *settings)
        return out, lse, *grads

    with FakeTensorMode(), torch.no_grad():
        rows = [torch.empty(B, S, h, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in (H, Hk, Hk)]
        inputs = [*rows, *(torch.empty(1, Hk, P, D, device="cuda") for _ in range(2))]
        out, lse, *grads, bias, sinks = step(*inputs)
        assert all(x.device.type == "cuda" for x in (out, lse, *grads)) and bias.numel() == sinks.numel() == 0
        assert out.shape == (B, H, S, D) and out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert [(g.shape, g.dtype, g.stride()) for g in grads] == [(x.shape, x.dtype, x.stride()) for x in inputs]
        graph = make_fx(step)(*inputs)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert {ops.prefix_attention, ops.prefix_attention_backward} <= called


def main() -> None:
    assert torch.version.cuda is not None, f"torch {torch.__version__} is no CUDA build"
    for backend in (cpu, cuda):
        reason = backend.unavailable() if backend is cpu else backend.load_library()
        assert reason is None, reason
    check_registrations()
    kernels = check_kernels()
    (library,) = Path(ct.__file__).parent.glob("_cuda*.so")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_build.setup().ARCHITECTURES
    machine_code, ptx = check_architectures(library, wanted)
    check_refusals()
    check_trace()
    size = library.stat().st_size / 2**20
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}: {library.name}, {size:.0f} MiB, {kernels} kernels")
    print(f"machine code for {', '.join(sorted(machine_code))}, PTX of {', '.join(sorted(ptx)) or 'none'}")
    print("operators registered and traced")


if __name__ == "__main__":
    main()
