#!/usr/bin/env python3
"""The op against the same attention in PyTorch: eager, SDPA with a mask, compiled eager, FlexAttention.

    python benchmarks/bench_attention.py                  the main cases, about three minutes on two cores
    python benchmarks/bench_attention.py --full           all head shapes, prefix lengths, row lengths and batches
    python benchmarks/bench_attention.py --device cuda

First every peer's output and gradients are checked against the reference backend in fp64. Then all of them run in turn
in this process, and so does `torch.mm`, whose rate ours is compared with. A rate counts the arithmetic that the mask
keeps: 2 products forward, 5 backward. The peers' dense mask is built beforehand and not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch

from benchmarks import harness, peers
from benchmarks.cases import GPT2_LARGE, HEADLINE, QUICK, Case, Inputs, sweep

PHASES = {"both": "forward + backward", "forward": "forward", "backward": "backward"}
DEFAULT_PEERS = ("eager", "sdpa")
OURS, CEILING = "ctkernels", "ceiling"


def run_once(name: str, x: Inputs, dout: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], harness.Laps]:
    """One call, differentiated if the gradient of its output is given: the results, and seconds by phase."""
    x.require_grad(dout is not None)
    function = peers.ours if name == OURS else peers.PEERS[name]
    out, forward_s = harness.timed(lambda: function(x), x.device)
    if dout is None:
        return {"out": out}, {"forward": forward_s}
    values, backward_s = harness.timed(lambda: peers.results(out, x, dout), x.device)
    return values, {"forward": forward_s, "backward": backward_s, "both": forward_s + backward_s}


def usable(name: str, x: Inputs, backward: bool, expected: peers.Truth) -> dict[str, Any]:
    """Check a peer: whether it can run backward and its error, or the reason why it cannot run."""
    needed, free = peers.needed_bytes(name, x.case), harness.free_memory(x.device)
    if name != OURS and needed > free // 2:
        return {"reason": f"needs about {needed / 1e9:.1f} GB"}
    try:
        values, _ = run_once(name, x, expected.dout if backward else None)
    except RuntimeError as error:  # a peer that cannot differentiate here may still run forward
        if name == OURS:
            raise
        if not backward:
            return {"reason": first_line(error)}
        entry = usable(name, x, False, expected)
        return entry if "reason" in entry else {**entry, "reason_backward": first_line(error)}
    return {"backward": backward, "error": peers.check(name, values, expected, x.case.dtype)}


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    return str(error).strip().splitlines()[0][:200]


def measure(
    case: Case,
    names: Iterable[str] = DEFAULT_PEERS,
    *,
    backward: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    seconds: float = 3.0,
    ceiling: harness.MatrixProduct | None = None,
    others: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Check and time a case: ours, the peers of `names`, and `torch.mm`, in turn.

    Args:
        backward: False measures the forward pass alone.
        backend: the one of ours.
        seconds: about how long to measure.
        ceiling: `torch.mm` in the size to compare with; default: found here.
        others: more works to run in turn, by name (`harness.in_turn`).

    Returns:
        sizes, FLOPs by phase, and by name: times by phase, rates in FLOP/s, extra memory in bytes, the error, or the
        reason why it did not run.

    Raises:
        ArithmeticError: the results of one of them are wrong.
    """
    x = Inputs(case, device, backend)
    ceiling = ceiling or harness.MatrixProduct(case.dtype, device)
    expected = peers.truth(x)
    entries = {name: usable(name, x, backward, expected) for name in (OURS, *names)}
    del expected
    douts = {name: x.dout if entry["backward"] else None for name, entry in entries.items() if "backward" in entry}

    def call(name: str) -> tuple[dict[str, torch.Tensor], harness.Laps]:
        return run_once(name, x, douts[name])

    for name in douts:
        entries[name]["extra_bytes"] = harness.extra_memory(lambda name=name: call(name)[0].values(), device)
    works = {name: lambda name=name: call(name)[1] for name in douts}
    times = harness.in_turn({**works, CEILING: ceiling, **(others or {})}, seconds)
    for name in douts:
        entries[name]["times"] = times[name]
        entries[name]["rates"] = {
            phase: {"median": case.flops(phase) / spread.median, "best": case.flops(phase) / spread.best}
            for phase, spread in times[name].items()
        }
    top = times[CEILING]
    return {
        **asdict(case),
        "sizes": case.sizes,
        "flops": {phase: case.flops(phase) for phase in times[OURS]},
        "ceiling": {
            "dtype": ceiling.dtype,
            "median": ceiling.flops / top["mean"].median,
            "best": ceiling.flops / top["best"].best,
        },
        "others": {name: times[name]["both"] for name in others or ()},
        "entries": entries,
    }


def raise_ceilings(results: Sequence[dict[str, Any]]) -> None:
    """Set the best rate of `torch.mm` of each case to the best that was seen at any case: the machine is the same."""
    for ceiling in (result["ceiling"] for result in results):
        ceiling["best"] = max(r["ceiling"]["best"] for r in results if r["ceiling"]["dtype"] == ceiling["dtype"])


def relative_rate(result: dict[str, Any], phase: str, which: str) -> float:
    """Our rate divided by that of `torch.mm`, of medians or of the best runs."""
    return result["entries"][OURS]["rates"][phase][which] / result["ceiling"][which]


def ratio(entry: dict[str, Any], own: dict[str, Any], phase: str) -> str:
    """How many times as long as ours a peer takes."""
    return f"{entry['times'][phase].median / own['times'][phase].median:.1f}x"


def phase_table(results: Sequence[dict[str, Any]], phase: str, names: Sequence[str]) -> str:
    """One line per case: our time and rate, the peers' times; with `both` also the memory."""
    memory = phase == "both"
    header = ["case", "ctkernels ms", "GFLOP/s", "torch.mm GFLOP/s", "rate / torch.mm", "the same, best runs"]
    header += ["extra MB"] if memory else []
    for name in names:
        header += [f"{name} ms", "ratio", *(["extra MB"] if memory else [])]
    rows = []
    for result in results:
        own = result["entries"][OURS]
        line = [
            f"{result['name']} ({result['sizes']})",
            harness.milliseconds(own["times"][phase]),
            f"{own['rates'][phase]['median'] / 1e9:.0f}",
            f"{result['ceiling']['median'] / 1e9:.0f}",
            f"{relative_rate(result, phase, 'median'):.0%}",
            f"{relative_rate(result, phase, 'best'):.0%}",
        ]
        line += [harness.megabytes(own["extra_bytes"])] if memory else []
        for name in names:
            entry = result["entries"][name]
            if "times" not in entry:
                line += [entry["reason"], "", *([""] if memory else [])]
                continue
            line += [harness.milliseconds(entry["times"][phase]), ratio(entry, own, phase)]
            line += [harness.megabytes(entry["extra_bytes"])] if memory else []
        rows.append(line)
    return harness.table(header, rows)


def further_table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """One line per case and peer, for peers that ran only on some cases or in some phases."""
    header = ["case", "peer", "forward ms", "ratio", "forward + backward ms", "ratio", "extra MB", "why not"]
    rows = []
    for result in results:
        for name in names:
            entry = result["entries"].get(name)
            if entry is None:
                continue
            line = [f"{result['name']} ({result['sizes']})", name]
            for phase in ("forward", "both"):
                if phase in entry.get("times", {}):
                    own = result["entries"][OURS]
                    line += [harness.milliseconds(entry["times"][phase]), ratio(entry, own, phase)]
                else:
                    line += ["", ""]
            memory = harness.megabytes(entry["extra_bytes"]) if "extra_bytes" in entry else ""
            rows.append([*line, memory, entry.get("reason", entry.get("reason_backward", ""))])
    return harness.table(header, rows) if rows else ""


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """A table per phase, and one for the peers that did not run everywhere."""
    about = (
        "Milliseconds are medians and quartiles. GFLOP/s counts what the mask keeps. Rate / torch.mm: our rate divided "
        "by that of `torch.mm` on square matrices, run in turn (in bf16 for bf16 rows where the CPU multiplies bf16, "
        "else in fp32). It is a measure, not a limit, and may pass 100%. Extra MB: peak memory of forward and backward "
        "beyond inputs, results and the peers' mask."
    )
    everywhere = [
        name
        for name in peers.PEERS
        if all("reason_backward" not in result["entries"].get(name, {"reason_backward": 0}) for result in results)
    ]
    tables = [f"**{title}**\n\n{phase_table(results, phase, everywhere)}" for phase, title in PHASES.items()]
    further = further_table(results, [name for name in peers.PEERS if name not in everywhere])
    return "\n\n".join([about, *tables, *([f"**Further peers**\n\n{further}"] if further else [])])


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--full", action="store_true", help="the whole sweep, and every peer on every case")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 ...")
    parser.add_argument("--seconds", type=float, default=5.0, help="about how long to measure a case")
    parser.add_argument("--only", default="", help="cases whose name or sizes contain this")
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, help="default: eager and sdpa, and all of them once")
    args = parser.parse_args(argv)
    harness.prepare(args)
    machine = harness.describe_machine(args.device)
    print(harness.machine_line(machine), flush=True)
    results, ceilings = [], {}
    for case in [*HEADLINE, *(sweep() if args.full else QUICK)]:
        if args.only not in f"{case.name} {case.sizes}":
            continue
        names = args.peers
        if names is None:  # compiling takes longer than all the rest, so it is done for one case only
            names = tuple(peers.PEERS) if args.full or case == GPT2_LARGE else DEFAULT_PEERS
        if case.dtype not in ceilings:
            ceilings[case.dtype] = harness.MatrixProduct(case.dtype, args.device)
        ceiling = ceilings[case.dtype]
        results.append(measure(case, names, device=args.device, seconds=args.seconds, ceiling=ceiling))
        spread = results[-1]["entries"][OURS]["times"]["both"]
        share = relative_rate(results[-1], "both", "median")
        print(f"{case.name} ({case.sizes}): {harness.milliseconds(spread)} ms, {share:.0%} of torch.mm", flush=True)
    if not results:
        parser.error(f"no case contains {args.only!r}")
    raise_ceilings(results)
    harness.write_report("bench_attention", args, machine, results, markdown(results))


if __name__ == "__main__":
    main()
