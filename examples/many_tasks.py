#!/usr/bin/env python3
"""One model, many tasks: the model is loaded once, and each task is a small file.

    python examples/many_tasks.py --model .models/smollm2-135m --tasks FOLDER --out runs/tasks

FOLDER holds one folder per task with train.jsonl and test.jsonl. Tasks that have a prefix in OUT are not tuned again.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ctkernels.tuning import KVPrefix, evaluate_prefix, get_method, load_jsonl, tune

TASKS = Path(__file__).resolve().parent / "tasks"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--tasks", type=Path, default=TASKS, help="folder of the tasks")
    parser.add_argument("--out", type=Path, required=True, help="folder of the prefixes")
    parser.add_argument("--epochs", type=int, default=25)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    tasks = sorted(path.parent for path in args.tasks.glob("*/train.jsonl"))

    settings = get_method("ct-kv").settings(epochs=args.epochs)
    for task in tasks:
        if not (args.out / task.name / "adapter.safetensors").exists():
            result = tune(model, tokenizer, load_jsonl(task / "train.jsonl"), "ct-kv", settings)
            result.prefix.save_pretrained(args.out / task.name)
            print(f"{task.name}: loss {result.history[0].loss:.3f} -> {result.history[-1].loss:.3f}")

    for task in tasks:  # the weights stay, only the prefix changes
        prefix = KVPrefix.from_pretrained(args.out / task.name, model=model, tokenizer=tokenizer)
        scores = evaluate_prefix(model, tokenizer, load_jsonl(task / "test.jsonl"), prefix)
        size = sum(file.stat().st_size for file in (args.out / task.name).rglob("*") if file.is_file())
        print(f"{task.name}: {scores.metric} {scores.score:.3f} on {scores.items} items, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
