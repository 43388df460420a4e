#!/usr/bin/env python3
"""Tune a prefix for a model that is too large for one device and is spread over several processes.

torchrun --standalone --nproc-per-node 2 examples/tune_sharded.py --model .models/smollm2-135m --out runs/tune-sharded

--shard fsdp   each process holds a part of every weight (FSDP2), and runs its share of the rows
--shard tp     each process runs some heads of every layer (transformers' tensor parallelism), and all rows
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig

from ctkernels.tuning import get_method, load_jsonl, tune
from ctkernels.tuning.hf.models import find_decoder

TASK = Path(__file__).resolve().parent / "tasks" / "support-routing"


def load(name: str, shard: str) -> PreTrainedModel:
    """The frozen model, spread over all processes."""
    options = {"dtype": "auto"}
    if shard == "tp":
        options["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(name, **options).requires_grad_(False).eval()
    if shard == "fsdp":
        if torch.cuda.is_available():
            model.cuda()
        for layer in find_decoder(model).layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--train", type=Path, default=TASK / "train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the prefix and the checkpoint")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--shard", choices=("fsdp", "tp"), default="fsdp")
    args = parser.parse_args(argv)

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    first = dist.get_rank() == 0
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result = tune(
        load(args.model, args.shard),
        tokenizer,
        load_jsonl(args.train),
        "ct-kv",
        get_method("ct-kv").settings(epochs=args.epochs),
        checkpoint_dir=args.out / "checkpoint",
        resume=True,
        on_epoch=lambda record, _: print(f"epoch {record.epoch}: loss {record.loss:.4f}") if first else None,
        group=dist.group.WORLD if args.shard == "fsdp" else None,  # who shares the rows
    )
    if first:  # every process has the whole prefix, in the same bits
        result.prefix.save_pretrained(args.out / "prefix")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
