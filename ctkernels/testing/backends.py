"""Which builds of the op can run on this machine, as pytest parameters."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from ctkernels import dispatch


@dataclass(frozen=True)
class Backend:
    """One build of the op: what to pass as `backend=`, where its tensors live, the CPU instruction set, if any, and
    whether fp64 is promised."""

    name: str
    device: str = "cpu"
    isa: str | None = None
    double: bool = False

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @property
    def wide(self) -> bool:
        """Whether every D and Dv up to 512 are served in every type: not by Triton on small GPUs, where it says so."""
        return dispatch.refusal(self.name, torch.device(self.device), wide=512) is None

    @property
    def kernel(self) -> bool:
        return self.name != "reference"


def device_of(name: str) -> str:
    """Where the tests of a backend have their tensors."""
    gpu = "cuda" in dispatch.BACKENDS[name][1] and os.environ.get("TRITON_INTERPRET") != "1"
    return "cuda" if gpu and torch.cuda.is_available() else "cpu"


def _double(name: str, device: str) -> bool:
    return dispatch.refusal(name, torch.device(device), torch.float64) is None


def backends() -> list[Backend]:
    """Every available backend, in the default build of each."""
    found = [(name, device_of(name)) for name, reason in dispatch.availability().items() if reason is None]
    return [Backend(name, device, double=_double(name, device)) for name, device in found]


def builds() -> list[Backend]:
    """Every available backend, the CPU backend once per instruction set."""
    every = []
    for backend in backends():
        if backend.name == "cpu":
            every += [replace(backend, isa=isa) for isa in dispatch.load("cpu").isas()[1:]]
        else:
            every.append(backend)
    return every
