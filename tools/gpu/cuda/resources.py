"""The table of what every CUDA C++ kernel needs on every architecture, under the rules of `resources.py`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import harness
from tools.gpu.architectures import ARCHITECTURES, Architecture
from tools.gpu.cuda import build as cuda_build
from tools.gpu.triton import resources
from tools.gpu.triton.resources import Entry

NVIDIA = {name: architecture for name, architecture in ARCHITECTURES.items() if architecture.backend == "cuda"}

# the kernels of calls without options at D = 64 and 128
TUNED_TYPES, TUNED_VARIANT = ("bf16", "fp16"), "plain"


def measure(architecture: Architecture, tuned: bool = False, files: Sequence[str] | None = None) -> list[Entry]:
    """Compile every kernel for an architecture, or those of some source files ("kernels_bf16", ...), or the tuned ones
    alone, which takes a tenth of the time.

    Raises:
        ptxemu.CompileError: nvcc refuses a source.
        LookupError: a kernel that a plan can name is in no source, or one that no plan names is.
    """
    needs = {}
    if tuned:
        for dtype in TUNED_TYPES:
            needs |= cuda_build.instances(dtype, TUNED_VARIANT, architecture.name)[1]
    else:
        for source in cuda_build.sources():
            if files is None or source.stem in files:
                needs |= cuda_build.cubin(source, architecture.name)[1]
    launched = {kernel.name: kernel for kernel in cuda_build.kernels()}
    whole = not tuned and files is None
    strange = needs.keys() ^ launched.keys() if whole else needs.keys() - launched.keys()
    if strange:
        raise LookupError(f"in the plans or in the sources alone: {', '.join(sorted(strange))}")
    return [entry(launched[name], need, architecture) for name, need in needs.items()]


def entry(kernel: cuda_build.Kernel, needs: cuda_build.Needs, architecture: Architecture) -> Entry:
    shared, warps = kernel.shared + needs.static_shared, kernel.threads // 32
    return Entry(
        variant="cuda",
        phase="",
        kernel=kernel.name,
        D=kernel.D or 0,
        dtype=next((dtype for dtype in resources.TYPES if f"_{dtype}" in kernel.name), ""),
        architecture=architecture.name,
        tile="",
        warps=warps,
        stages=1,
        registers=needs.registers,
        spills=needs.spill_stores + needs.spill_loads,
        stack=needs.stack,
        shared=shared,
        shared_limit=architecture.shared_limit,
        blocks=architecture.blocks(needs.registers, shared, warps),
    )


def markdown(entries: Sequence[Entry]) -> str:
    """A line per kernel, a column per architecture."""
    names = list(dict.fromkeys(entry.architecture for entry in entries))
    absent = [name for name in NVIDIA if name not in names]
    covered = f"Compiled for {', '.join(names)}." + (f" **Not yet for {', '.join(absent)}.**" if absent else "")
    covered += " An empty cell: not compiled there yet."
    broken = [line for entry in entries for line in resources.violations(entry)]
    rows: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.kernel, {})[entry.architecture] = entry
    lines = [
        [kernel.removeprefix("ctk_"), str(32 * next(iter(cells.values())).warps), *(_cell(cells.get(n)) for n in names)]
        for kernel, cells in sorted(rows.items())
    ]
    about = (
        "Registers per thread / shared memory per block in KiB, with a bias gradient of 4 heads per group / blocks "
        "that a multiprocessor holds at once; `+n` are n bytes that are spilled."
    )
    rules = f"Rules broken: {len(broken)}" + "".join(f"\n- {line}" for line in broken)
    return "\n\n".join([about, covered, rules, harness.table(["kernel", "threads", *names], lines)])


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    spilled = f" +{entry.spills}" if entry.spills else ""
    return f"{entry.registers}{spilled} / {entry.shared / 1024:.0f} / {entry.blocks}"
