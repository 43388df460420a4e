#!/usr/bin/env python3
"""Seconds per task of CT-KV: G tasks tuned at once (`tune_many`), and the same ones one after the other (`tune`).

    python benchmarks/bench_many.py --model .models/smollm2-135m                    about half an hour on two cores
    python benchmarks/bench_many.py --model MODEL --device cuda --dtype bfloat16

Every task has demonstrations of its own, drawn from the shipped task, and so a prefix of another length. First the
losses of both ways are compared; then they run in turn in this process.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks import harness
from benchmarks.harness import Spread
from ctkernels.tuning import Demonstration, TuneResult, encode_context, encode_rows, load_jsonl, tune, tune_many
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.ct_kv import CtKvOptions

TASK = Path(__file__).resolve().parent.parent / "examples" / "tasks" / "support-routing"
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest relative difference of a loss
WAYS = ("together", "alone")
Tasks = dict[str, list[Demonstration]]


def draw_tasks(pairs: Sequence[Demonstration], count: int, demonstrations: int) -> Tasks:
    """Tasks by number, each of so many of the pairs."""
    return {f"task {seed}": random.Random(seed).sample(pairs, demonstrations) for seed in range(count)}


def run(
    way: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, settings: CtKvOptions
) -> Mapping[str, TuneResult]:
    """Tune the tasks. Raises the first error of a task."""
    if way == "alone":
        return {name: tune(model, tokenizer, pairs, "ct-kv", settings) for name, pairs in tasks.items()}
    result = tune_many(model, tokenizer, tasks, "ct-kv", settings)
    return {name: result[name] for name in tasks}


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, settings: CtKvOptions, rounds: int
) -> dict[str, Any]:
    """Seconds per task and epoch of both ways, with what a run does beside its epochs.

    Raises:
        ArithmeticError: the losses differ by more than `AGREEMENT`.
    """
    device, seconds, losses = str(model.device), {way: [] for way in WAYS}, {}
    for number in range(rounds + 1):  # the first round checks and warms up
        for way in WAYS:
            results, taken = harness.timed(lambda way=way: run(way, model, tokenizer, tasks, settings), device)
            losses[way] = [record.loss for name in tasks for record in results[name].history]
            if number:
                seconds[way].append(taken / len(tasks) / settings.epochs)
    pairs = zip(losses["together"], losses["alone"], strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    if not difference <= AGREEMENT[model.dtype]:
        raise ArithmeticError(f"the losses differ by {difference:.1e}, more than {AGREEMENT[model.dtype]:.0e}")
    rows = [row for pairs in tasks.values() for row in encode_rows(tokenizer, pairs)]
    return {
        "G": len(tasks),
        "P": [len(encode_context(tokenizer, pairs).input_ids) for pairs in tasks.values()],
        "rows": len(rows),
        "row_tokens": sum(len(row.tokens) for row in rows),
        "difference": difference,
        "seconds": {way: Spread.of(times) for way, times in seconds.items()},
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table."""
    rows = []
    for result in results:
        together, alone = (result["seconds"][way] for way in WAYS)
        prefixes = f"{min(result['P'])}-{max(result['P'])}"
        rows.append(
            [
                *(str(result["G"]), prefixes, f"{result['rows']} ({result['row_tokens']})"),
                *(harness.milliseconds(together), harness.milliseconds(alone)),
                *(f"{alone.median / together.median:.2f}x", f"{result['difference']:.0e}"),
            ]
        )
    header = [
        "G",
        "P",
        "rows (tokens) of a step",
        "together, ms",
        "one after the other, ms",
        "ratio",
        "losses differ by",
    ]
    about = "CT-KV, time per task and epoch, with the start of each task. Medians and quartiles."
    return f"{about}\n\n{harness.table(header, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--task", type=Path, default=TASK)
    parser.add_argument("--counts", type=int, nargs="*", default=(1, 4, 16), help="tasks at once")
    parser.add_argument("--demonstrations", type=int, default=16, help="of each task")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    harness.prepare(args)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    pairs = [*load_jsonl(args.task / "train.jsonl"), *load_jsonl(args.task / "test.jsonl")]
    settings = get_method("ct-kv").settings(epochs=args.epochs, max_tokens=args.max_tokens)
    machine = {**harness.describe_machine(args.device), "model": args.model, "dtype": args.dtype}
    print(harness.machine_line(machine), flush=True)
    results = []
    for count in args.counts:
        tasks = draw_tasks(pairs, count, args.demonstrations)
        results.append(compare(model, tokenizer, tasks, settings, args.rounds))
        print(f"G = {count}: losses agree to {results[-1]['difference']:.0e}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    harness.write_report("bench_many", args, machine, results, markdown(results))


if __name__ == "__main__":
    main()
