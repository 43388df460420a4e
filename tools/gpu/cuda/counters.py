"""What the CUDA C++ kernels of a training step execute, counted by the emulator: the figures of `counters.py`, for the
launches that `plan.h` makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ptxemu
import torch

from benchmarks import harness
from tools.gpu import problems
from tools.gpu.architectures import ARCHITECTURES
from tools.gpu.cuda import plan
from tools.gpu.cuda.emulated import ARCHITECTURE, shipped
from tools.gpu.problems import Sizes
from tools.gpu.triton import counters
from tools.gpu.triton.counters import PROBLEM, SECTOR, SHARE

# what moves 16 bytes per thread: cp.async.cg never moves less, the others four words or two double words
WIDE = re.compile(r"cp\.async\.cg|\.v4\.[a-z]32|\.v2\.[a-z]64")

# full tiles, counted again by the tests
SMALL = Sizes("small", (32, 32), H=4, Hk=2, P=128, D=64, dtype=torch.bfloat16)


def count(planned: plan.Plan) -> list[dict[str, Any]]:
    """Run the launches of a plan in the emulator: one record each, as `counters.count` has them, and `global_bytes`
    moved, `wide_bytes` of them with instructions of 16 bytes per thread, `pass_bytes` of all buffers of the pass."""
    records = []
    for launch in planned.launches:
        name, grid = launch.name.decode(), tuple(launch.grid)
        counted = (
            shipped()
            .module(name)
            .launch(
                name,
                grid,
                launch.block,
                [planned.args],
                shared_bytes=launch.shared,
                check=False,
                counters=True,
                buffers=planned.buffers,
            )
            .counters
        )
        records.append({"kernel": name, "blocks": grid[0] * grid[1] * grid[2], "warps": launch.block // 32})
        records[-1]["pass_bytes"] = planned.footprint
        records[-1] |= figures(counted)
    return records


def figures(counted: ptxemu.Counters) -> dict[str, Any]:
    """Numbers of instructions are of warps, `special` of threads; bytes are counted once per warp and instruction."""
    moved = [line for line in counted.lines if line["global_bytes"]]
    return {
        "matrix_flops": counted.matrix_flops,
        "warp_instructions": counted.total_instructions / 32,
        "instructions": {kind: n / 32 for kind, n in sorted(counted.instructions.items())},
        "special": counted.instructions.get("special_function", 0),
        "shared_wavefronts": counted.shared_wavefronts,
        "shared_ideal": counted.shared_ideal,
        "global_sectors": counted.global_sectors,
        "global_ideal": counted.global_ideal,
        "bytes_read": counted.global_bytes_read,
        "bytes_written": counted.global_bytes_written,
        "global_bytes": sum(line["global_bytes"] for line in moved),
        "wide_bytes": sum(line["global_bytes"] for line in moved if WIDE.search(line["opcode"])),
        "atomics": counted.atomics,
    }


def plans(sizes: Sizes, multiprocessors: int) -> dict[str, plan.Plan]:
    """Forward and backward of a problem, planned for a GPU of so many multiprocessors: phase -> plan. The second reads
    what the first leaves."""
    inputs = problems.make(sizes)
    *tensors, problem = inputs.forward
    outputs, forward = plan.forward(*inputs.forward, multiprocessors)
    needs = [True] * 5 + [inputs.prefix_bias is not None]
    _, backward = plan.backward(inputs.dout, None, *tensors, *outputs, needs, problem, multiprocessors)
    return {"forward": forward, "backward": backward}


def run(sizes: Sizes, multiprocessors: int) -> dict[str, list[dict[str, Any]]]:
    """What the launches of both passes execute: phase -> records."""
    return {phase: count(planned) for phase, planned in plans(sizes, multiprocessors).items()}


def measure(sizes: Sizes = PROBLEM) -> dict[str, Any]:
    """As `counters.measure`, for sm_80, whose instructions the CUDA kernels have on every architecture; and the ratios
    of `SMALL`."""
    phases = run(sizes, ARCHITECTURES[ARCHITECTURE].multiprocessors // SHARE)
    return {
        "problem": {**asdict(sizes), "dtype": str(sizes.dtype), "prefix_dtype": str(sizes.prefix_dtype)},
        "pairs": counters.all_pairs(sizes),
        "kept_pairs": sizes.H * counters.kept_pairs(sizes),
        "ratios": {ARCHITECTURE: {phase: ratios(kernels, sizes, phase) for phase, kernels in phases.items()}},
        "small": {phase: ratios(kernels, SMALL, phase) for phase, kernels in run(SMALL, 1).items()},
        "architectures": {ARCHITECTURE: phases},
    }


def ratios(kernels: Sequence[Mapping[str, Any]], sizes: Sizes, phase: str) -> dict[str, float]:
    """Those of `counters.ratios`, and two more.

    wide: the share of bytes that instructions of 16 bytes per thread move.  cached: every byte of inputs, outputs and
    scratch memory once, over the least. That is what memory sees if the L2 cache keeps the pass, whose kernels follow
    one another; `traffic` is what it sees if every kernel finds the cache cold.
    """
    moved, wide = (sum(kernel[name] for kernel in kernels) for name in ("global_bytes", "wide_bytes"))
    cached = kernels[0]["pass_bytes"] / counters.least_bytes(sizes, phase)
    return {**counters.ratios(kernels, sizes, phase), "cached": cached, "wide": wide / max(1, moved)}


def regressions(phase: str, now: Mapping[str, float], committed: Mapping[str, float]) -> list[str]:
    """Which ratios of a phase are more than a hundredth worse than the committed ones."""
    worse = [name for name, value in now.items() if name != "wide" and value > 1.01 * committed[name]]
    worse += ["wide"] if now["wide"] < 0.99 * committed["wide"] else []
    return [f"{phase}: {name} was {committed[name]:.3f}, is {now[name]:.3f}" for name in worse]


def ratio_table(record: Mapping[str, Any]) -> str:
    """What is executed over what is needed, by phase."""
    names = {
        "tile_waste": "tensor FLOPs / kept by the mask",
        "traffic": "bytes of memory / least, cold cache for each kernel",
        "cached": "the same, pass kept in L2",
        "requests": "bytes asked of L2 / least",
        "coalescing": "sectors / fewest",
        "wide": "bytes moved 16 at a time",
        "bank_conflicts": "bank passes / conflict-free",
        "instructions": "other instructions per tensor instruction",
    }
    rows = [
        [phase, *(f"{found[key]:.0%}" if key == "wide" else f"{found[key]:.2f}" for key in names)]
        for phase, found in record["ratios"][ARCHITECTURE].items()
    ]
    return harness.table(["phase", *names.values()], rows)


def markdown(record: Mapping[str, Any]) -> str:
    """Ratios by phase, then the counts of each kernel."""
    header = ["phase", "kernel", "blocks", "warps", "MFLOP tensor", "M warp instructions", "shared passes / fewest"]
    header += ["MB asked of L2", "sectors / fewest", "MB read", "MB written"]
    lines = [
        [
            phase,
            kernel["kernel"].removeprefix("ctk_"),
            str(kernel["blocks"]),
            str(kernel["warps"]),
            f"{kernel['matrix_flops'] / 1e6:.0f}",
            f"{kernel['warp_instructions'] / 1e6:.2f}",
            f"{kernel['shared_wavefronts'] / max(1, kernel['shared_ideal']):.2f}",
            f"{kernel['global_sectors'] * SECTOR / 1e6:.2f}",
            f"{kernel['global_sectors'] / max(1, kernel['global_ideal']):.2f}",
            f"{kernel['bytes_read'] / 1e6:.2f}",
            f"{kernel['bytes_written'] / 1e6:.2f}",
        ]
        for phase, kernels in record["architectures"][ARCHITECTURE].items()
        for kernel in kernels
    ]
    return f"The problem of `triton_counters.md`.\n\n{ratio_table(record)}\n\n{harness.table(header, lines)}"
