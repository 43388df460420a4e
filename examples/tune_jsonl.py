#!/usr/bin/env python3
"""Tune a prefix on the demonstrations of a JSONL file, save it, and answer with it.

    python examples/tune_jsonl.py --model .models/smollm2-135m --out runs/tune-jsonl

Each line of the file has `input` and `output`, and `options` if the answer is one of a few.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctkernels.tuning import KVPrefix, encode_prompt, get_method, load_jsonl, tune

TASK = Path(__file__).resolve().parent / "tasks" / "support-routing"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--train", type=Path, default=TASK / "train.jsonl")
    parser.add_argument("--test", type=Path, default=TASK / "test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the prefix and the checkpoint")
    parser.add_argument("--epochs", type=int, default=25)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    demonstrations, items = load_jsonl(args.train), load_jsonl(args.test)

    # learn_stop also trains the delimiter after the answer, at which generation then stops
    settings = get_method("ct-kv").settings(epochs=args.epochs, learn_stop=True)
    result = tune(
        model,
        tokenizer,
        demonstrations,
        "ct-kv",
        settings,
        checkpoint_dir=args.out / "checkpoint",
        resume=True,  # the same command continues after an interruption, and ends with the same bits
        on_epoch=lambda record, _: print(f"epoch {record.epoch}: loss {record.loss:.4f}, {record.seconds:.1f} s"),
    )
    scores = result.adapter.evaluate(model, tokenizer, items)
    print(f"{scores.metric} {scores.score:.3f}, loss of the correct answer {scores.gold_loss:.3f}")
    result.prefix.save_pretrained(args.out / "prefix")

    # later, or on another machine: the model is unchanged, the prefix is one small file
    prefix = KVPrefix.from_pretrained(args.out / "prefix", model=model, tokenizer=tokenizer)
    question = torch.tensor([encode_prompt(tokenizer, items[0].input)])  # as training rows begin
    with prefix.attach(model), torch.no_grad():
        answer = model.generate(question, max_new_tokens=8, do_sample=False)[0, question.shape[1] :]
    print(f"{items[0].input!r} -> {tokenizer.decode(answer).strip()!r}")


if __name__ == "__main__":
    main()
