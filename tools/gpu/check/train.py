"""Stage train: optimiser steps of CT-KV on a model of Llama-3.2-1B's shape with random weights.

    authors' loop    plain PyTorch and transformers: expanded cache, padded rows, dense mask, logits everywhere
    trainer          `train_learner`, which is what `tune` runs, without graphs: losses read after each step
    graph            the trainer with its steps as CUDA graphs
    eager            the same step without what surrounds it: loss, backward, clipping, AdamW
    compiled         its loss under torch.compile

All of them start from the same weights, prefix and dropped tokens: their first losses and gradient norms must agree.
Weights and rows are in bf16; our prefix is in fp32, the plain loop's in bf16 as the model gives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import LLAMA, Case
from ctkernels.testing import plain_ctkv
from tools.gpu import model as predictions
from tools.gpu.check import timing

LENGTHS = {"cuda": (1024, 4096, 16384), "cpu": (24,)}
AUTHORS, TRAINER, GRAPH = "authors' loop", "trainer", "graph"
MODES = (AUTHORS, TRAINER, "eager", GRAPH, "compiled")
WARM_UP = 3
LR, DROP_P = 1e-4, 0.05


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its training rows."""

    config: dict[str, int]
    rows: int
    tokens: int
    dtype: torch.dtype

    def case(self, P: int) -> Case:
        """Attention of one layer."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        sizes = dict(B=self.rows, H=heads, Hk=kv_heads, S=self.tokens, P=P, D=self.config["head_dim"])
        return Case("a layer", **sizes, segments=self.rows, drop_p=DROP_P, dtype=self.dtype)


LLAMA_1B = Shape(
    dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=LLAMA.H,
        num_key_value_heads=LLAMA.Hk,
        head_dim=LLAMA.D,
        vocab_size=128256,
        max_position_embeddings=1 << 17,
    ),
    rows=LLAMA.B,
    tokens=LLAMA.S,
    dtype=torch.bfloat16,
)
TINY = Shape(
    dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
        max_position_embeddings=256,
    ),
    rows=3,
    tokens=4,
    dtype=torch.float32,
)
SHAPES = {"cuda": LLAMA_1B, "cpu": TINY}


def jobs(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What compiles last, and Triton's kernels beside those that "auto" takes."""
    backends = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}[device]
    wanted = [(mode, P, backends[0]) for P in LENGTHS[device] for mode in MODES[:-1]]
    wanted += [(MODES[-1], P, backends[0]) for P in LENGTHS[device]]
    wanted += [(mode, P, name) for name in backends[1:] for P in LENGTHS[device] for mode in ("eager", GRAPH)]
    return {
        f"P={P} {mode}" + ("" if mode == AUTHORS else f" ({backend})"): partial(run, mode, P, backend, device)
        for mode, P, backend in wanted
    }


@cache
def make_model(device: str) -> Any:
    """A random model in eval mode with frozen weights."""
    import transformers

    shape = SHAPES[device]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(tie_word_embeddings=True, initializer_range=0.05, **shape.config)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def start(shape: Shape, P: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values `[Hk, P, D]` of every layer."""
    torch.manual_seed(1)
    size = (shape.config["num_key_value_heads"], P, shape.config["head_dim"])
    layers = shape.config["num_hidden_layers"]
    keys, values = ([torch.randn(size, device=device) for _ in range(layers)] for _ in range(2))
    return keys, values


def token_rows(shape: Shape) -> list[list[int]]:
    """Tokens of the rows, and a last one, which is the answer."""
    torch.manual_seed(2)
    return torch.randint(1, shape.config["vocab_size"], (shape.rows, shape.tokens + 1)).tolist()


def run(mode: str, P: int, backend: str, device: str) -> dict[str, Any]:
    """Milliseconds of a step, the host's share of it, peak memory, and the first step's loss and gradient norm."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    shape = SHAPES[device]
    try:
        found = plain(shape, P, device) if mode == AUTHORS else ours(mode, shape, P, backend, device)
    except torch.cuda.OutOfMemoryError as error:
        if mode != AUTHORS:
            raise
        return {"reason": f"out of memory: {str(error).splitlines()[0][:150]}"}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        model = make_model(device)
        weights = sum(p.numel() for p in model.model.layers.parameters())
        predicted = predictions.step_ms(
            shape.case(P), shape.config["num_hidden_layers"], weights, model.lm_head.weight.numel(), found["gpu"]
        )
        found["predicted_ms"] = predicted if mode != AUTHORS else None
    return found


def plain(shape: Shape, P: int, device: str) -> dict[str, Any]:
    """The authors' loop."""
    from ctkernels.tuning.methods.ct_kv import CtKvOptions

    model, tokens = make_model(device), token_rows(shape)
    keys, values = ([x.to(shape.dtype)[None].requires_grad_() for x in part] for part in start(shape, P, device))
    rows = [plain_ctkv.PlainRow(row, shape.tokens, index) for index, row in enumerate(tokens)]
    seed = CtKvOptions().dropout_seed(0)
    case = shape.case(P)
    visible = case.mask(device, seed).dense(shape.rows, P).to(device)
    optimizer = torch.optim.AdamW([*keys, *values], lr=LR, weight_decay=0.0)

    def step() -> tuple[float, Tensor]:
        return plain_ctkv.step(model, keys, values, rows, visible, optimizer)

    loss, norm = step()
    return {"loss": loss, "grad_norm": float(norm), **times(step, device)}


def ours(mode: str, shape: Shape, P: int, backend: str, device: str) -> dict[str, Any]:
    """One of our ways to run a step."""
    torch._dynamo.reset()
    if mode in (TRAINER, GRAPH):
        return trained(mode, shape, P, backend, device)
    learner, settings = make_learner(shape, P, backend, device)
    with stepping(learner, settings, mode, device) as step:
        loss, norm = step()
        first = {"loss": float(loss), "grad_norm": float(norm)}
        found = {**first, **times(step, device)}
        return found | timing.profiled(step) if device == "cuda" else found


def trained(mode: str, shape: Shape, P: int, backend: str, device: str) -> dict[str, Any]:
    """The trainer, with its steps as graphs or without. Its epochs have one step each."""
    from ctkernels.testing.recorded import RecordedGraphs
    from ctkernels.tuning.hf.forward import frozen
    from ctkernels.tuning.train import trainer
    from ctkernels.tuning.train.graphs import CapturedSteps, captured_steps
    from ctkernels.tuning.train.loop import run_epoch

    learner, settings = make_learner(shape, P, backend, device, "on" if mode == GRAPH and device == "cuda" else "off")
    rehearsed = mode == GRAPH and device == "cpu"
    with patch.object(trainer, "FUSED", ("cuda", device)) if rehearsed else nullcontext():  # a GPU's AdamW
        training = trainer.Training(make_model(device), learner, settings)
    steps = CapturedSteps(training, RecordedGraphs()) if rehearsed else captured_steps(training)
    with frozen(training.model, but=training.parameters.values()):
        training.begin()
        found = times(lambda: run_epoch(training, steps), device)
        if device == "cuda":
            found |= timing.profiled(lambda: run_epoch(training, steps))
    first = training.history[0]
    note = {"note": "recorded, not captured, on the CPU"} if rehearsed else {}
    return {"loss": first.loss, "grad_norm": first.grad_norm, **found, **note}


def make_learner(shape: Shape, P: int, backend: str, device: str, graph: str = "off") -> tuple[Any, Any]:
    """A learner of the prefix with one row per demonstration, and its settings."""
    from ctkernels.tuning import KVPrefix
    from ctkernels.tuning.adapters.prefix import PrefixMetadata
    from ctkernels.tuning.data.formats import Row
    from ctkernels.tuning.hf.models import architecture, config_hash
    from ctkernels.tuning.methods.ct_kv import CtKvOptions
    from ctkernels.tuning.train.learners import PrefixLearner

    model = make_model(device)
    config = model.config
    metadata = PrefixMetadata(type(model).__name__, "", config_hash(config), architecture=architecture(config))
    segments = torch.linspace(0, P, shape.rows + 1).long()
    prefix = KVPrefix(*start(shape, P, device), segments, P, metadata).to(device)
    prefix.assume_weights(model)  # they are random, and their fingerprint takes longer than all steps
    rows = [Row(tuple(row[:-1]), ((row[-1],),), held_out=index) for index, row in enumerate(token_rows(shape))]
    settings = CtKvOptions(epochs=100, lr=LR, drop_p=DROP_P, backend=backend, graph=graph)
    return PrefixLearner(model, prefix, rows, settings), settings


@contextmanager
def stepping(learner: Any, settings: Any, mode: str, device: str) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """A function that runs a step on a batch that stays on the device, and returns loss and gradient norm."""
    from ctkernels.tuning.data.batches import make_batch

    rows = learner.rows(0)
    batch = make_batch(rows, range(len(rows)), settings.layout).to(device)
    parameters = list(learner.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, capturable=device == "cuda")

    def loss_of_batch() -> Tensor:
        return learner.losses(batch, settings.dropout_seed(0)).mean()

    if mode == "compiled":
        loss_of_batch = torch.compile(loss_of_batch, backend="inductor" if device == "cuda" else "eager")

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        return loss.detach(), norm

    with learner.attached(settings.backend):
        yield step


def times(step: Callable[[], Any], device: str, steps: int = 10) -> dict[str, Any]:
    """Milliseconds of a step when steps follow one another, and until its call returns."""
    steps = steps if device == "cuda" else 2
    for _ in range(WARM_UP if device == "cuda" else 1):
        step()
    timing.synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter() - started
    timing.synchronize(device)
    both = time.perf_counter() - started
    return {"step_ms": 1e3 * both / steps, "host_ms": 1e3 * host / steps, "gpu": gpu_of(device)}


def gpu_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else ""
