"""What the kernels of a call execute, counted by the emulator, beside the least that the call needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks import harness
from benchmarks.cases import FLOPS
from ctkernels import ContextMask
from ctkernels.backends.triton.launch import Launch
from tools.gpu import problems
from tools.gpu.architectures import ARCHITECTURES, Architecture
from tools.gpu.problems import Sizes
from tools.gpu.triton import aot, plans
from tools.gpu.triton.emulate import Emulator

SHARE = 4  # the problem is this part of a layer's heads, planned for this part of a GPU
PROBLEM = Sizes(
    "a quarter of Llama-3.2-1B's layer",
    lens=(31, 24, 40, 36, 19, 33, 28, 45, 22, 37, 30, 26, 41, 17, 35, 48),
    H=8,
    Hk=2,
    P=1024,
    D=64,
    dtype=torch.bfloat16,
    prefix_dtype=torch.float32,
    segments=16,
    drop_p=0.05,
)
COUNTED = ("sm_80", "sm_90")  # the emulator knows the instructions of these
MMA_FLOPS = 4096  # of one m16n8k16, the tensor-core instruction that all others are counted in
SECTOR = 32
TENSOR = ("mma", "wgmma")


def kept_pairs(sizes: Sizes) -> int:
    """(query, key) pairs of one head that the mask and causality keep."""
    mask = ContextMask(hidden=sizes.hidden, drop_p=sizes.drop_p, seed=1)
    seen = mask.dense(len(sizes.lens), sizes.P).sum(1).tolist()
    own = [n * sizes.past + n * (n + 1) // 2 for n in sizes.lens]
    return sum(context * n + pairs for context, n, pairs in zip(seen, sizes.lens, own, strict=True))


def all_pairs(sizes: Sizes) -> int:
    """(query, key) pairs of all heads before any mask."""
    return sizes.H * sum(n * (sizes.P + sizes.past + n) for n in sizes.lens)


def kept_flops(sizes: Sizes, phase: str) -> int:
    return FLOPS[phase] * sizes.D * sizes.H * kept_pairs(sizes)


def least_bytes(sizes: Sizes, phase: str) -> int:
    """Every input read once, every result written once."""
    size, prefix_size = sizes.dtype.itemsize, (sizes.prefix_dtype or sizes.dtype).itemsize
    tokens = sum(sizes.lens)
    rows = tokens * sizes.H * sizes.D * size
    own = 2 * (tokens + len(sizes.lens) * sizes.past) * sizes.Hk * sizes.D * size
    prefix = 2 * sizes.Hk * sizes.P * sizes.D
    lse = 4 * tokens * sizes.H
    if phase == "forward":
        return 2 * rows + own + prefix * prefix_size + lse
    # q, out, dout and dq; own keys and values with their gradients; prefix with its gradient
    return 4 * rows + 2 * own + 2 * prefix * prefix_size + lse


def count(launches: Sequence[Launch], architecture: Architecture, workers: int | None = None) -> list[dict[str, Any]]:
    """Run launches in the emulator: one record each. Numbers of instructions are of warps, `special` of threads."""
    records = []
    for launch in launches:
        emulator = Emulator(architecture, check=False, counters=True, workers=workers)
        emulator(launch)
        (name, counted), needs = emulator.counted[0], aot.resources(launch, architecture)
        instructions = {kind: n / 32 for kind, n in sorted(counted.instructions.items())}
        records.append(
            {
                "kernel": name,
                "blocks": _volume(launch.grid),
                "warps": needs.warps,
                "blocks_per_multiprocessor": architecture.blocks(needs.registers, needs.shared, needs.warps),
                "matrix_flops": counted.matrix_flops,
                "warp_instructions": counted.total_instructions / 32,
                "instructions": instructions,
                "special": counted.instructions.get("special_function", 0),
                "shared_wavefronts": counted.shared_wavefronts,
                "shared_ideal": counted.shared_ideal,
                "global_sectors": counted.global_sectors,
                "global_ideal": counted.global_ideal,
                "bytes_read": counted.global_bytes_read,
                "bytes_written": counted.global_bytes_written,
                "atomics": counted.atomics,
            }
        )
    return records


def _volume(grid: Sequence[int]) -> int:
    product = 1
    for n in grid:
        product *= n
    return product


def ratios(kernels: Sequence[Mapping[str, Any]], sizes: Sizes, phase: str) -> dict[str, float]:
    """The figures of a phase, or of one of its kernels: what is executed over what is needed.

    tile_waste: tensor-core FLOPs over those that the mask keeps.  traffic: bytes that kernels read and write, each byte
    once per kernel, over the least of the phase.  requests: sectors asked of the L2 cache, over the same.
    coalescing: sectors over the fewest that hold the same bytes.  bank_conflicts: passes over the banks of shared
    memory over those without conflicts.  instructions: all others per tensor-core instruction (of 4096 FLOPs).
    """
    total = {name: sum(kernel[name] for kernel in kernels) for name in kernels[0] if _is_number(kernels[0][name])}
    tensor = sum(kernel["instructions"].get(kind, 0) for kernel in kernels for kind in TENSOR)
    products = total["matrix_flops"] / MMA_FLOPS
    return {
        "tile_waste": total["matrix_flops"] / kept_flops(sizes, phase),
        "traffic": (total["bytes_read"] + total["bytes_written"]) / least_bytes(sizes, phase),
        "requests": total["global_sectors"] * SECTOR / least_bytes(sizes, phase),
        "coalescing": total["global_sectors"] / max(1, total["global_ideal"]),
        "bank_conflicts": total["shared_wavefronts"] / max(1, total["shared_ideal"]),
        "instructions": (total["warp_instructions"] - tensor) / products if products else 0.0,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def measure(sizes: Sizes = PROBLEM, names: Sequence[str] = COUNTED) -> dict[str, Any]:
    """The table: the problem, its pairs, and per architecture and phase the kernels' records and ratios."""
    architectures = {}
    inputs = problems.make(sizes)
    for name in names:
        architecture = ARCHITECTURES[name]
        architecture = replace(architecture, multiprocessors=architecture.multiprocessors // SHARE)
        forward = plans.forward(inputs, architecture)
        counted = {"forward": count(forward.launches, architecture)}
        backward = plans.backward(inputs, *forward.outputs, architecture)
        counted["backward"] = count(backward.launches, architecture)
        architectures[name] = counted
    return {
        "problem": {**asdict(sizes), "dtype": str(sizes.dtype), "prefix_dtype": str(sizes.prefix_dtype)},
        "pairs": all_pairs(sizes),
        "kept_pairs": sizes.H * kept_pairs(sizes),
        "ratios": {
            name: {phase: ratios(kernels, sizes, phase) for phase, kernels in counted.items()}
            for name, counted in architectures.items()
        },
        "architectures": architectures,
    }


def ratio_table(record: Mapping[str, Any]) -> str:
    """What is executed over what is needed, by architecture and phase."""
    names = {
        "tile_waste": "tensor FLOPs / kept by the mask",
        "traffic": "bytes of memory / least",
        "requests": "bytes asked of L2 / least",
        "coalescing": "sectors / fewest",
        "bank_conflicts": "bank passes / conflict-free",
        "instructions": "other instructions per tensor instruction",
    }
    rows = [
        [name, phase, *(f"{figures[key]:.2f}" for key in names)]
        for name, phases in record["ratios"].items()
        for phase, figures in phases.items()
    ]
    return harness.table(["", "phase", *names.values()], rows)


def markdown(record: Mapping[str, Any]) -> str:
    """Ratios by phase, then the counts of each kernel."""
    problem = record["problem"]
    about = (
        f"1/{SHARE} of a layer's heads, planned for 1/{SHARE} of the multiprocessors: {len(problem['lens'])} rows "
        f"of {min(problem['lens'])} to {max(problem['lens'])} tokens, "
        f"H={problem['H']} Hk={problem['Hk']} P={problem['P']} D={problem['D']}, {problem['segments']} segments, each "
        f"left out by one row, drop_p={problem['drop_p']}, {problem['dtype']} with a {problem['prefix_dtype']} prefix. "
        "A tensor instruction is counted in units of 4096 FLOPs, one m16n8k16."
    )
    header = ["", "phase", "kernel", "blocks", "warps", "MFLOP tensor", "M warp instructions", "shared passes / fewest"]
    header += ["MB asked of L2", "sectors / fewest", "MB read", "MB written"]
    kernels = [
        [
            name,
            phase,
            kernel["kernel"],
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
        for name, phases in record["architectures"].items()
        for phase, launches in phases.items()
        for kernel in launches
    ]
    return "\n\n".join([about, ratio_table(record), harness.table(header, kernels)])
