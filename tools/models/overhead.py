#!/usr/bin/env python3
"""What serving a class costs beside the model itself:  python -m tools.models.overhead

    attach    seconds to attach a prefix to SmolLM2-135M's architecture and detach it, after the first time
    forward   host seconds of a forward pass of a tiny model with a prefix of one token, and of the stock one
    proof     seconds of the proof of a class, per class of PROVED

Medians on one thread; writes tools/models/results/overhead.json, which docs/models.md quotes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ctkernels.dispatch import cpu_info
from ctkernels.testing.classes import build, cases
from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import KVPrefix
from ctkernels.tuning.hf import prove
from ctkernels.tuning.hf.discover import find_layout
from ctkernels.tuning.hf.tiny import shrink
from ctkernels.tuning.storage import atomic_write_bytes
from tools.models.page import write_page

RESULTS = Path(__file__).parent / "results" / "overhead.json"
REPEATS = 50
ROUNDS = 11
PROVED = ("llama", "gemma3_text", "qwen3_moe", "bloom", "gpt2")
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of `repeats` calls after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prefix_of(model: LlamaForCausalLM, length: int) -> KVPrefix:
    with torch.no_grad():
        return KVPrefix.from_tokens(model, torch.arange(3, 3 + length) % 50, segments=torch.tensor([0]))


def attach() -> float:
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
    prefix = prefix_of(model, 8)

    def run() -> None:
        with prefix.attach(model):
            pass

    return seconds(run)


@torch.no_grad()
def forward() -> tuple[float, float]:
    """Per forward pass: attached, stock; in turns, since the speed of a processor changes."""
    model, row = make_model("llama", torch.float32), tokens(2, 4)
    prefix = prefix_of(model, 1)
    times = []
    for _ in range(ROUNDS):
        stock = seconds(lambda: model(row, use_cache=False))
        with prefix.attach(model):
            times.append((seconds(lambda: model(row, use_cache=False)), stock))
    attached, stock = map(statistics.median, zip(*times, strict=True))
    return attached, stock


def proof(model_type: str) -> float:
    model_class, config = build(next(case for case in cases() if case.model_type == model_type))
    with torch.device("meta"):
        layout = find_layout(model_class._from_config(shrink(config)))
    return seconds(lambda: prove(model_class, config, layout), 1)


def main() -> None:
    torch.set_num_threads(1)
    attached, stock = forward()
    cpu = cpu_info()
    result = {
        "cpu": f"{cpu['name']}, {cpu['isa']}",
        "attach": round(attach(), 6),
        "forward": {"attached": round(attached, 6), "stock": round(stock, 6)},
        "proof": {name: round(proof(name), 2) for name in PROVED},
    }
    atomic_write_bytes(RESULTS, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))
    write_page()


if __name__ == "__main__":
    main()
