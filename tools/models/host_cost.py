#!/usr/bin/env python3
"""What the host does for a call, on tensors so small that nothing else counts:  python -m tools.models.host_cost

    op      forward and backward of the op, of a prepared mask as layers use it, beside scaled_dot_product_attention
    step    forward and backward of a model with 16 tiny layers, with a prefix attached, beside the stock model

Per call, and per layer of a step: Python's function calls, which are counted and the same in every run, and the least
time of the thread in many short repetitions, in microseconds, which other work on the machine makes longer. With
`--label NAME` the numbers stay under that name in tools/models/results/host_cost.json, and host_cost.md has the table.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import ctkernels as ct
from ctkernels.tuning import KVPrefix
from ctkernels.tuning.storage import atomic_write_bytes

RESULTS = Path(__file__).parent / "results" / "host_cost.json"
LAYERS = 16
SIZES = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
Run = Callable[[], object]


def microseconds(run: Run, repeats: int) -> float:
    """The least time of the thread that a call takes."""
    least = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        run()
        least = min(least, time.thread_time() - start)
    return 1e6 * least


def calls(run: Run) -> int:
    """Python's function calls in a call."""
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls


def op() -> dict[str, Run]:
    q, k, v, dout = (torch.randn(2, 2, 4, 8) for _ in range(4))
    prefix = [torch.randn(2, 4, 8) for _ in range(2)]
    for x in (q, k, v, *prefix):
        x.requires_grad_()
    mask = ct.prepare(ct.ContextMask(hidden=torch.tensor([[0, 2], [2, 4]]), drop_p=0.1, seed=1))

    def ours() -> torch.Tensor:
        return ct.prefix_attention(q, k, v, *prefix, mask)

    def stock() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return {
        "op forward": ours,
        "op forward, SDPA": stock,
        "op forward and backward": lambda: torch.autograd.grad(ours(), (q, k, v, *prefix), dout),
        "op forward and backward, SDPA": lambda: torch.autograd.grad(stock(), (q, k, v), dout),
    }


def step() -> dict[str, Run]:
    config = LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=256, **SIZES)
    model, stock = (LlamaForCausalLM(config).eval().requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        prefix = KVPrefix.from_tokens(model, torch.arange(1, 9), torch.tensor([0, 4, 8]))
    attachment = prefix.attach(model).enable()
    attachment.mask = ct.ContextMask(hidden=torch.tensor([[0, 4], [4, 8]]), drop_p=0.1, seed=1)
    embedded = torch.randn(2, 6, SIZES["hidden_size"], requires_grad=True)

    def backward(which: LlamaForCausalLM) -> None:
        which(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
        embedded.grad = None
        prefix.zero_grad()

    @torch.no_grad()
    def forward(which: LlamaForCausalLM) -> None:
        which(inputs_embeds=embedded, use_cache=False)

    return {
        "step forward": lambda: forward(model),
        "step forward, stock": lambda: forward(stock),
        "step forward and backward": lambda: backward(model),
        "step forward and backward, stock": lambda: backward(stock),
    }


def measure() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    found = {}
    for runs, repeats, layers in ((op(), 3000, 1), (step(), 200, LAYERS)):
        for name, run in runs.items():
            for _ in range(5):
                run()
            found[name] = {"calls": calls(run) / layers, "us": microseconds(run, repeats) / layers}
    return found


def page(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "Written by `python -m tools.models.host_cost`. Of a call of the op, and per layer of a step of 16 layers:",
        "Python's function calls, and the least time of the thread in microseconds (other work ran on the machine).",
        "",
        "| what | " + " | ".join(f"{label}: calls | us" for label in results) + " |",
        "| --- |" + " ---: |" * (2 * len(results)),
    ]
    for name in next(iter(results.values())):
        cells = [f"{found[name]['calls']:.0f} | {found[name]['us']:.1f}" for found in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label")
    label = parser.parse_args().label
    found = measure()
    print(page({label or "now": found}))
    if label:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[label] = found
        atomic_write_bytes(RESULTS, (json.dumps(known, indent=1) + "\n").encode())
        atomic_write_bytes(RESULTS.with_suffix(".md"), page(known).encode())


if __name__ == "__main__":
    main()
