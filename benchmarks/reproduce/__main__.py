"""The papers' table on your model and tasks: all methods with the same seconds, the ablation, accuracy against k.

    make reproduce                                       the shipped task, one seed: less than an hour on two cores
    make reproduce DATA=FOLDER SEEDS="13 21 42 87 100"   all tasks of FOLDER/{nlp_lr,bbh,mmlu} that the rule takes: days

1. pool      every task's public items, once each, split into demonstrations, validation and test (`pool.py`).
2. screen    tasks on which in-context learning is above the majority class, on validation items (`screen.py`).
3. choose    every method gets the same number of candidates and the same CPU seconds (`lengths.py`). They are compared
             on validation items, with demonstrations of a seed that is not tested: the lowest NLL over options wins.
4. test      the chosen settings on the test items; CT-KV also with half the time (`stages.py`).
5. ablation  CT-KV without leave-one-out, token dropout, or both.
6. shots     accuracy and seconds per epoch against the number of demonstrations (`shots.py`).

Everything is kept in OUT, cell by cell: the same command continues a run that was stopped, and torchrun shares it among
processes. `--report` computes nothing and reports what is there. RESULTS gets reproduce_MODEL.md, .json and figures.
"""

from __future__ import annotations

import argparse
import subprocess
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.reproduce import pool, report, screen, shots, stages
from benchmarks.reproduce.plan import DRAWS, Plan, Setting
from ctkernels.cli import load_model
from ctkernels.cli.options import ModelOptions
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.train.distributed import folder_of_run, local_device

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("screen", "choose", "test", "ablation", "shots")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--data", type=Path, help="folder with nlp_lr, bbh and mmlu (default: the shipped task alone)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[13], help="seeds of the test (default: 13)")
    parser.add_argument("--budget", type=float, default=20.0, help="CPU seconds of tuning per task (default: 20)")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--report", action="store_true", help="compute nothing, report what is there")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "reproduce", help="folder of the cells")
    parser.add_argument("--results", type=Path, help="folder of the report and figures (default: OUT)")
    parser.add_argument("--docs", type=Path, help="also replace the tables between the markers of this page")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    if set(args.seeds) & set(DRAWS):
        parser.error(f"argument --seeds: the demonstrations of {DRAWS} choose tasks and settings and are not tested")
    if not args.budget > 0:
        parser.error(f"argument --budget must be above 0, got {args.budget:g}")
    name = Path(args.model).name + ("" if args.data else "-shipped")
    if args.docs and f"<!-- reproduce {name} -->" not in args.docs.read_text():
        parser.error(f"argument --docs: {args.docs} must hold the markers <!-- reproduce {name} --> and its end")

    machine, workers = harness.describe_machine(args.device), Workers()
    tasks = "tasks" if args.data else "tasks-shipped"
    if workers.rank == 0 and not args.report:
        pool.make_pool(args.data, ROOT / "examples" / "tasks", args.out / tasks)
    workers.wait()
    model, tokenizer = load_model(ModelOptions(args.model, args.dtype, local_device(args.device)))
    plan = replace(Plan(), seeds=tuple(args.seeds), budget=args.budget)
    out = args.out / name
    setting = Setting(workers, model, tokenizer, args.out / tasks, out, plan, args.report)
    with nullcontext() if args.report else folder_of_run(out):
        found = run(setting, STAGES[: STAGES.index(args.until) + 1])
    workers.close()
    if workers.rank > 0:
        return
    about = {
        "command": _command(args),
        "commit": _commit(),
        "machine": machine,
        "name": name,
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "plan": asdict(plan),
    }
    text = report.write(found, about, args.results or out, args.docs)
    print(text)


def run(setting: Setting, wanted: tuple[str, ...]) -> report.Found:
    """The results of some stages, each computed as far as it is not there."""
    names = sorted(path.parent.name for path in setting.folder.glob("*/train.jsonl"))
    found = report.Found(screen.screen(setting, names))
    tasks = [one.task for one in found.screened if one.taken]
    if "choose" in wanted:
        found.chosen, found.tried = stages.choose(setting, tasks)
        found.tuning_tasks = stages.tuning_tasks(tasks)
        if not found.chosen:
            return found
    if "test" in wanted:
        found.test = stages.test(setting, tasks, found.chosen)
    if "ablation" in wanted:
        found.ablation = stages.ablation(setting, tasks, found.chosen)
    if "shots" in wanted:
        found.points = shots.measure(setting, tasks, found.chosen)
    return found


def _command(args: argparse.Namespace) -> str:
    """The make command that repeats this run, without the folders of data and model, which differ between machines."""
    words: dict[str, Any] = {
        "DATA": "FOLDER" if args.data else None,
        "MODEL": Path(args.model).name,
        "DTYPE": args.dtype,
        "SEEDS": '"' + " ".join(map(str, args.seeds)) + '"',
        "BUDGET": f"{args.budget:g}",
    }
    return " ".join(["make reproduce", *(f"{name}={value}" for name, value in words.items() if value)])


def _commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
