#!/usr/bin/env python3
"""Whether the defaults of CT-KV are near the best of a grid, on several models.

    python benchmarks/bench_defaults.py --models A B --tasks runs/reproduce/tasks --out runs/defaults

Rows: each learning rate of the grid with both objectives, the defaults as they are, and `auto` (what `ctkernels tune
--holdout auto` does, `methods/auto.py`). Tasks are folders of the pool that `make reproduce` writes (`--tasks`; without
it the shipped one). The best of the grid is taken by the *test* score: an oracle, which no user has. Cells are kept in
OUT/MODEL, and the same command continues. RESULTS/defaults.md and .json hold the tables.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

from benchmarks import harness
from ctkernels.cli import load_model
from ctkernels.cli.options import ModelOptions
from ctkernels.cli.view import SweepView
from ctkernels.tuning.data.suites import SuiteOptions, get_suite
from ctkernels.tuning.evaluation.sweep.report import Report, make_report
from ctkernels.tuning.evaluation.sweep.run import Sweep, run_sweep
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json

ROOT = Path(__file__).resolve().parent.parent
GRID = [f"ct-kv:objective={name}:lr={lr}" for name in ("options", "answers") for lr in ("1e-3", "3e-3", "1e-2", "3e-2")]
DEFAULT, AUTO = "ct-kv", "ct-kv:auto=true"
UNCUT = 1 << 20  # more tokens than any item has
POINTS = 0.02  # what the defaults may lose


def verdict(report: Report) -> str:
    """The best of the grid, and how far the defaults are from it, plain and calibrated."""
    lines = []
    for name in ("score", "calibrated"):
        values = {s.method: getattr(s, name) for s in report.summaries if getattr(s, name) is not None}
        grid = {method: value for method, value in values.items() if method not in (DEFAULT, AUTO)}
        if not grid:
            continue
        best = max(grid, key=grid.__getitem__)
        for method in (DEFAULT, AUTO):
            if method in values:
                gap = values[method] - grid[best]
                holds = "within" if gap >= -POINTS else "NOT within"
                lines.append(f"- {name}: `{method}` {100 * gap:+.1f} points from `{best}`, {holds} 2 points")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="directories or hub ids")
    parser.add_argument("--tasks", type=Path, help="folder of the tasks (default: the shipped ones)")
    parser.add_argument("--names", nargs="*", default=[], help="tasks (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[13])
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--limit", type=int, default=100, help="test items of each task")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "defaults", help="folder of the cells")
    parser.add_argument("--results", type=Path, help="folder of the report (default: OUT)")
    args = parser.parse_args(argv)

    suite, workers = get_suite("jsonl"), Workers()
    folder = suite.folder(args.tasks or ROOT / "examples" / "tasks")
    machine = harness.describe_machine("cpu")
    parts, record = [], {"machine": machine, "seeds": args.seeds, "shots": args.shots, "models": {}}
    for path in args.models:
        model, tokenizer = load_model(ModelOptions(path, args.dtype))
        name = Path(path).name
        sweep = Sweep(
            suite=suite,
            folder=folder,
            tasks=suite.pick_tasks(folder, args.names),
            specs=[MethodSpec.parse(word) for word in ("icl", *GRID, DEFAULT, AUTO)],
            seeds=args.seeds,
            out=args.out / name,
            limit=args.limit,
            options=SuiteOptions(args.shots),
            calibrate="batch",
            text_format={"delimiter": "\n", "max_pair_tokens": UNCUT},
        )
        with SweepView(sweep, workers) as view:
            results = run_sweep(model, tokenizer, sweep, workers, view)
        report = make_report(name, results, planned=len(sweep.tasks) * len(sweep.seeds))
        parts += [f"## {name}", report.overview(), verdict(report), report.by_task()]
        record["models"][name] = asdict(report)
    workers.close()
    if workers.rank > 0:
        return
    out = args.results or args.out
    head = f"# Defaults of CT-KV\n\n{args.shots} demonstrations, {args.dtype}. {harness.machine_line(machine)}"
    atomic_write_bytes(out / "defaults.md", ("\n\n".join([head, *parts]) + "\n").encode())
    atomic_write_json(out / "defaults.json", record)
    print("\n\n".join([head, *parts]))


if __name__ == "__main__":
    main()
