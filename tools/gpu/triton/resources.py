"""The table of what every kernel needs on every architecture, and the rules that it must keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import harness
from ctkernels.backends.triton.backend import WIDE_FP32
from tools.gpu import problems
from tools.gpu.architectures import ARCHITECTURES, Architecture
from tools.gpu.problems import Sizes
from tools.gpu.triton import aot, plans

HEAD_DIMENSIONS = (64, 96, 128, 256)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNSPILLED = 128  # up to this head dimension no kernel may spill on NVIDIA
TRAINING = Sizes("training", (32,) * 16, H=8, Hk=2, P=1024, D=64, dtype=torch.bfloat16, segments=16, drop_p=0.05)
LONG = replace(TRAINING, name="head dimension 512")
VARIANTS = (
    TRAINING,
    replace(TRAINING, name="no dropout", drop_p=0.0),
    replace(TRAINING, name="few long rows", lens=(128,) * 4, segments=4),
    replace(TRAINING, name="every option", bias=True, alibi=True, softcap=30.0, window=900),
    replace(TRAINING, name="decoding", lens=(1,) * 16, past=31, P=16384, segments=0, drop_p=0.0),
    replace(TRAINING, name="values of head dimension 128", Dv=128),
    LONG,
)
WHOLE = (TRAINING.name, LONG.name)  # compiled for every type, the others for bf16
FEW = {
    "no dropout": (64,), "few long rows": (64, 96, 128), "every option": (64, 128), "decoding": (64,),
    "values of head dimension 128": (192,), LONG.name: (512,),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One kernel of one call on one architecture. `tile`: its compile-time sizes; `blocks`: of a multiprocessor."""

    variant: str
    phase: str
    kernel: str
    D: int
    dtype: str
    architecture: str
    tile: str
    warps: int
    stages: int
    registers: int
    spills: int
    stack: int
    shared: int
    shared_limit: int
    blocks: int

    @property
    def key(self) -> tuple:
        return self.variant, self.phase, self.kernel, self.D, self.dtype, self.architecture


def cases(architecture: str) -> Iterator[tuple[Sizes, str]]:
    """Every call that the table covers on an architecture, with the name of its type."""
    for variant in VARIANTS:
        for D in FEW.get(variant.name, HEAD_DIMENSIONS):
            for name, dtype in TYPES.items() if variant.name in WHOLE else [("bf16", torch.bfloat16)]:
                if D <= 256 or dtype != torch.float32 or architecture in WIDE_FP32:
                    yield replace(variant, D=D, dtype=dtype, prefix_dtype=torch.float32), name  # master weights


def measure(
    sizes: Sizes, dtype: str, architecture: Architecture, kernels: Collection[str] | None = None
) -> list[Entry]:
    """Compile every kernel of a call, or those of some names, forward and (except decoding) backward."""
    entries = []
    for phase, plan in plans.both(problems.make(sizes, "meta"), architecture, not sizes.past).items():
        for launch in plan.launches:
            if kernels is not None and launch.name not in kernels:
                continue
            needs = aot.resources(launch, architecture)
            tile = {k: v for k, v in launch.constexprs.items() if k in plans.TILE_SIZES}
            entries.append(
                Entry(
                    variant=sizes.name,
                    phase=phase,
                    kernel=launch.name,
                    D=sizes.D,
                    dtype=dtype,
                    architecture=architecture.name,
                    tile=" ".join(f"{name}={value}" for name, value in tile.items()),
                    warps=launch.num_warps,
                    stages=launch.num_stages,
                    registers=needs.registers,
                    spills=needs.spills,
                    stack=needs.stack,
                    shared=needs.shared,
                    shared_limit=architecture.shared_limit,
                    blocks=architecture.blocks(needs.registers, needs.shared, needs.warps),
                )
            )
    return entries


def violations(entry: Entry) -> list[str]:
    """What an entry breaks: no spill at D <= 128 on NVIDIA, and every block fits into a multiprocessor."""
    where = " ".join(map(str, entry.key))
    broken = []
    if entry.shared > entry.shared_limit:
        broken.append(f"{where}: {entry.shared} bytes of shared memory, the limit is {entry.shared_limit}")
    elif entry.blocks == 0:
        broken.append(f"{where}: {entry.registers} registers in {entry.warps} warps do not fit a multiprocessor")
    if entry.spills and entry.D <= UNSPILLED and ARCHITECTURES[entry.architecture].backend == "cuda":
        broken.append(f"{where}: {entry.spills} bytes of spills at {entry.registers} registers")
    return broken


def regressions(entry: Entry, committed: Mapping[tuple, Entry]) -> list[str]:
    """How an entry is worse than the committed one of the same kernel."""
    where, before = " ".join(map(str, entry.key)), committed.get(entry.key)
    if before is None:
        return [f"{where}: not in the committed table; run make gpu-report"]
    worse = [name for name in ("spills", "stack", "shared") if getattr(entry, name) > getattr(before, name)]
    worse += ["blocks"] if entry.blocks < before.blocks else []
    return [f"{where}: {name} was {getattr(before, name)}, is {getattr(entry, name)}" for name in worse]


def read(records: Iterable[Mapping[str, Any]]) -> dict[tuple, Entry]:
    """The committed table by key."""
    return {entry.key: entry for entry in (Entry(**record) for record in records)}


def markdown(entries: Sequence[Entry]) -> str:
    """A table per variant: kernels by head dimension and type, a column per architecture."""
    about = (
        "Registers per thread / shared memory per block in KiB / blocks that a multiprocessor holds at once; `+n` are "
        "n bytes (NVIDIA) or registers (AMD) that are spilled. Limits of shared memory per block: "
        + ", ".join(f"{a.name} {a.shared_limit // 1024}" for a in ARCHITECTURES.values())
        + " KiB."
    )
    names = [name for name in ARCHITECTURES if any(entry.architecture == name for entry in entries)]
    absent = [name for name in ARCHITECTURES if name not in names]
    covered = f"Compiled for {', '.join(names)}." + (f" **Not yet for {', '.join(absent)}.**" if absent else "")
    broken = [line for entry in entries for line in violations(entry)]
    parts = [about, covered, f"Rules broken: {len(broken)}\n" + "\n".join(f"- {line}" for line in broken)]
    for variant in dict.fromkeys(entry.variant for entry in entries):
        rows: dict[tuple, dict[str, Entry]] = {}
        for entry in (entry for entry in entries if entry.variant == variant):
            rows.setdefault((entry.phase, entry.kernel, entry.D, entry.dtype), {})[entry.architecture] = entry
        lines = [
            [kernel, str(D), dtype, *(_cell(cells.get(name)) for name in names)]
            for (_, kernel, D, dtype), cells in sorted(rows.items(), key=lambda item: item[0][1:])
        ]
        parts.append(f"**{variant}**\n\n" + harness.table(["kernel", "D", "type", *names], lines))
    return "\n\n".join(parts)


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    spilled = f" +{entry.spills}" if entry.spills else ""
    return f"{entry.registers}{spilled} / {entry.shared / 1024:.0f} / {entry.blocks}"
