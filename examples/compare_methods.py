#!/usr/bin/env python3
"""Compare methods on one task, each with settings of its own.

    python examples/compare_methods.py --model .models/smollm2-135m
    python examples/compare_methods.py --model .models/smollm2-135m --methods icl ct-kv:lr=1e-3 ct-kv:leave_one_out=none

For many tasks and seeds, with resume, significance and figures: `ctkernels eval --suite`.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctkernels.tuning import load_jsonl, tune
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec

TASK = Path(__file__).resolve().parent / "tasks" / "support-routing"
METHODS = ("zero-shot", "icl", "prefix-tuning", "ct-kv", "ct-kv:leave_one_out=none:drop_p=0")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--task", type=Path, default=TASK, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="methods, with settings: ct-kv:lr=1e-3")
    parser.add_argument("--limit", type=int, help="test only the first so many items")
    args = parser.parse_args(argv)

    specs = [MethodSpec.parse(word) for word in args.methods]  # a wrong name raises an error before the model loads
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    demonstrations = load_jsonl(args.task / "train.jsonl")
    items = load_jsonl(args.task / "test.jsonl")[: args.limit]

    table = Table("method", "score", "gold loss", "training loss", "tuning, s")
    for spec in specs:
        started = time.perf_counter()
        result = tune(model, tokenizer, demonstrations, spec.name, spec.settings())
        seconds = time.perf_counter() - started
        scores = result.adapter.evaluate(model, tokenizer, items)
        losses = f"{result.history[0].loss:.3f} -> {result.history[-1].loss:.3f}" if result.history else ""
        table.add_row(str(spec), f"{scores.score:.3f}", f"{scores.gold_loss:.3f}", losses, f"{seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
