#!/usr/bin/env python3
"""A training epoch of CT-KV on a real model against the authors' loop in plain PyTorch, and every method's times.

    python benchmarks/bench_tuning.py --model .models/smollm2-135m            about ten minutes on two cores

The plain loop (`plain_ctkv.py`: expanded cache, padded rows, dense mask, logits everywhere) runs with SDPA and with
eager attention, on the same demonstrations with the same dropped tokens. First the losses of all three are compared;
then they run in turn in this process. For longer prefixes, the inputs are lengthened with text of the test set.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from benchmarks import harness
from benchmarks.cases import FLOPS
from benchmarks.harness import MatrixProduct, Spread
from ctkernels import ContextMask
from ctkernels.testing import memory, plain_ctkv
from ctkernels.tuning import Demonstration, encode_context, encode_rows, load_jsonl, tune
from ctkernels.tuning.methods import METHODS, get_method
from ctkernels.tuning.methods.ct_kv import CtKvOptions

TASK = Path(__file__).resolve().parent.parent / "examples" / "tasks" / "support-routing"
OURS = "ctkernels"
ATTENTIONS = ("sdpa", "eager")  # of the plain loop
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest relative difference of a loss
EPOCHS = 2  # of a run; more than one, so that a wrong step shows in the next loss


def draw_out(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], filler: Sequence[str], length: int
) -> list[Demonstration]:
    """The same demonstrations, with inputs lengthened in turn until the context has at least `length` tokens."""
    drawn, more = list(demonstrations), cycle(filler)
    for i in cycle(range(len(drawn))):
        if len(encode_context(tokenizer, drawn).input_ids) >= length:
            return drawn
        drawn[i] = replace(drawn[i], input=f"{drawn[i].input} {next(more)}")
    raise AssertionError("cycles do not end")


def run_ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Demonstration], settings: CtKvOptions
) -> tuple[list[float], list[float]]:
    """Losses and seconds of the epochs."""
    history = tune(model, tokenizer, pairs, "ct-kv", settings).history
    return [record.loss for record in history], [record.seconds for record in history]


def run_plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Demonstration],
    settings: CtKvOptions,
    attention: str,
) -> tuple[list[float], list[float]]:
    """Losses and seconds of the epochs of the authors' loop with "sdpa" or "eager" attention."""
    context = encode_context(tokenizer, pairs)
    rows = [
        plain_ctkv.PlainRow(row.tokens + row.answers[0][-1:], row.first_label + 1, row.held_out)
        for row in encode_rows(tokenizer, pairs)
    ]

    def keep(epoch: int) -> torch.Tensor:
        mask = ContextMask(drop_p=settings.drop_p, seed=settings.dropout_seed(epoch))
        return mask.dense(len(rows), len(context.input_ids))

    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        result = plain_ctkv.tune(
            model, context.input_ids, context.segments, rows, epochs=settings.epochs, lr=settings.lr, keep=keep
        )
    finally:
        model.set_attn_implementation(before)
    return result.losses, result.seconds


def epoch_flops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Demonstration]
) -> dict[str, int]:
    """The least arithmetic of an epoch of CT-KV: the model's own layers on the rows' tokens (forward, and the
    gradients of their inputs; the head where there are labels), and attention on what leave-one-out keeps."""
    context, rows = encode_context(tokenizer, pairs), encode_rows(tokenizer, pairs)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    tokens = sum(len(row.tokens) for row in rows)
    labels = sum(len(row.tokens) - row.first_label for row in rows)
    pairs_kept = 0
    for row in rows:
        own, start, end = len(row.tokens), *(int(x) for x in context.segments[row.held_out : row.held_out + 2])
        pairs_kept += own * (len(context.input_ids) - (end - start)) + own * (own + 1) // 2
    config = model.config.get_text_config()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return {
        "layers": 2 * 2 * (tokens * sum(m.weight.numel() for m in layers) + labels * head.weight.numel()),
        "attention": FLOPS["both"] * width * config.num_hidden_layers * pairs_kept,
    }


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Demonstration], rounds: int
) -> dict[str, Any]:
    """Seconds per epoch, peak memory and losses of our loop and of the plain ones, in turn, and the least time that the
    arithmetic of an epoch takes at the rate of `torch.mm`, which runs in turn with them.

    Raises:
        ArithmeticError: the losses differ by more than `AGREEMENT`.
    """
    settings = get_method("ct-kv").settings(epochs=EPOCHS, objective="answers")
    runs: dict[str, Callable[[], tuple[list[float], list[float]]]] = {
        OURS: lambda: run_ours(model, tokenizer, pairs, settings)
    }
    for attention in ATTENTIONS:
        runs[attention] = lambda attention=attention: run_plain(model, tokenizer, pairs, settings, attention)
    losses, seconds, peaks, rates = {}, {name: [] for name in runs}, {}, []
    ceiling, flops = MatrixProduct(model.dtype, "cpu"), epoch_flops(model, tokenizer, pairs)
    for number in range(rounds + 1):  # the first round checks and warms up
        for name, run in runs.items():
            measurable = memory.reset_peak()
            losses[name], times = run()
            if number == 0:
                peaks[name] = memory.peak_bytes() if measurable else None
            else:
                seconds[name] += times
                rates.append(ceiling.flops / ceiling()["mean"])
        if number == 0:
            difference = check_losses(losses, model.dtype)
    return {
        "P": len(encode_context(tokenizer, pairs).input_ids),
        "rows": len(pairs),
        "row_tokens": sum(len(row.tokens) for row in encode_rows(tokenizer, pairs)),
        "losses": losses,
        "difference": difference,
        "seconds": {name: Spread.of(times) for name, times in seconds.items()},
        "peak_bytes": peaks,
        "ceiling": statistics.median(rates),
        "floors": {part: count / statistics.median(rates) for part, count in flops.items()},
    }


def check_losses(losses: dict[str, list[float]], dtype: torch.dtype) -> float:
    """The largest relative difference of a plain loop's loss to ours."""
    ours = losses[OURS]
    pairs = [(a, b) for name in ATTENTIONS for a, b in zip(ours, losses[name], strict=True)]
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    if not difference <= AGREEMENT[dtype]:
        raise ArithmeticError(f"the losses differ by {difference:.1e}, more than {AGREEMENT[dtype]:.0e}: {losses}")
    return difference


def time_method(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Demonstration],
    items: list[Demonstration],
    rounds: int,
) -> dict[str, Any]:
    """Seconds per training epoch, if the method trains, and per test item of an evaluation."""
    method = get_method(name)
    result = tune(
        model, tokenizer, pairs, name, method.settings(**method.pick({"epochs": rounds, "objective": "answers"}))
    )
    times = [harness.timed(lambda: result.adapter.evaluate(model, tokenizer, items), "cpu")[1] for _ in range(3)]
    return {
        "method": name,
        "epoch": Spread.of([record.seconds for record in result.history]) if result.history else None,
        "evaluation_per_item": Spread.of([seconds / len(items) for seconds in times]),
    }


def profile_epoch(run: Callable[[], Any]) -> str:
    """The time of an epoch by operator."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        run()
    return record.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60)


def markdown(results: dict[str, Any]) -> str:
    """The two tables."""
    rows = []
    for result in results["epochs"]:
        own = result["seconds"][OURS]
        floors = result["floors"]
        line = [str(result["P"]), f"{result['rows']} ({result['row_tokens']})", harness.milliseconds(own)]
        line += [f"{1e3 * floors['layers']:.0f} + {1e3 * floors['attention']:.0f}"]
        line += [f"{sum(floors.values()) / own.median:.0%}"]
        line.append(harness.megabytes(result["peak_bytes"][OURS]))
        for name in ATTENTIONS:
            spread = result["seconds"][name]
            line += [harness.milliseconds(spread), f"{spread.median / own.median:.1f}x"]
            line.append(harness.megabytes(result["peak_bytes"][name]))
        rows.append([*line, f"{result['difference']:.0e}"])
    header = ["P", "rows (tokens)", "ctkernels ms", "floor ms", "floor / time", "peak MB"]
    for name in ATTENTIONS:
        header += [f"plain, {name} ms", "ratio", "peak MB"]
    epochs = harness.table([*header, "losses differ by"], rows)
    times = harness.table(
        ["method", "training epoch ms", "evaluation, ms per item"],
        [
            [
                method["method"],
                harness.milliseconds(method["epoch"]) if method["epoch"] else "",
                harness.milliseconds(method["evaluation_per_item"]),
            ]
            for method in results["methods"]
        ],
    )
    about = (
        "Medians and quartiles; peak memory of the process. Floor: the arithmetic of the model's layers + that of "
        "attention on what leave-one-out keeps, at the rate of `torch.mm`, run in turn."
    )
    return f"One epoch of CT-KV. {about}\n\n{epochs}\n\n**Evaluation and training of every method**\n\n{times}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--task", type=Path, default=TASK)
    parser.add_argument("--demonstrations", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="*", default=(400, 700, 1000), help="least prefix lengths")
    parser.add_argument("--rounds", type=int, default=2, help=f"runs of {EPOCHS} epochs of each loop")
    parser.add_argument("--items", type=int, default=32, help="test items of an evaluation")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--profile", action="store_true", help="also write the time of an epoch by operator")
    args = parser.parse_args(argv)
    harness.prepare(args)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    train, test = load_jsonl(args.task / "train.jsonl"), load_jsonl(args.task / "test.jsonl")
    train, filler = train[: args.demonstrations], [item.input for item in test]
    machine = {**harness.describe_machine("cpu"), "model": args.model, "dtype": args.dtype}
    print(harness.machine_line(machine), flush=True)

    comparisons = []
    for length in args.lengths:
        pairs = draw_out(tokenizer, train, filler, length)
        comparisons.append(compare(model, tokenizer, pairs, args.rounds))
        print(f"P = {comparisons[-1]['P']}: losses agree to {comparisons[-1]['difference']:.0e}", flush=True)
    methods = [time_method(name, model, tokenizer, train, test[: args.items], args.rounds) for name in METHODS]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.profile:
        settings = get_method("ct-kv").settings(epochs=EPOCHS, objective="answers")
        runs = {OURS: lambda: run_ours(model, tokenizer, pairs, settings)}
        runs["sdpa"] = lambda: run_plain(model, tokenizer, pairs, settings, "sdpa")
        for name, run in runs.items():
            (args.out / f"profile_{name}.txt").write_text(profile_epoch(run))
    results = {"epochs": comparisons, "methods": methods}
    harness.write_report("bench_tuning", args, machine, results, markdown(results))


if __name__ == "__main__":
    main()
