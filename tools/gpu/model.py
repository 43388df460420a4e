"""A model of the time on GPUs that are not here, from the emulator's counters: predictions, to be checked against the
first measurement.

A kernel keeps the units of a multiprocessor busy, each with a documented rate: tensor cores, instruction issue, special
functions (exp2), shared memory, and its share of the L2 cache and of memory. It takes at least as long as the busiest
one, and at most as long as tensor cores and instruction issue one after the other, if the other units allow:

    fastest = max(tensor, issue, others) * tail + launch      slowest = max(tensor + issue, others) * tail + launch

where `tail` says how unevenly the blocks fall on the multiprocessors. A prediction is the geometric mean of both.
Counters were taken at one problem; another one of the same head dimension costs the same per (query, key) pair. The
peers' times follow from their dense arithmetic at a share of the tensor peak, and from the traffic of expanding,
joining and summing (`peer_seconds`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.bench_attention import OURS
from benchmarks.cases import FLOPS, Case

COUNTERS = Path(__file__).resolve().parent / "results" / "triton_counters.json"
LAUNCH = 3e-6  # seconds from one kernel of a CUDA graph to the next, with the tail of the first
SCHEDULERS = 4  # warp instructions per clock of a multiprocessor
PRODUCTS = 0.6  # of the tensor peak: the model's own matrix products in a step of some hundred tokens (an assumption)
SMALL_KERNELS = 60  # of a frozen layer, forward and backward, that only wait for their launch (an assumption)
SPECIAL_PER_CLOCK = 16  # exp2 and the like, of threads
SECTOR = 32


@dataclass(frozen=True)
class Device:
    """Rates of a GPU, from its data sheet; `l2` is what micro-benchmarks report.

    matrix_flops: of a multiprocessor per clock, 2-byte inputs.  memory, l2: bytes per second.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    matrix_flops: int
    memory: float
    l2: float

    @property
    def peak(self) -> float:
        return self.multiprocessors * self.clock * self.matrix_flops


DEVICES = (
    Device("A100", "sm_80", 108, 1.41e9, 2048, 1.9e12, 4.5e12),
    Device("H100", "sm_90", 132, 1.83e9, 4096, 3.2e12, 5.5e12),
)
H200 = replace(DEVICES[1], name="H200", memory=4.6e12)  # the H100's chip with other memory; not in the tables


@dataclass(frozen=True)
class Peer:
    """How a peer computes: its share of the tensor peak on the tiles that it visits, forward and backward; the queries
    that a tile holds at least; whether it skips tiles that the mask empties; whether it repeats keys for each head."""

    forward: float
    backward: float
    tile: int
    skips: bool
    repeats: bool


PEERS = {
    # the memory-efficient kernel: the only fused one that takes an arbitrary mask
    "sdpa": Peer(forward=0.35, backward=0.25, tile=64, skips=False, repeats=True),
    "flex": Peer(forward=0.50, backward=0.40, tile=128, skips=True, repeats=False),
}


def kernel_seconds(kernel: Mapping[str, Any], device: Device, scale: float = 1.0) -> tuple[float, float]:
    """Fastest and slowest time of one kernel whose counters are scaled by `scale`."""
    cores, clock = device.multiprocessors, device.clock
    tensor = kernel["matrix_flops"] * scale / device.peak
    issue = kernel["warp_instructions"] * scale / (SCHEDULERS * cores * clock)
    others = max(
        kernel["special"] * scale / (SPECIAL_PER_CLOCK * cores * clock),
        kernel["shared_wavefronts"] * scale / (cores * clock),
        kernel["global_sectors"] * SECTOR * scale / device.l2,
        (kernel["bytes_read"] + kernel["bytes_written"]) * scale / device.memory,
    )
    # work with too few blocks is cut into ranges until it fills the GPU
    blocks = max(float(cores), kernel["blocks"] * scale)
    tail = math.ceil(blocks / cores) * cores / blocks
    return max(tensor, issue, others) * tail + LAUNCH, max(tensor + issue, others) * tail + LAUNCH


def pairs(case: Case) -> int:
    """(query, key) pairs of all heads before any mask."""
    return case.B * case.H * case.S * (case.P + case.T)


def our_seconds(case: Case, phase: str, device: Device, record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Fastest and slowest time of ours; None where the counters say nothing about such a case."""
    counted = record["architectures"].get(device.architecture)
    like = record["problem"]
    if counted is None or (like["D"], like["dtype"]) != (case.D, str(case.dtype)):
        return None
    scale = pairs(case) / record["pairs"]
    phases = ("forward", "backward") if phase == "both" else (phase,)
    times = [kernel_seconds(kernel, device, scale) for name in phases for kernel in counted[name]]
    return sum(low for low, _ in times), sum(high for _, high in times)


def predict(case: Case, phase: str, device: Device, record: Mapping[str, Any]) -> float | None:
    """Geometric mean of the fastest and the slowest time of ours, in seconds."""
    bounds = our_seconds(case, phase, device, record)
    return None if bounds is None else math.sqrt(bounds[0] * bounds[1])


def peer_seconds(name: str, case: Case, phase: str, device: Device) -> float:
    """Time of a peer: arithmetic on the tiles it visits, then the traffic around it."""
    peer = PEERS[name]
    lines = -(-case.S // peer.tile) * peer.tile if case.S >= 16 else 16
    visited = case.P + case.T
    if peer.skips and case.segments:
        hidden = case.P // case.segments  # only whole blocks of 128 keys inside of the hidden span are skipped
        visited -= max(0, hidden // 128 - 1) * 128
    products = case.B * case.H * lines * visited * case.D
    size = case.dtype.itemsize
    heads = case.H if peer.repeats else case.Hk
    joined = 2 * case.B * (case.P + case.T) * case.D * size  # keys and values of one head
    mask = case.B * case.S * (case.P + case.T) * size * (1 if name == "flex" else case.H)
    # forward: write the joined keys (twice where heads are repeated), read them; backward: read them, write and sum up
    traffic = {"forward": (2 * case.Hk + heads) * joined + mask, "backward": (3 * heads + 2 * case.Hk) * joined + mask}
    kernels = {"forward": 4 if peer.repeats else 3, "backward": 8 if peer.repeats else 7}
    rates = {"forward": peer.forward, "backward": peer.backward}
    return sum(
        FLOPS[one] * products / (rates[one] * device.peak) + traffic[one] / device.memory + kernels[one] * LAUNCH
        for one in (("forward", "backward") if phase == "both" else (phase,))
    )


def crossover(name: str, case: Case, device: Device, record: Mapping[str, Any]) -> int | None:
    """The shortest rows for which a peer is predicted to be faster, on as many tokens; None if it never is."""
    tokens, S = case.B * case.S, 8
    while tokens >= S:
        other = replace(case, S=S, B=tokens // S, segments=min(case.segments, tokens // S))
        own = predict(other, "both", device, record)
        if own is not None and peer_seconds(name, other, "both", device) < own:
            return S
        S *= 2
    return None


def markdown(record: Mapping[str, Any], cases: Sequence[Case]) -> str:
    """Predictions for all cases that the model speaks of, per device, and the crossovers."""
    parts = [
        "A model, not a measurement. Milliseconds of forward and backward: ours from the fastest to the slowest that "
        "the counters allow, then the peers' and how many times ours (geometric mean) that is; `faster from` is the "
        "row length from which on a peer is predicted to be faster on as many tokens."
    ]
    for device in DEVICES:
        rows = []
        for case in cases:
            bounds = our_seconds(case, "both", device, record)
            if bounds is None:
                continue
            own = math.sqrt(bounds[0] * bounds[1])
            row = [f"{case.name} ({case.sizes})", f"{1e3 * bounds[0]:.3f}-{1e3 * bounds[1]:.3f}"]
            row.append(f"{case.flops('both') / own / 1e12:.0f}")
            for name in PEERS:
                seconds = peer_seconds(name, case, "both", device)
                longer = crossover(name, case, device, record)
                row += [f"{1e3 * seconds:.3f}", f"{seconds / own:.1f}x", "never" if longer is None else f"S={longer}"]
            rows.append(row)
        header = ["case", "ctkernels ms", "TFLOP/s kept"]
        header += [column for name in PEERS for column in (f"{name} ms", "ratio", "faster from")]
        parts.append(f"**{device.name}**\n\n" + harness.table(header, rows))
    return "\n\n".join(parts)


def load() -> dict[str, Any]:
    """The committed counters (`make gpu-report`)."""
    return json.loads(COUNTERS.read_text())


def device_of(gpu: str) -> Device | None:
    """The model of the GPU of that name, as torch reports it, or None."""
    return next((device for device in (*DEVICES, H200) if device.name in gpu), None)


def predicted_us(case: Case, backward: bool, gpu: str, name: str) -> dict[str, float]:
    """Predicted microseconds of ours or of a peer on a GPU, by phase; nothing where there is no model of them."""
    device, found = device_of(gpu), {}
    for phase in ("forward", "both") if backward else ("forward",):
        seconds = None
        if device is not None and name in PEERS:
            seconds = peer_seconds(name, case, phase, device)
        elif device is not None and name == OURS and COUNTERS.exists():
            seconds = predict(case, phase, device, load())
        if seconds is not None:
            found[phase] = 1e6 * seconds
    return found


def step_ms(case: Case, layers: int, weights: int, head: int, gpu: str) -> dict[str, float] | None:
    """Predicted milliseconds of the device in an optimiser step of a captured graph, by part and in all.

    Frozen layers multiply forward and to the gradient of their input, and read their weights twice; the head serves one
    token of each row and is limited by reading it twice; AdamW in fp32 reads four numbers and writes three for each one
    of the prefix, and clipping reads two and writes one.

    case: attention of one layer.  weights, head: numbers in all layers, and in the output head.
    """
    device = device_of(gpu)
    attention = predicted_us(case, True, gpu, OURS).get("both")
    if device is None or attention is None:
        return None
    size = case.dtype.itemsize
    products = 4 * case.B * case.S * weights / (PRODUCTS * device.peak)
    prefix = 2 * layers * case.Hk * case.P * case.D
    parts = {
        "attention": 1e-6 * layers * attention,
        "layers": max(products, 2 * size * weights / device.memory) + layers * SMALL_KERNELS * LAUNCH,
        "head": 2 * size * head / device.memory,
        "optimiser": 10 * 4 * prefix / device.memory,
    }
    return {name: 1e3 * seconds for name, seconds in {**parts, "step": sum(parts.values())}.items()}
