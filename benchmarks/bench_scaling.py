#!/usr/bin/env python3
"""How the op's time grows with prefix, rows, demonstrations and threads, and falls with what the mask hides.

    python benchmarks/bench_scaling.py            about three minutes on two cores
    python benchmarks/bench_scaling.py --full     more and larger points

Also: many-shot tuning (a long prefix for many rows), where memory is the question, and decoding (one query per row on
one shared prefix or on G of them), where the limit is either arithmetic or the reading of keys and values. SDPA with a
dense mask runs beside, wherever it fits into memory. Writes bench_scaling.json, .md and .png.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch

from benchmarks import harness, peers
from benchmarks.bench_attention import OURS, measure, raise_ceilings, ratio, reached
from benchmarks.cases import SMOLLM2, Case

PEER = "sdpa"
DEMONSTRATION = 48  # tokens
BASE = replace(SMOLLM2, name="scaling", segments=0, P=1024)
MANY_SHOT = replace(SMOLLM2, name="many-shot", B=64, P=32768, S=8, segments=0)
DECODING = replace(SMOLLM2, name="decoding", S=1, past=31, segments=0)


@dataclass(frozen=True)
class Sweep:
    """One quantity that varies: its values, and the case for each of them."""

    name: str
    values: tuple[float, ...]
    more: tuple[float, ...]  # with --full
    case: Callable[[Any], Case]


SWEEPS = (
    Sweep("prefix length P", (256, 1024, 4096, 16384), (32768,), lambda P: replace(BASE, P=P)),
    Sweep("rows B", (1, 4, 16, 64), (256,), lambda B: replace(BASE, B=B)),
    Sweep("hidden share", (0.0, 0.5, 0.9), (0.25, 0.75), lambda x: replace(BASE, hidden_share=x)),
    Sweep("drop_p", (0.0, 0.05, 0.5, 0.9), (0.25, 0.75), lambda p: replace(BASE, drop_p=p)),
    Sweep("demonstrations k", (4, 16, 64), (128,), lambda k: replace(BASE, B=k, segments=k, P=k * DEMONSTRATION)),
)


def thread_counts() -> list[int]:
    """1, 2, 4 ... up to the number of cores."""
    cores = os.cpu_count() or 1
    return sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})


def thread_sweep(seconds: float) -> list[dict[str, Any]]:
    """The base case by number of threads; the ceiling is that of as many threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            results.append({**measure(BASE, (PEER,), seconds=seconds), "x": threads})
    finally:
        torch.set_num_threads(before)
    return results


def decode(case: Case, device: str, seconds: float, ceiling: harness.MatrixProduct) -> dict[str, Any]:
    """Forward pass of a decoding case, with the two limits: arithmetic, and reading all keys and values once."""
    size = 2 * case.Hk * case.D * (case.G * case.P + case.B * case.T) * case.dtype.itemsize
    reading = harness.Reading(size, device)
    others = {"reading": reading}
    result = measure(case, (PEER,), backward=False, device=device, seconds=seconds, ceiling=ceiling, others=others)
    floors = {
        "arithmetic": result["flops"]["forward"] / result["ceiling"]["median"],
        "reading": result["others"]["reading"].median,
    }
    binds = max(floors, key=floors.get)
    time = result["entries"][OURS]["times"]["forward"].median
    return {**result, "bytes": size, "floors": floors, "binds": binds, "reached": floors[binds] / time}


def decoding_cases(full: bool) -> list[Case]:
    """One query per row: rows on one prefix, and on G of them."""
    shapes = [(1, 16384, 1), (16, 16384, 1), (256, 4096, 1), (64, 4096, 16)]
    shapes += [(1, 131072, 1), (256, 16384, 1), (256, 4096, 64)] if full else []
    cases = [replace(DECODING, B=B, P=P, G=G) for B, P, G in shapes]
    return [*cases, replace(DECODING, name="scoring", S=8, past=0, B=256, P=4096)]


def sweep_table(title: str, results: Sequence[dict[str, Any]]) -> str:
    """One line per value."""
    rows = []
    for result in results:
        own, peer = result["entries"][OURS], result["entries"][PEER]
        times = [entry["times"]["both"] if "times" in entry else None for entry in (own, peer)]
        kept = result["flops"]["both"] / 1e9
        rows.append(
            [
                f"{result['x']:g}",
                harness.milliseconds(times[0]),
                f"{kept:.2f}",
                f"{own['rates']['both']['median'] / 1e9:.0f}",
                f"{reached(result, 'both', 'median'):.0%}",
                f"{reached(result, 'both', 'best'):.0%}",
                harness.megabytes(own["extra_bytes"]),
                harness.milliseconds(times[1]) if times[1] else peer["reason"],
                ratio(peer, own, "both") if times[1] else "",
            ]
        )
    header = [title, "ms", "GFLOP kept", "GFLOP/s", "reached, median", "best", "extra MB", f"{PEER} ms", "ratio"]
    return harness.table(header, rows)


def decoding_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per case: the time, which limit binds, and how close it is."""
    rows = []
    for result in results:
        own, peer = result["entries"][OURS], result["entries"][PEER]
        rows.append(
            [
                f"{result['name']} ({result['sizes']})",
                harness.milliseconds(own["times"]["forward"]),
                *(f"{1e3 * result['floors'][limit]:.2f}" for limit in ("arithmetic", "reading")),
                result["binds"],
                f"{result['reached']:.0%}",
                harness.milliseconds(peer["times"]["forward"]) if "times" in peer else peer["reason"],
                ratio(peer, own, "forward") if "times" in peer else "",
            ]
        )
    limits = ["arithmetic limit ms", "reading limit ms", "binds", "limit / time"]
    return harness.table(["case", "forward ms", *limits, f"{PEER} ms", "ratio"], rows)


def many_shot_text(result: dict[str, Any]) -> str:
    """Time and memory of many-shot tuning, and what eager PyTorch would need."""
    own, case = result["entries"][OURS], MANY_SHOT
    eager = peers.needed_bytes("eager", case) / 1e9
    return (
        f"Many-shot ({result['sizes']}): forward and backward in {own['times']['both'].median:.2f} s, "
        f"{reached(result, 'both', 'median'):.0%} of the ceiling, with {harness.megabytes(own['extra_bytes'])} MB "
        f"beyond inputs and results; eager PyTorch would need about {eager:.0f} GB."
    )


def plot(path: Path, sweeps: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Time against each quantity, with quartiles, for us and the peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    figure, axes = pyplot.subplots(-(-len(sweeps) // columns), columns, figsize=(12, 7), layout="constrained")
    for axis in axes.flat[len(sweeps) :]:
        axis.remove()
    for axis, (name, results) in zip(axes.flat, sweeps.items(), strict=False):
        for label in (OURS, PEER):
            points = [(r["x"], r["entries"][label]["times"]["both"]) for r in results if "times" in r["entries"][label]]
            x, spreads = [p[0] for p in points], [p[1] for p in points]
            errors = [[1e3 * (s.median - s.q1) for s in spreads], [1e3 * (s.q3 - s.median) for s in spreads]]
            axis.errorbar(x, [1e3 * s.median for s in spreads], errors, marker="o", capsize=3, label=label)
        if all(isinstance(r["x"], int) for r in results):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
        else:
            axis.set_ylim(bottom=0)
        axis.set(xlabel=name, ylabel="forward + backward (ms)")
        axis.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="more and larger points")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 ...")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to measure a point")
    args = parser.parse_args(argv)
    harness.prepare(args)
    machine = harness.describe_machine(args.device)
    print(harness.machine_line(machine), flush=True)
    ceiling = harness.MatrixProduct(torch.float32, args.device)
    how = {"device": args.device, "seconds": args.seconds, "ceiling": ceiling}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for sweep in SWEEPS:
        values = sorted((*sweep.values, *(sweep.more if args.full else ())))
        sweeps[sweep.name] = [{**measure(sweep.case(value), (PEER,), **how), "x": value} for value in values]
        print(sweep.name, flush=True)
    many_shot = measure(MANY_SHOT, (), **how)
    decoding = [decode(case, args.device, args.seconds, ceiling) for case in decoding_cases(args.full)]
    raise_ceilings([many_shot, *decoding, *(result for results in sweeps.values() for result in results)])
    if torch.device(args.device).type == "cpu":
        sweeps["threads"] = thread_sweep(args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(args.out / "bench_scaling.png", sweeps)
    about = f"Base case: {BASE.sizes}; forward and backward; ceiling: PyTorch's matrix product, run in turn."
    tables = [sweep_table(name, results) for name, results in sweeps.items()]
    parts = [many_shot_text(many_shot), "**Decoding**", decoding_table(decoding), "**Sweeps**", about, *tables]
    text = "\n\n".join(parts)
    harness.write_report(
        "bench_scaling", args, machine, {"sweeps": sweeps, "many_shot": many_shot, "decoding": decoding}, text
    )


if __name__ == "__main__":
    main()
