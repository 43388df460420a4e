"""Stage bench: what the device can do at most, each attention problem on each backend and peer, and which backend is
faster by type and head dimension."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.bench_attention import OURS, run_once, usable
from benchmarks.cases import GEMMA, GPT2_LARGE, HEADLINE, LLAMA, QWEN, SMOLLM2, Case, Inputs
from tools.gpu import model
from tools.gpu.check import timing
from tools.gpu.check.smoke import BACKENDS, not_available, require_same_bits
from tools.gpu.cuda import dispatch as cuda_dispatch

PEERS = ("eager", "sdpa", "flex", "flash", "flash4")
BF16 = torch.bfloat16
CASES = (
    replace(LLAMA, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, token dropout", drop_p=0.05, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, P=4096", P=4096, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, long prefix", P=16384, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, many rows", B=64, dtype=BF16),
    replace(GPT2_LARGE, name="GPT-2 Large, bf16", dtype=BF16),
    replace(QWEN, dtype=BF16),
    replace(GEMMA, dtype=BF16),
    replace(SMOLLM2, dtype=BF16),
    replace(HEADLINE[2], dtype=BF16),
    replace(LLAMA, name="decoding", B=64, S=1, past=63, P=16384, segments=0, dtype=BF16),
    replace(LLAMA, name="decoding, one row", B=1, S=1, past=63, P=65536, segments=0, dtype=BF16),
    LLAMA,
    GPT2_LARGE,
)
TOY = Case("toy", B=2, H=2, Hk=1, S=3, P=20, D=16, segments=2)
TOYS = (TOY, replace(TOY, name="toy, token dropout", drop_p=0.2), replace(TOY, name="toy decoding", S=1, past=5))
COPY_BYTES = 1 << 30
DISPATCH_SECONDS = 0.5  # of measuring a type and head dimension on both backends


def jobs(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Ceilings, ours on all problems, then the peers, each on problems of the same shapes one after the other."""
    toys = device == "cpu"
    if toys:
        peers.COMPILER = "eager"
    cases = TOYS if toys else CASES
    shapes = sorted(cases, key=lambda case: cases.index(next(c for c in cases if shape(c) == shape(case))))
    found = {"ceilings": partial(ceilings, device)}
    found |= {key(case, name): partial(ours, case, name, device) for case in cases for name in BACKENDS[device]}
    if not toys:
        choices = {f"dispatch: {case.sizes}": partial(choose, case, device) for case in cuda_dispatch.CASES}
        found |= choices
    return found | {key(case, name): partial(peer, case, name, device) for name in PEERS for case in shapes}


def key(case: Case, name: str) -> str:
    return f"{name}: {case.name} ({case.sizes})"


def shape(case: Case) -> Case:
    """What a compiled peer is compiled for: everything but the values of the mask."""
    return replace(case, name="", segments=0, hidden_share=0.0, drop_p=0.0)


def ceilings(device: str) -> dict[str, Any]:
    """FLOP/s of torch's matrix product in fp32, TF32 and bf16, bytes/s of a copy, and the host's time of a launch."""
    toys = device == "cpu"
    if toys:
        harness.MatrixProduct.SIZES, harness.MatrixProduct.LAP = (64,), 1e-4
    products = {}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in (("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", BF16, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            product = harness.MatrixProduct(dtype, device)
            laps = [product() for _ in range(3)]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        mean, best = statistics.median(lap["mean"] for lap in laps), min(lap["best"] for lap in laps)
        products[name] = {"mean": product.flops / mean, "best": product.flops / best, "n": product.n}
    tiny = torch.zeros(1, device=device)
    return {
        "machine": harness.describe_machine(device),
        "matmul": products,
        "copy": copy_rate(device, COPY_BYTES >> 10 if toys else COPY_BYTES),
        "launch_us": timing.host_us(lambda: tiny.add_(1), device),
    }


def copy_rate(device: str, size: int) -> float:
    """Bytes per second that a copy reads and writes together, the best of ten."""
    source = torch.randn(max(1, size // 4), device=device)
    target = torch.empty_like(source)
    seconds = min(harness.timed(lambda: target.copy_(source), device)[1] for _ in range(10))
    return 2 * source.numel() * source.element_size() / seconds


def least_bytes(case: Case, phase: str) -> int:
    """Bytes that a phase reads and writes at least: every tensor once, nothing twice."""
    rows = case.B * case.H * case.S * case.D * case.dtype.itemsize  # q, out and their gradients
    own = 2 * case.B * case.Hk * case.T * case.D * case.dtype.itemsize
    prefix = 2 * case.G * case.Hk * case.P * case.D * case.dtype.itemsize
    lse = 4 * case.B * case.H * case.S
    forward = 2 * rows + own + prefix + lse
    backward = 4 * rows + 2 * own + 2 * prefix + lse
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def ours(case: Case, backend: str, device: str) -> dict[str, Any]:
    """One of our backends on a problem, with the predicted time.

    Raises:
        ArithmeticError: a wrong result, or two runs with different bits.
    """
    if missing := not_available(case, backend, device):
        return missing
    x = Inputs(case, device, backend)
    backward = trains(case)
    entry = usable(OURS, x, backward, peers.truth(x))
    require_same_bits(*(run_once(OURS, x, x.dout if backward else None)[0] for _ in range(2)))
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    sizes = {phase: (case.flops(phase), least_bytes(case, phase)) for phase in ("forward", "backward", "both")}
    return {
        **entry,
        **phases(OURS, x, backward),
        "flops": {phase: flops for phase, (flops, _) in sizes.items()},
        "least_bytes": {phase: size for phase, (_, size) in sizes.items()},
        "predicted_us": model.predicted_us(case, backward, gpu, OURS),
    }


def peer(case: Case, name: str, device: str) -> dict[str, Any]:
    """A peer on a problem, or why it does not run. It is compiled once for problems of one shape.

    Raises:
        ArithmeticError: a wrong result.
    """
    x = Inputs(case, device)
    backward = trains(case)
    compiled_for(shape(case))
    started = time.perf_counter()
    entry = usable(name, x, backward, peers.truth(x))
    if "reason" in entry:
        return entry
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    return {
        **entry,
        "first_call_s": time.perf_counter() - started,
        **phases(name, x, entry["backward"]),
        "predicted_us": model.predicted_us(case, backward, gpu, name),
    }


def trains(case: Case) -> bool:
    return case.past == 0


_compiled: list[Case] = []


def compiled_for(case: Case) -> None:
    """Forget what was compiled for other shapes: past a limit of recompilations, a peer would run uncompiled."""
    if _compiled[-1:] != [case]:
        torch._dynamo.reset()
        _compiled[:] = [case]


def phases(name: str, x: Inputs, backward: bool) -> dict[str, Any]:
    """`timing.measure` of the forward pass and of both passes, and `extra_bytes`, the memory that they need.

    The forward pass is that of a training step, which keeps what backward needs: one compiled function serves both.
    """
    x.require_grad(backward)
    function = peers.ours if name == OURS else peers.PEERS[name]

    def forward() -> Any:
        return function(x)

    def both() -> Any:
        return list(peers.results(function(x), x, x.dout).values())

    found = {"forward": timing.measure(forward, x.device)}
    if backward:
        found["both"] = timing.measure(both, x.device)
    found["extra_bytes"] = harness.extra_memory(both if backward else lambda: [forward()], x.device)
    return found


def choose(case: Case, device: str) -> dict[str, Any]:
    """Rows of `dispatch.json`: which of our GPU backends is faster on a type and head dimension."""
    reason = cuda_dispatch.refused(device)
    if reason is not None:
        return {"reason": f"no choice between the GPU backends ({reason})"}
    rows, failures = cuda_dispatch.measure(device, DISPATCH_SECONDS, (case,))
    return {"rows": rows, **({"failure": "; ".join(failures)} if failures else {})}
