#!/usr/bin/env python3
"""The papers' table on your model and tasks: all methods, the ablation of CT-KV, time per epoch against k.

    make reproduce                                                a shipped task, at most half an hour on two cores
    make reproduce DATA=FOLDER TASKS="sick qasc" SEEDS="13 21"    tasks in the MetaICL layout
    make reproduce DATA=FOLDER FULL=1                             16 demonstrations, all tasks, two seeds: many hours

1. tune      every method gets the same number of candidate settings. They are compared on the *validation* items, with
             demonstrations of a seed that is not tested; the lowest mean loss of the correct answer wins.
2. test      the chosen settings on the test items; CT-KV also without leave-one-out, token dropout, or both.
3. scaling   time per epoch of ct-kv, ct-prompt and ttt with k = 2, 4, ... demonstrations.

Everything is kept in OUT, cell by cell: the same command continues a run that was stopped, so that a long one can be
run in pieces, or shared among processes with torchrun. At the end RESULTS/reproduce.md, .json and figures are written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import harness, reproduce_scaling
from ctkernels.cli import load_model
from ctkernels.cli.options import ModelOptions
from ctkernels.cli.view import SweepView
from ctkernels.tuning.data.suites import SuiteOptions, get_suite
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.figures import plot_bars, plot_time
from ctkernels.tuning.evaluation.sweep.report import Report, make_report
from ctkernels.tuning.evaluation.sweep.run import Sweep, run_sweep
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
from ctkernels.tuning.train.distributed import local_device

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 100  # its demonstrations choose the settings, and are never tested
MASKS = {  # of CT-KV: what is hidden from a row, and how many of the other tokens are dropped
    "both": "leave_one_out=self:drop_p=0.05",
    "leave-one-out alone": "leave_one_out=self:drop_p=0",
    "token dropout alone": "leave_one_out=none:drop_p=0.05",
    "neither": "leave_one_out=none:drop_p=0",
}
# Learning rates to try: random tokens need larger steps than demonstrations, and weights smaller ones than both
RATES = {
    "prompt-tuning": ("lr=3e-3", "lr=1e-2", "lr=3e-2", "lr=1e-1"),
    "prefix-tuning": ("lr=3e-3", "lr=1e-2", "lr=3e-2", "lr=1e-1"),
    "ct-prompt": ("lr=1e-3", "lr=3e-3", "lr=1e-2", "lr=3e-2"),
    "ct-kv": ("lr=1e-3", "lr=3e-3", "lr=1e-2", "lr=3e-2"),
    "ttt": ("lr=1e-4", "lr=3e-4", "lr=1e-3", "lr=3e-3"),
    "ttt+ct-kv": ("ttt_lr=1e-4:lr=3e-3", "ttt_lr=3e-4:lr=3e-3", "ttt_lr=1e-3:lr=3e-3", "ttt_lr=3e-3:lr=3e-3"),
}
UNTRAINED = ("zero-shot", "icl")


@dataclass(frozen=True)
class Plan:
    """How much is run.

    shots: demonstrations of a task.  limit: test items of a task; None takes all.  seeds: of the test.
    lengths: method -> epochs, each tried with every learning rate; equally many for all methods.
    tuning_tasks: how many tasks choose the settings.  most_tasks: how many are tested; None takes all.
    shot_counts: k of the scaling.  most_seconds: a method's k stops growing when an epoch would take longer.
    """

    shots: int
    limit: int | None
    seeds: tuple[int, ...]
    lengths: dict[str, tuple[str, ...]]
    tuning_tasks: int
    most_tasks: int | None
    shot_counts: tuple[int, ...]
    most_seconds: float

    def candidates(self, method: str) -> list[MethodSpec]:
        """The settings that are tried for a method."""
        mask = f":{MASKS['both']}" if method in ("ct-kv", "ttt+ct-kv") else ""
        words = [f"{method}:{rate}:{length}{mask}" for length in self.lengths[method] for rate in RATES[method]]
        return [MethodSpec.parse(word) for word in words]


QUICK = Plan(
    shots=8,
    limit=100,
    seeds=(13,),
    lengths={
        "prompt-tuning": ("epochs=15",),
        "prefix-tuning": ("epochs=20",),
        "ct-prompt": ("epochs=5",),
        "ct-kv": ("epochs=20",),
        "ttt": ("epochs=4",),
        "ttt+ct-kv": ("ttt_epochs=4:epochs=8",),
    },
    tuning_tasks=1,
    most_tasks=2,
    shot_counts=(2, 4, 8, 16, 32, 64),
    most_seconds=30,
)
FULL = Plan(
    shots=16,
    limit=None,
    seeds=(13, 21),
    lengths={
        "prompt-tuning": ("epochs=20", "epochs=40"),
        "prefix-tuning": ("epochs=25", "epochs=50"),
        "ct-prompt": ("epochs=5", "epochs=10"),
        "ct-kv": ("epochs=15", "epochs=30"),
        "ttt": ("epochs=4", "epochs=8"),
        "ttt+ct-kv": ("ttt_epochs=4:epochs=8", "ttt_epochs=8:epochs=8"),
    },
    tuning_tasks=2,
    most_tasks=None,
    shot_counts=(2, 4, 8, 16, 32, 64),
    most_seconds=600,
)


@dataclass(frozen=True)
class Setting:
    """Where it runs: the model, the suite's folder, the tasks, the processes, and where results go."""

    workers: Workers
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    suite: str
    folder: Path | None
    tasks: Sequence[str]
    out: Path
    plan: Plan

    def sweep(self, specs: Sequence[MethodSpec], **others: Any) -> Sweep:
        """A sweep over the tasks with the plan's sizes."""
        suite, options = get_suite(self.suite), SuiteOptions(self.plan.shots)
        asked = {"tasks": self.tasks, "seeds": self.plan.seeds, "limit": self.plan.limit, **others}
        return Sweep(suite=suite, folder=self.folder, specs=specs, options=options, **asked)

    def run(self, sweep: Sweep) -> list[CellResult]:
        """The results of a sweep, computed where they are missing."""
        with SweepView(sweep, self.workers) as view:
            return run_sweep(self.model, self.tokenizer, sweep, self.workers, view)


def choose(setting: Setting) -> tuple[dict[str, MethodSpec], list[dict[str, Any]]]:
    """The best candidate of every method by the mean validation loss of the correct answer, and all that were tried."""
    plan, chosen, tried = setting.plan, {}, []
    for method in plan.lengths:
        sweep = setting.sweep(
            plan.candidates(method),
            out=setting.out / "tuning",
            split="validation",
            seeds=(TUNING_SEED,),
            tasks=setting.tasks[: plan.tuning_tasks],
        )
        report = make_report(method, setting.run(sweep), planned=len(sweep.tasks))
        if not report.summaries:
            sys.exit(f"no candidate of {method} has a result: {'; '.join(report.failures)}")
        best = min(report.summaries, key=lambda s: s.gold_loss)
        chosen[method] = MethodSpec.parse(best.method)
        tried += [{**asdict(s), "chosen": s is best} for s in report.summaries]
    return chosen, tried


def test(setting: Setting, chosen: dict[str, MethodSpec]) -> tuple[Report, Report]:
    """The report of all methods with their chosen settings, and that of the ablation, on the test items."""
    main = [MethodSpec(name) for name in UNTRAINED] + list(chosen.values())
    ablation = {label: _masked(chosen["ct-kv"], mask) for label, mask in MASKS.items()}
    specs = list(dict.fromkeys([*main, *ablation.values()]))
    sweep = setting.sweep(specs, out=setting.out / "test")
    results = setting.run(sweep)
    cells = len(sweep.tasks) * len(sweep.seeds)
    names = {str(spec): spec.name for spec in main}
    labels = {str(spec): label for label, spec in ablation.items()}
    renamed = [[replace(r, method=by[r.method]) for r in results if r.method in by] for by in (names, labels)]
    return make_report("All methods", renamed[0], cells), make_report("Ablation", renamed[1], cells)


def _masked(spec: MethodSpec, mask: str) -> MethodSpec:
    """A method with another mask; the label is that of the main table where the mask is the same."""
    overrides = {**spec.overrides, **MethodSpec.parse(f"{spec.name}:{mask}").overrides}
    return MethodSpec(spec.name, overrides)


def markdown(
    record: dict[str, Any], methods: Report, ablation: Report, tried: Sequence[dict[str, Any]], scaling: str
) -> str:
    """The whole result as one page."""
    candidates = [
        (f"**{c['method']}**" if c["chosen"] else c["method"], f"{c['gold_loss']:.3f}", f"{100 * c['score']:.1f}")
        for c in tried
    ]
    failures = dict.fromkeys([*methods.failures, *ablation.failures])
    parts = [
        "# Reproduction",
        f"`{record['command']}`, commit {record['commit']}\n\n{harness.machine_line(record['machine'])}",
        f"{record['model']}, {record['shots']} demonstrations; tasks: {', '.join(record['tasks'])}",
        "## Methods",
        methods.overview(),
        "![score against time](reproduce_time.png)",
        methods.pairs(),
        "## Ablation of CT-KV",
        ablation.overview(),
        "![ablation](reproduce_ablation.png)",
        ablation.pairs(),
        "## Time per epoch",
        scaling,
        "![time per epoch](reproduce_scaling.png)",
        "## How the settings were chosen",
        harness.table(("candidate", "validation loss of the correct answer", "validation score"), candidates),
        f"The same number of candidates for every method, on validation items with the demonstrations of seed "
        f"{TUNING_SEED}; the lowest loss (bold) was tested. Tasks: {', '.join(record['tuning_tasks'])}.",
        methods.by_task(),
    ]
    if failures:
        parts += ["## Cells without a result", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join(parts) + "\n"


def summary(
    record: dict[str, Any], methods: Report, ablation: Report, points: Sequence[reproduce_scaling.Point]
) -> str:
    """The three tables for a page of documentation."""
    where = f"{record['model']}, {record['shots']} demonstrations; {harness.machine_line(record['machine'])}"
    tables = (methods.overview(), ablation.overview(), reproduce_scaling.markdown(points))
    return "\n\n".join([f"`{record['command']}`, commit {record['commit']}: {where}", *tables])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--data", type=Path, help="folder of the suite's files (default: the shipped tasks)")
    parser.add_argument("--suite", help="layout of the files (default: nlp_lr with --data, jsonl without)")
    parser.add_argument("--tasks", nargs="*", default=[], help="tasks (default: the first two; with --full all)")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds of the test (default: 13; with --full 13 and 21)")
    parser.add_argument("--most-seconds", type=float, help="no k whose epoch would be longer (default: 30; full: 600)")
    parser.add_argument("--full", action="store_true", help="16 demonstrations, all tasks, two seeds")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reproduce", help="folder of the cells")
    parser.add_argument("--results", type=Path, help="folder of the report and figures (default: OUT)")
    parser.add_argument("--docs", type=Path, help="also replace the tables between the markers of this page")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)

    plan = FULL if args.full else QUICK
    if args.seeds:
        plan = replace(plan, seeds=tuple(args.seeds))
    if args.most_seconds:
        plan = replace(plan, most_seconds=args.most_seconds)
    if TUNING_SEED in plan.seeds:
        parser.error(f"argument --seeds: the demonstrations of {TUNING_SEED} choose the settings and are not tested")
    suite = get_suite(args.suite or ("nlp_lr" if args.data else "jsonl"))
    folder = suite.folder(args.data or ROOT / "examples" / "tasks")
    tasks = suite.pick_tasks(folder, args.tasks)[: None if args.tasks else plan.most_tasks]
    machine = harness.describe_machine(args.device)
    workers = Workers()
    model, tokenizer = load_model(ModelOptions(args.model, args.dtype, local_device(args.device)))
    out = args.out / ("full" if args.full else "quick") / Path(args.model).name
    results = args.results or out
    setting = Setting(workers, model, tokenizer, suite.name, folder, tasks, out, plan)

    chosen, tried = choose(setting)
    main_report, ablation = test(setting, chosen)
    workers.close()
    if workers.rank > 0:
        return
    points = reproduce_scaling.measure(setting, {name: chosen[name] for name in reproduce_scaling.METHODS})
    record = {
        "command": _command(args),
        "commit": _commit(),
        "machine": machine,
        "model": args.model,
        "shots": plan.shots,
        "seeds": list(plan.seeds),
        "tasks": list(tasks),
        "tuning_tasks": list(tasks[: plan.tuning_tasks]),
        "plan": asdict(plan),
        "candidates": tried,
        "methods": asdict(main_report),
        "ablation": asdict(ablation),
        "scaling": [asdict(point) for point in points],
    }
    text = markdown(record, main_report, ablation, tried, reproduce_scaling.markdown(points))
    atomic_write_json(results / "reproduce.json", record)
    atomic_write_bytes(results / "reproduce.md", text.encode())
    # on a CPU against CPU time, which other programs do not lengthen
    plot_time(main_report.summaries, results / "reproduce_time.png", cpu=args.device == "cpu")
    plot_bars({"": ablation.summaries}, results / "reproduce_ablation.png")
    reproduce_scaling.plot(points, results / "reproduce_scaling.png")
    if args.docs:
        harness.replace_between_markers(args.docs, "reproduce", summary(record, main_report, ablation, points))
    print(text)


def _command(args: argparse.Namespace) -> str:
    """The make command that repeats this run, without the folder of the data, which differs between machines."""
    words = ["DATA=FOLDER"] if args.data else []
    words += [f'TASKS="{" ".join(args.tasks)}"'] if args.tasks else []
    words += [f'SEEDS="{" ".join(map(str, args.seeds))}"'] if args.seeds else []
    words += [f"MOST_SECONDS={args.most_seconds:g}"] if args.most_seconds else []
    return " ".join(["make reproduce", *words, *(["FULL=1"] if args.full else [])])


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
