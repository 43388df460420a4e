#!/usr/bin/env python3
"""Train a prefix with transformers.Trainer: leave-one-out and token dropout in a loop that you know.

    python examples/train_with_trainer.py --model .models/smollm2-135m --out runs/train-with-trainer

The same command continues a run that was stopped, from the last checkpoint, which holds the prefix alone.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ctkernels.tuning import KVPrefix, PrefixModel, encode_rows, evaluate_prefix, load_jsonl

TASK = Path(__file__).resolve().parent / "tasks" / "support-routing"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--train", type=Path, default=TASK / "train.jsonl")
    parser.add_argument("--test", type=Path, default=TASK / "test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the prefix and the checkpoints")
    parser.add_argument("--epochs", type=int, default=25)
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    demonstrations, items = load_jsonl(args.train), load_jsonl(args.test)

    # each row says which demonstration is its own (`held_out`), so that it does not see its answer in the prefix
    rows = [row.example() for row in encode_rows(tokenizer, demonstrations)]
    prefix = KVPrefix.from_demonstrations(base, tokenizer, demonstrations, method="ct-kv")
    model = PrefixModel(base, prefix, drop_p=0.05)
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        str(args.out / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),  # one step on all rows
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="epoch",
        save_total_limit=1,
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(args.out / "prefix")

    base = model.unload()  # without the prefix again
    prefix = KVPrefix.from_pretrained(args.out / "prefix", model=base, tokenizer=tokenizer)
    scores = evaluate_prefix(base, tokenizer, items, prefix)
    print(f"{scores.metric} {scores.score:.3f}, loss of the correct answer {scores.gold_loss:.3f}")


if __name__ == "__main__":
    main()
