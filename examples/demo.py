#!/usr/bin/env python3
"""Context Tuning of a real model in a few minutes: zero-shot, ICL and CT-KV on a small task, beside the plain loop.

    python examples/demo.py --model .models/smollm2-135m --out runs/demo

Writes OUT/prefix (the tuned prefix), OUT/results.json and OUT/demo.png. `--model` takes any directory or hub id of a
supported causal language model, `--task` any folder with train.jsonl and test.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ctkernels import ContextMask
from ctkernels.cli.progress import epoch_bar
from ctkernels.testing import memory, plain_ctkv
from ctkernels.tuning import (
    Demonstration,
    EvalResult,
    KVPrefix,
    encode_context,
    encode_rows,
    evaluate_prefix,
    get_method,
    load_jsonl,
    tune,
)
from ctkernels.tuning.methods.ct_kv import CtKvOptions
from ctkernels.tuning.storage import atomic_write_json
from ctkernels.tuning.train.options import Options

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("zero-shot", "icl", "ct-kv")
SNAPSHOT_EVERY = 5  # epochs between points of the accuracy curve
AGREEMENT = 1e-3  # largest relative difference of a loss to the plain implementation's, both in fp32

Value = TypeVar("Value")
console = Console()


def measured(work: Callable[[], Value]) -> tuple[Value, float, float]:
    """The result of `work`, its seconds, and the peak memory of the process meanwhile, in GB."""
    memory.reset_peak()
    started = time.perf_counter()
    value = work()
    return value, time.perf_counter() - started, memory.peak_bytes() / 1e9


def run_method(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Demonstration],
    test: list[Demonstration],
    settings: Options,
) -> tuple[dict[str, Any], KVPrefix, dict[int, KVPrefix]]:
    """Tune and evaluate one method; returns its row of the table, its prefix, and snapshots of it by epoch."""
    snapshots: dict[int, KVPrefix] = {}
    with epoch_bar(settings) as move_bar:

        def on_epoch(record, prefix: KVPrefix) -> None:
            move_bar(record, prefix)
            if record.epoch % SNAPSHOT_EVERY == 0 and record.epoch < getattr(settings, "epochs", 0):
                snapshots[record.epoch] = copy.deepcopy(prefix)

        result, seconds, peak = measured(lambda: tune(model, tokenizer, train, name, settings, on_epoch=on_epoch))
    scores, eval_seconds, eval_peak = measured(lambda: evaluate_prefix(model, tokenizer, test, result.prefix))
    row = {
        "method": name,
        **asdict(scores),
        "seconds": seconds,
        "eval_seconds": eval_seconds,
        "peak_gb": max(peak, eval_peak),
        "history": [asdict(record) for record in result.history],
    }
    console.print(f"{name:9}  accuracy {scores.accuracy:.2f}   gold loss {scores.gold_loss:.3f}")
    return row, result.prefix, snapshots


def run_plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Demonstration],
    settings: CtKvOptions,
    epochs: int,
) -> tuple[plain_ctkv.PlainResult, float]:
    """The first epochs of the same run in plain PyTorch, with the same dropped tokens, and its peak memory in GB."""
    context = encode_context(tokenizer, train)
    rows = [
        plain_ctkv.PlainRow(row.tokens + row.answers[0][-1:], row.first_label + 1, row.held_out)
        for row in encode_rows(tokenizer, train)
    ]

    def keep(epoch: int) -> torch.Tensor:
        mask = ContextMask(drop_p=settings.drop_p, seed=settings.dropout_seed(epoch))
        return mask.dense(len(rows), len(context.input_ids))

    result, _, peak = measured(
        lambda: plain_ctkv.tune(
            model,
            context.input_ids,
            context.segments,
            rows,
            epochs=settings.epochs,
            lr=settings.lr,
            stop_after=epochs,
            keep=keep,
        )
    )
    return result, peak


def plot(path: Path, results: list[dict[str, Any]], curve: dict[int, EvalResult]) -> None:
    """Training loss and test accuracy over the epochs, with the baselines as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {row["method"]: row for row in results}
    history = by_name["ct-kv"]["history"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot([r["epoch"] for r in history], [r["loss"] for r in history], label="training (own demonstration hidden)")
    left.plot(list(curve), [scores.gold_loss for scores in curve.values()], "o-", label="test, correct option")
    left.set(xlabel="epoch", ylabel="loss (nats per answer token)", title="CT-KV: loss", ylim=(0, None))
    left.legend()
    right.plot(list(curve), [scores.accuracy for scores in curve.values()], "o-", color="C1", label="CT-KV")
    right.axhline(by_name["icl"]["accuracy"], color="C2", linestyle="--", label="ICL")
    right.axhline(by_name["zero-shot"]["accuracy"], color="C3", linestyle=":", label="zero-shot")
    right.set(xlabel="epoch", ylabel="test accuracy", title="CT-KV: accuracy", ylim=(0, 1))
    right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def print_tables(results: list[dict[str, Any]], comparison: dict[str, Any] | None) -> None:
    table = Table("method", "accuracy", "macro-F1", "gold loss", "seconds", "eval seconds", "peak GB", title="Results")
    for row in results:
        f1 = f"{row['score']:.3f}" if row["metric"] == "macro_f1" else "-"
        numbers = (f"{row['gold_loss']:.3f}", f"{row['seconds']:.1f}", f"{row['eval_seconds']:.1f}")
        table.add_row(row["method"], f"{row['accuracy']:.3f}", f1, *numbers, f"{row['peak_gb']:.2f}")
    console.print(table)
    if comparison is None:
        return
    table = Table("CT-KV", "s/epoch", "peak GB", "losses of the first epochs", title="One epoch, same numbers")
    for name in ("ctkernels", "plain"):
        losses = "  ".join(f"{loss:.5f}" for loss in comparison[name]["losses"])
        table.add_row(name, f"{comparison[name]['seconds']:.2f}", f"{comparison[name]['peak_gb']:.2f}", losses)
    console.print(table)
    console.print(f"largest relative difference of the losses: {comparison['difference']:.1e}")


def compare(ours: dict[str, Any], plain: plain_ctkv.PlainResult, plain_peak: float) -> dict[str, Any]:
    """Time per epoch (median), peak memory and losses of the epochs that both ran.

    The first epoch warms up caches. Both medians leave it out if there are others.
    """
    losses = [record["loss"] for record in ours["history"]][: len(plain.losses)]
    seconds = [record["seconds"] for record in ours["history"]]
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses, plain.losses, strict=True))
    return {
        "ctkernels": {
            "seconds": statistics.median(seconds[1:] or seconds),
            "peak_gb": ours["peak_gb"],
            "losses": losses,
        },
        "plain": {
            "seconds": statistics.median(plain.seconds[1:] or plain.seconds),
            "peak_gb": plain_peak,
            "losses": plain.losses,
        },
        "difference": difference,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--task", type=Path, default=ROOT / "examples/tasks/support-routing")
    parser.add_argument("--epochs", type=int, default=get_method("ct-kv").settings().epochs)
    parser.add_argument(
        "--plain-epochs", type=int, default=3, help="epochs of the plain implementation; 0: leave it out"
    )
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    started = time.perf_counter()
    train, test = load_jsonl(args.task / "train.jsonl"), load_jsonl(args.task / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    console.print(
        f"{args.model}: {len(train)} demonstrations, {len(test)} test items, {torch.get_num_threads()} threads"
    )

    results, curve = [], {}
    for name in METHODS:
        method = get_method(name)
        settings = method.settings(**method.pick({"epochs": args.epochs}))
        row, prefix, snapshots = run_method(name, model, tokenizer, train, test, settings)
        results.append(row)
        for epoch, snapshot in snapshots.items():
            curve[epoch] = evaluate_prefix(model, tokenizer, test, snapshot)
        if name != "zero-shot":  # ICL is where CT-KV starts
            fields = {key: row[key] for key in EvalResult.__dataclass_fields__}
            curve[0 if name == "icl" else args.epochs] = EvalResult(**fields)
    curve = dict(sorted(curve.items()))
    prefix.save_pretrained(args.out / "prefix")

    comparison = None
    if args.plain_epochs > 0:
        console.print(f"plain PyTorch for {args.plain_epochs} epochs ...")
        comparison = compare(results[-1], *run_plain(model, tokenizer, train, settings, args.plain_epochs))
    plot(args.out / "demo.png", results, curve)
    accuracy = {epoch: scores.accuracy for epoch, scores in curve.items()}
    atomic_write_json(
        args.out / "results.json", {"results": results, "accuracy_by_epoch": accuracy, "comparison": comparison}
    )
    print_tables(results, comparison)
    console.print(f"wrote {args.out}/prefix, results.json and demo.png in {time.perf_counter() - started:.0f} s")
    if comparison is not None and comparison["difference"] > AGREEMENT:
        sys.exit(f"the losses differ from the plain implementation's by more than {AGREEMENT}")


if __name__ == "__main__":
    main()
