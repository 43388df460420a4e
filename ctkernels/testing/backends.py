"""Which builds of the op can run on this machine, as pytest parameters."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ctkernels import dispatch


@dataclass(frozen=True)
class Backend:
    """One build of the op: what to pass as `backend=`, where its tensors live, and the CPU instruction set, if any."""

    name: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @property
    def double(self) -> bool:
        """Whether fp64 is promised: it is on the backends that run on the CPU."""
        return self.device == "cpu" and self.name in ("reference", "cpu")

    @property
    def wide(self) -> bool:
        """Whether every D and Dv up to 512 are served in every type: not by the CUDA C++ kernels, which say so."""
        return dispatch.refusal(self.name, torch.device(self.device), wide=512) is None

    @property
    def kernel(self) -> bool:
        return self.name != "reference"


def device_of(name: str) -> str:
    if name in ("reference", "cpu") or os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def backends() -> list[Backend]:
    """Every available backend, in the default build of each."""
    return [Backend(name, device_of(name)) for name, reason in dispatch.availability().items() if reason is None]


def builds() -> list[Backend]:
    """Every available backend, the CPU backend once per instruction set."""
    every = []
    for backend in backends():
        if backend.name == "cpu":
            every += [Backend(backend.name, backend.device, isa) for isa in dispatch.load("cpu").isas()[1:]]
        else:
            every.append(backend)
    return every
