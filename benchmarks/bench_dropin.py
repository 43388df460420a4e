#!/usr/bin/env python3
"""An unmodified model without a prefix under attn_implementation="ctkernels", against the same model under "sdpa".

    python benchmarks/bench_dropin.py --model .models/smollm2-135m            about five minutes on two cores

Whole forward passes, training steps and decoding, in turn in one process. First the results of both are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks import harness
from benchmarks.harness import Laps
from ctkernels.tuning.hf import IMPLEMENTATION

NAMES = (IMPLEMENTATION, "sdpa")
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # largest relative difference (norms over all values)


@dataclass(frozen=True)
class Work:
    """B rows of S tokens; padded: row b has only S (b + 1) / B of them, with padding on the left; new: tokens decoded
    after them; train: forward and backward of all weights."""

    name: str
    B: int
    S: int
    padded: bool = False
    new: int = 0
    train: bool = False

    def __str__(self) -> str:
        return f"{self.name} (B={self.B} S={self.S}{f' + {self.new}' if self.new else ''})"


WORKS = (
    Work("prefill", 1, 512),
    Work("prefill", 1, 2048),
    Work("prefill of short prompts", 8, 32),
    Work("prefill, padded on the left", 8, 256, padded=True),
    Work("training step", 2, 256, train=True),
    Work("training step, padded on the left", 4, 128, padded=True, train=True),
    Work("decoding", 1, 512, new=16),
    Work("decoding, padded on the left", 4, 256, padded=True, new=16),
)


def inputs(work: Work, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens, and a mask if there is padding."""
    ids = torch.randint(vocabulary, (work.B, work.S), generator=torch.Generator().manual_seed(0))
    if not work.padded:
        return {"input_ids": ids}
    lengths = torch.arange(1, work.B + 1)[:, None] * work.S // work.B
    return {"input_ids": ids, "attention_mask": (torch.arange(work.S) >= work.S - lengths).long()}


def run(model: PreTrainedModel, work: Work, batch: dict[str, Tensor]) -> Tensor:
    """The work's result: last logits of prefill and decoding, the gradient of one weight of a training step."""
    model.requires_grad_(work.train)
    if work.train:
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits[:, -64:]
        logits.float().logsumexp(dim=-1).mean().backward()
        return next(p for name, p in model.named_parameters() if "k_proj" in name).grad
    with torch.no_grad():
        out = model(**batch, use_cache=True, logits_to_keep=1)
        for _ in range(work.new):
            if work.padded:
                batch = {"attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)}
            tokens = {"input_ids": out.logits[:, -1:].argmax(dim=-1), "past_key_values": out.past_key_values}
            out = model(**{**batch, **tokens}, use_cache=True)
        return out.logits


def compare(model: PreTrainedModel, work: Work, seconds: float) -> dict[str, Any]:
    """Times of both, run in turn, and the difference of their results.

    Raises:
        ArithmeticError: the results differ by more than `AGREEMENT`.
    """
    batch = inputs(work, model.config.vocab_size)

    def lap(name: str) -> Callable[[], Laps]:
        def timed() -> Laps:
            model.set_attn_implementation(name)
            return {"both": harness.timed(lambda: run(model, work, batch), "cpu")[1]}

        return timed

    results = {}
    for name in NAMES:
        model.set_attn_implementation(name)
        results[name] = run(model, work, batch).double().clone()
    ours, theirs = results.values()
    difference = float((ours - theirs).norm() / theirs.norm())
    if not difference <= AGREEMENT[model.dtype]:
        raise ArithmeticError(f"{work}: results differ by {difference:.1e}, more than {AGREEMENT[model.dtype]:.0e}")
    times = harness.in_turn({name: lap(name) for name in NAMES}, seconds)
    return {
        "work": str(work),
        "difference": difference,
        "times": {name: phases["both"] for name, phases in times.items()},
        "ratio": times["sdpa"]["both"].median / times[IMPLEMENTATION]["both"].median,
        "ratio_best": times["sdpa"]["both"].best / times[IMPLEMENTATION]["both"].best,
    }


def markdown(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            result["work"],
            *(harness.milliseconds(result["times"][name]) for name in NAMES),
            f"{result['ratio']:.2f}x",
            f"{result['ratio_best']:.2f}x",
            f"{result['difference']:.0e}",
        ]
        for result in results
    ]
    header = ["work", "ctkernels ms", "sdpa ms", "sdpa / ctkernels", "best runs", "results differ by"]
    return (
        "Whole model without a prefix, medians and quartiles; both in turn. Above 1x, ctkernels is faster.\n\n"
        + harness.table(header, rows)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=30, help="time for each line of the table")
    args = parser.parse_args(argv)
    harness.prepare(args)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    machine = {**harness.describe_machine("cpu"), "model": args.model, "dtype": args.dtype}
    print(harness.machine_line(machine), flush=True)
    results = []
    for work in WORKS:
        results.append(compare(model, work, args.seconds))
        print(f"{work}: {results[-1]['ratio']:.2f}x", flush=True)
    harness.write_report("bench_dropin", args, machine, results, markdown(results))


if __name__ == "__main__":
    main()
