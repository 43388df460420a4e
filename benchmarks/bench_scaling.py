#!/usr/bin/env python3
"""How the op's time grows with prefix, rows, demonstrations and threads, and falls with what the mask hides.

    python benchmarks/bench_scaling.py            about three minutes on two cores
    python benchmarks/bench_scaling.py --full     more and larger points

Also: many-shot tuning (a long prefix for many rows), where memory is the question, and decoding (one query per row on
one shared prefix or on G of them). Decoding is compared with two times: its arithmetic at the rate of `torch.mm`, and
one reading of all keys and values. SDPA with a dense mask runs beside, wherever it fits into memory. Writes
bench_scaling.json, .md and .png.
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
from benchmarks.bench_attention import OURS, measure, raise_ceilings, ratio, relative_rate
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
    """The base case by number of threads; `torch.mm` runs on as many threads."""
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
    """Forward pass of a decoding case, and two times: its arithmetic by `torch.mm`, and reading all keys and values."""
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
                f"{relative_rate(result, 'both', 'median'):.0%}",
                f"{relative_rate(result, 'both', 'best'):.0%}",
                harness.megabytes(own["extra_bytes"]),
                harness.milliseconds(times[1]) if times[1] else peer["reason"],
                ratio(peer, own, "both") if times[1] else "",
            ]
        )
    rates = ["GFLOP kept", "GFLOP/s", "rate / torch.mm", "the same, best runs"]
    return harness.table([title, "ms", *rates, "extra MB", f"{PEER} ms", "ratio"], rows)


def decoding_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per case: the time, the two that it is compared with, and the share of the longer one."""
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
    compared = ["arithmetic ms", "reading ms", "longer", "longer / time"]
    return harness.table(["case", "forward ms", *compared, f"{PEER} ms", "ratio"], rows)


def many_shot_text(result: dict[str, Any]) -> str:
    """Time and memory of many-shot tuning, and what eager PyTorch would need."""
    own, case = result["entries"][OURS], MANY_SHOT
    eager = peers.needed_bytes("eager", case) / 1e9
    return (
        f"Many-shot ({result['sizes']}): forward and backward in {own['times']['both'].median:.2f} s, "
        f"{relative_rate(result, 'both', 'median'):.0%} of the rate of `torch.mm`, with "
        f"{harness.megabytes(own['extra_bytes'])} MB beyond inputs and results; eager PyTorch would need about "
        f"{eager:.0f} GB."
    )


def markdown(results: dict[str, Any]) -> str:
    """Many-shot tuning, decoding, and a table per sweep."""
    about = f"Base case: {BASE.sizes}; forward and backward; `torch.mm` runs in turn."
    tables = [sweep_table(name, points) for name, points in results["sweeps"].items()]
    limits = "Arithmetic: what it takes at the rate of `torch.mm`. Reading: one `sum` over all keys and values."
    decoding = ["**Decoding**", limits, decoding_table(results["decoding"])]
    return "\n\n".join([many_shot_text(results["many_shot"]), *decoding, "**Sweeps**", about, *tables])


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
    results = {"sweeps": sweeps, "many_shot": many_shot, "decoding": decoding}
    harness.write_report("bench_scaling", args, machine, results, markdown(results))


if __name__ == "__main__":
    main()
