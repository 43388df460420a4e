#!/usr/bin/env python3
"""Test-time training, then Context Tuning of the updated model: what each step gains on one task.

    python examples/ttt_then_ct_kv.py --model .models/smollm2-135m --out runs/ttt-ct-kv

First a LoRA update is trained on the demonstrations in random orders. With the updated weights, the demonstrations have
a new KV cache, which CT-KV then tunes. The saved adapter holds both; the model stays as it was.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ctkernels.tuning import get_method, load_jsonl, tune
from ctkernels.tuning.adapters.adapter import Adapter

TASK = Path(__file__).resolve().parent / "tasks" / "support-routing"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--task", type=Path, default=TASK, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--ttt-epochs", type=int, default=4, help="of the LoRA update; each is k long sequences")
    parser.add_argument("--epochs", type=int, default=8, help="of CT-KV after it")
    parser.add_argument("--limit", type=int, help="test only the first so many items")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    demonstrations = load_jsonl(args.task / "train.jsonl")
    items = load_jsonl(args.task / "test.jsonl")[: args.limit]

    both = get_method("ttt+ct-kv").settings(ttt_epochs=args.ttt_epochs, epochs=args.epochs)
    alone = get_method("ttt").settings(epochs=args.ttt_epochs, lr=both.ttt_lr)
    for name, settings in (("icl", None), ("ttt", alone), ("ttt+ct-kv", both)):
        result = tune(model, tokenizer, demonstrations, name, settings)
        scores = result.adapter.evaluate(model, tokenizer, items)
        print(f"{name:10} {scores.metric} {scores.score:.3f}, loss of the correct answer {scores.gold_loss:.3f}")
        for record in (r for r in result.history if r.epoch == 1):
            print(f"           {record.stage or 'last'} stage starts at a training loss of {record.loss:.3f}")
    result.adapter.save_pretrained(args.out)

    again = Adapter.from_pretrained(args.out, model, tokenizer)
    assert again.evaluate(model, tokenizer, items).predictions == scores.predictions
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
