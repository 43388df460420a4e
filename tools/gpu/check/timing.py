"""How long a call takes: the device alone, with its L2 cache warm and cold, and the host.

On a GPU the device's time is that of a CUDA graph of the call, which runs without Python between the kernels. On the
CPU, where the check is only rehearsed, the call itself stands for its graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from tools.gpu.check.session import describe

Call = Callable[[], Any]
COLD_BYTES = 256 << 20  # more than the L2 cache of any GPU
WARM_REPLAYS = 20  # between two events, so that a launch from the host is a small part of it
HOST_CALLS = 20  # a GPU queues about a thousand launches before the host waits
ROUNDS = 15
KERNELS = 12  # of a call, the longest


def measure(call: Call, device: str) -> dict[str, Any]:
    """Microseconds of a call that has run before: `warm_us` and `cold_us`, replayed; `eager_us`, as called; `host_us`,
    until the call returns. On a GPU also what `profiled` finds, and `graph_launches`, the launches of a replay."""
    found: dict[str, Any] = {"host_us": host_us(call, device), "eager_us": spread(call, device, ROUNDS)}
    replay, keeper = call, None
    try:
        if device == "cuda":
            keeper = capture(call)
            replay = keeper.replay
        found |= replayed(replay, device)
    except Exception as error:  # what cannot be captured still runs eagerly
        found["graph_error"] = describe(error)
    if keeper is not None:
        replays = profiled(replay)
        found |= {"graph_launches": replays["launches"]} if "launches" in replays else replays
    return found | (profiled(call) if device == "cuda" else {})


def replayed(replay: Call, device: str) -> dict[str, float]:
    """Device time of a captured call, warm and L2-cold."""
    rounds = ROUNDS if device == "cuda" else 2
    repeats = WARM_REPLAYS if device == "cuda" else 1
    warm = spread(lambda: [replay() for _ in range(repeats)], device, rounds) / repeats
    # zeros are written over all of the L2 cache; meanwhile the host has enqueued the replay
    flush = torch.empty(COLD_BYTES if device == "cuda" else 1 << 12, dtype=torch.uint8, device=device)
    return {"warm_us": warm, "cold_us": spread(replay, device, rounds, before=flush.zero_)}


def spread(work: Call, device: str, rounds: int, before: Call | None = None) -> float:
    """Median microseconds, after one run that does not count."""
    times = []
    for _ in range((rounds if device == "cuda" else 2) + 1):
        if before is not None:
            before()
        times.append(harness.timed(work, device)[1])
    return 1e6 * statistics.median(times[1:])


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, after it ran on the side stream that a capture needs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def host_us(call: Call, device: str) -> float:
    """Microseconds until a call returns, the least of some runs; the GPU's queue is empty before and never full."""
    calls = HOST_CALLS if device == "cuda" else 1
    best = float("inf")
    for _ in range(5 if device == "cuda" else 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - started) / calls)
    synchronize(device)
    return 1e6 * best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def profiled(call: Call) -> dict[str, Any]:
    """What the GPU does in one call: `launches` (kernels, fills and copies), `device_us`, their sum, and `kernels`, the
    longest by name; or `profile_error`, since not every machine lets its GPU be profiled."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            call()
            torch.cuda.synchronize()
    except RuntimeError as error:
        return {"profile_error": describe(error)}
    times: dict[str, list[float]] = {}
    for event in record.events():
        if str(event.device_type).endswith("CUDA"):
            times.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
    longest = sorted(times, key=lambda name: -sum(times[name]))[:KERNELS]
    return {
        "launches": sum(map(len, times.values())),
        "device_us": sum(map(sum, times.values())),
        "kernels": {name: {"launches": len(times[name]), "us": round(sum(times[name]), 2)} for name in longest},
    }
