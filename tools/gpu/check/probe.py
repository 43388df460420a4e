"""Whether the extensions load and compute, and what this machine is, as a line of JSON:

python -m tools.gpu.check.probe DEVICE
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.cases import Case, Inputs
from ctkernels import dispatch
from ctkernels.backends import cpu, cuda
from tools.gpu.check import session

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "numpy",
    "flash-attn",
    "flash-attn-4",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
    "ninja",
    "setuptools",
)


def describe(device: str) -> dict[str, Any]:
    """Why an extension does not load or compute, by name, None where it does; and the machine."""
    extensions = {"_C": cpu.unavailable() or call("cpu", "cpu")}
    if device == "cuda":
        extensions["_cuda"] = cuda.load_library() or (call("cuda", "cuda") if torch.cuda.is_available() else None)
    return {"extensions": extensions, "machine": machine(device)}


def call(backend: str, device: str) -> str | None:
    """Why a tiny call fails, or None: extensions of older sources load, and do not know what they are asked."""
    x = Inputs(Case("probe", B=1, H=1, Hk=1, S=1, P=1, D=16), device, backend)
    x.require_grad(True)
    try:
        peers.results(peers.ours(x), x, x.dout)
    except (RuntimeError, ValueError) as error:
        return session.describe(error)
    return None


def machine(device: str) -> dict[str, Any]:
    """`harness.describe_machine`, the versions of all packages that matter, and the GPU's own data."""
    found = device != "cuda" or torch.cuda.is_available()
    info = harness.describe_machine(device if found else "cpu")
    info["versions"] = {name: version(name) for name in PACKAGES}
    info["backends"] = dispatch.availability()
    if device == "cuda" and found:
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "capability": torch.cuda.get_device_capability(device),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": query_driver(),
        }
    return info


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def query_driver() -> str | None:
    """Driver version, power limit and clocks, as nvidia-smi tells them."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    print(json.dumps(describe(sys.argv[1]), default=str))
