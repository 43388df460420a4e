#!/usr/bin/env python3
"""Context Tuning of a real model in two minutes: zero-shot, ICL and CT-KV on a small task, beside the plain loop.

    python examples/demo.py --model .models/smollm2-135m --out runs/demo

Writes OUT/prefix (the tuned prefix), OUT/results.json and OUT/demo.png. `--model` takes any directory or hub id of a
supported causal language model, `--task` any folder with train.jsonl, dev.jsonl and test.jsonl. CT-KV runs twice: as
the papers have it, and with the loss of the choice among options, where dev.jsonl is held out and chooses the epoch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ctkernels import ContextMask
from ctkernels.cli.console import console as make_console
from ctkernels.cli.progress import epoch_bar
from ctkernels.testing import memory, plain_ctkv
from ctkernels.tuning import (
    Demonstration,
    KVPrefix,
    TextFormat,
    encode_context,
    encode_rows,
    get_method,
    load_jsonl,
    tune,
)
from ctkernels.tuning.data.formats import PairEncoder
from ctkernels.tuning.evaluation.calibration import share_options
from ctkernels.tuning.methods.ct_kv import CtKvOptions
from ctkernels.tuning.storage import atomic_write_json
from ctkernels.tuning.train.options import Options

ROOT = Path(__file__).resolve().parent.parent
PAPER, OPTIONS = "ct-kv", "ct-kv, options"  # the papers' loss and delimiter; the loss of the choice, and line breaks
AGREEMENT = 1e-3  # largest relative difference of a loss to the plain implementation's, both in fp32

Value = TypeVar("Value")
console = make_console()


def measured(work: Callable[[], Value]) -> tuple[Value, float, float]:
    """The result of `work`, its seconds, and the peak memory of the process meanwhile, in GB."""
    memory.reset_peak()
    started = time.perf_counter()
    value = work()
    return value, time.perf_counter() - started, memory.peak_bytes() / 1e9


def run_method(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Demonstration],
    test: list[Demonstration],
    settings: Options,
    text_format: TextFormat,
    held_out: list[Demonstration],
) -> tuple[dict[str, Any], KVPrefix]:
    """Tune and evaluate one method; returns its row of the table, and its prefix."""
    name = label.partition(",")[0]
    with epoch_bar(settings) as move_bar:
        arguments = {"settings": settings, "text_format": text_format, "held_out": held_out, "on_epoch": move_bar}
        result, seconds, peak = measured(lambda: tune(model, tokenizer, train, name, **arguments))
    scores, eval_seconds, eval_peak = measured(
        lambda: result.adapter.evaluate(model, tokenizer, test, calibrate="batch" if share_options(test) else "none")
    )
    row = {
        "method": label,
        **asdict(scores),
        "seconds": seconds,
        "eval_seconds": eval_seconds,
        "peak_gb": max(peak, eval_peak),
        "history": [asdict(record) for record in result.history],
        "held_out": result.held_out,
    }
    console.print(f"{label:14}  accuracy {scores.accuracy:.2f}   gold loss {scores.gold_loss:.3f}")
    return row, result.prefix


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


def line_breaks(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    """A line break between the parts of a text, where the tokenizer has one token for it; else a space."""
    try:
        PairEncoder(tokenizer, TextFormat("\n"))
    except ValueError:
        return TextFormat()
    return TextFormat("\n")


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """Loss of the trained and of the held-out demonstrations over the epochs, and test accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    row = next(row for row in results if row["method"] == OPTIONS)
    history, held_out = row["history"], row["held_out"]
    best = held_out.index(min(held_out))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    before = [record["epoch"] - 1 for record in history]  # a training loss is that before the epoch's step
    left.plot(before, [record["loss"] for record in history], label="trained (own demonstration hidden)")
    left.plot(range(len(held_out)), held_out, label="held out")
    left.plot(best, held_out[best], "o", color="C1", label=f"kept: epoch {best}")
    left.set(xlabel="epochs", ylabel="-log p(right option), nats", title="CT-KV: loss of the choice", ylim=(0, None))
    left.legend()
    labels = [row["method"] for row in results]
    places = range(len(labels))
    right.bar([x - 0.2 for x in places], [row["accuracy"] for row in results], 0.4, label="plain")
    calibrated = [(row["calibrated"] or row)["accuracy"] for row in results]
    right.bar([x + 0.2 for x in places], calibrated, 0.4, label="calibrated")
    right.set(ylabel="test accuracy", title="Test items", ylim=(0, 1))
    right.set_xticks(places, labels)
    right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def print_tables(results: list[dict[str, Any]], comparison: dict[str, Any] | None) -> None:
    columns = ("method", "accuracy", "calibrated", "NLL", "gold loss", "seconds", "eval seconds", "peak GB")
    table = Table(*columns, title="Results")
    for row in results:
        calibrated = "-" if row["calibrated"] is None else f"{row['calibrated']['accuracy']:.3f}"
        nll = "-" if row["nll"] is None else f"{row['nll']:.3f}"
        times = (f"{row['seconds']:.1f}", f"{row['eval_seconds']:.1f}", f"{row['peak_gb']:.2f}")
        table.add_row(row["method"], f"{row['accuracy']:.3f}", calibrated, nll, f"{row['gold_loss']:.3f}", *times)
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
    train, dev, test = (load_jsonl(args.task / f"{split}.jsonl") for split in ("train", "dev", "test"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    console.print(
        f"{args.model}: {len(train)} demonstrations, {len(test)} test items, {torch.get_num_threads()} threads"
    )

    paper, lines = TextFormat(), line_breaks(tokenizer)
    ct_kv = get_method("ct-kv")
    options = all(pair.options for pair in train)
    planned = [
        ("zero-shot", get_method("zero-shot").settings(), paper, []),
        ("icl", get_method("icl").settings(), paper, []),
        (PAPER, ct_kv.settings(epochs=args.epochs), paper, []),
        (OPTIONS, ct_kv.settings(epochs=args.epochs, objective="options" if options else "answers"), lines, dev),
    ]
    results = []
    for label, settings, text_format, held_out in planned:
        row, prefix = run_method(label, model, tokenizer, train, test, settings, text_format, held_out)
        results.append(row)
    prefix.save_pretrained(args.out / "prefix")

    comparison = None
    if args.plain_epochs > 0:
        console.print(f"plain PyTorch for {args.plain_epochs} epochs ...")
        comparison = compare(results[2], *run_plain(model, tokenizer, train, planned[2][1], args.plain_epochs))
    plot(args.out / "demo.png", results)
    atomic_write_json(args.out / "results.json", {"results": results, "comparison": comparison})
    print_tables(results, comparison)
    console.print(f"wrote {args.out}/prefix, results.json and demo.png in {time.perf_counter() - started:.0f} s")
    if comparison is not None and comparison["difference"] > AGREEMENT:
        sys.exit(f"the losses differ from the plain implementation's by more than {AGREEMENT}")


if __name__ == "__main__":
    main()
