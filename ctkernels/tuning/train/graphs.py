"""Optimiser steps as CUDA graphs: forward, loss, backward, clipping and AdamW are launched by one call.

    shape of a step      how many passes it has, and the sizes of their tensors
    1st step of a shape  runs as it would without graphs, on the stream of the captures: its warm-up
    2nd                  is captured, which runs nothing, and replayed
    later ones           what differs between steps is copied to where the graph reads it; then the graph is replayed

Every one of them is a step of the run, and all of them run the same function: which one a step is changes no bit. What
differs between steps lies in memory: rows, the seed of what is drawn, the learning rate. Where steps have random rows
(`batch_rows`), batches have sizes that many of them share (`levelled`).

The host does not wait for a step before it launches the next one: norm and loss are copied to it and read when the next
step is launched (`Training.taken`). So that what is learned does not change even so where they are not finite, a flag
in memory then stops AdamW for good.

What the loop needs of the device is a `Graphs`: the CUDA runtime's is here, tests have one that records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ctkernels.backends import finite
from ctkernels.tuning.data.batches import Batch, levelled
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.objectives import Forward
from ctkernels.tuning.train.distributed import Ranks, is_sharded
from ctkernels.tuning.train.options import LoopOptions
from ctkernels.tuning.train.passes import Pass, layout_of, run_passes
from ctkernels.tuning.train.trainer import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outputs = tuple[Tensor, Tensor]  # gradient norm and loss
log = logging.getLogger(__name__)


class Graphs(Protocol):
    """What captured steps need of a device."""

    def running(self) -> Any:
        """The block in which steps are run, captured and replayed, after all that was launched before it."""

    def capture(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record what `run` launches. Returns what launches it again, and where its results then are."""

    def fetch(self, tensors: Outputs) -> Callable[[], Outputs]:
        """Copy to the host, without waiting. Returns what waits for the copies."""

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy from the host, without waiting."""


class CudaGraphs:
    """The CUDA runtime. The graphs of a run share their memory: no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def running(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def capture(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outputs = run()
        return graph.replay, outputs

    def fetch(self, tensors: Outputs) -> Callable[[], Outputs]:
        first, second = (torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors)
        for copy, x in zip((first, second), tensors, strict=True):
            copy.copy_(x, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Outputs:
            copied.synchronize()
            return first, second

        return wait

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source.pin_memory(), non_blocking=True)


def refusal(model: PreTrainedModel, settings: LoopOptions, ranks: Ranks) -> str | None:
    """Why the steps of a run cannot be captured, in words, or None."""
    decoder = find_decoder(model)
    if model.device.type != "cuda":
        return f"they run on {model.device.type}, and graphs are CUDA's"
    if ranks.size > 1 or is_sharded(model):
        return "several processes share them"
    if len({x.device for x in model.parameters()}) > 1:
        return "the model is on several devices"
    if getattr(model, "quantization_method", None) is not None or getattr(model, "is_quantized", False):
        return "the weights are quantised"
    if decoder.keepers:
        return f"{type(decoder.model).__name__} has layers that keep a state, whose rows the host sets up"
    if getattr(model, "is_gradient_checkpointing", False):
        return "gradient checkpointing runs layers again"
    if settings.minimised.choices != "none":
        return f"the objective {settings.minimised.name!r} finds on the host what each row has to run"
    if layout_of(settings) != "packed":
        return 'the host reads the padding of a batch; layout="packed" has none'
    if getattr(settings, "lora_dropout", 0):
        return "lora_dropout draws on the host's behalf"
    if settings.backend == "reference":
        return "the reference backend reads values on the host"
    if finite.enabled():
        return f"{finite.VARIABLE} reads values on the host"
    return None


def require_capture(model: PreTrainedModel, settings: LoopOptions, ranks: Ranks) -> None:
    """Raise ValueError if `graph="on"`, and the steps of a run cannot be captured."""
    reason = refusal(model, settings, ranks) if settings.graph == "on" else None
    if reason is not None:
        raise ValueError(f"graph='on' captures the steps of a run, and they cannot be captured: {reason}")


def captured_steps(training: Training) -> CapturedSteps | None:
    """What takes the steps of a training as graphs; None: it takes them itself. Raises as `require_capture`."""
    settings, model, ranks = training.settings, training.model, training.run.ranks
    require_capture(model, settings, ranks)
    if settings.graph == "off":
        return None
    reason = refusal(model, settings, ranks)
    if reason is None:
        return CapturedSteps(training, CudaGraphs(model.device))
    if model.device.type == "cuda":
        log.info("steps are not captured: %s", reason)
    return None


@dataclass
class _Memory:
    """Passes of one shape: all of their numbers in one tensor, of which theirs are views.

    held: the passes that it holds.  replay, outputs: of the graph, if there is one.
    """

    numbers: Tensor
    passes: list[Pass]
    held: Sequence[Pass]
    replay: Callable[[], None] | None = None
    outputs: Outputs | None = None

    @classmethod
    def of(cls, passes: Sequence[Pass], device: torch.device) -> _Memory:
        numbers = _numbers(passes).to(device)
        made, at = [], 0
        for each in passes:
            views = {}
            for name, x in _tensors(each).items():
                view = numbers[at : at + x.numel()].view_as(x)
                views[name] = view.view(torch.float64) if x.is_floating_point() else view
                at += x.numel()
            made.append(_with(each, views))
        return cls(numbers, made, passes)


@dataclass
class CapturedSteps:
    """The steps of a training, as graphs of a device."""

    training: Training
    graphs: Graphs
    captures: bool = True  # until one has failed
    shapes: dict[tuple, _Memory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.training.model.device
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._failed = torch.zeros((), dtype=torch.float32, device=device)
        self._host: tuple[list[Pass], list[Pass]] | None = None  # passes as they were made, and levelled
        optimizer: Any = self.training.optimizer
        optimizer.found_inf = self._failed  # AdamW does nothing where it is 1

    def running(self) -> Any:
        """The block in which steps are taken; the learner is attached in it when it has to be."""
        return self.graphs.running()

    def take(self) -> None:
        """The next step of the training.

        Raises:
            TrainingError: an earlier step's loss or gradient is not finite; what is learned is as before it.
            RuntimeError: `graph="on"`, and the step cannot be captured.
        """
        step = self.training.next_step()
        passes = self._passes_of(self.training.passes_of(step, torch.device("cpu")))
        shape = tuple(_shape(each) for each in passes)
        self._seed.fill_(step.seed)
        memory = self.shapes.get(shape)
        if memory is None:
            memory = self.shapes[shape] = _Memory.of(passes, self.training.model.device)
            outputs = self._attached(lambda: self._run(memory.passes))
        else:
            if memory.held is not passes:
                self.graphs.send(_numbers(passes), memory.numbers)
                memory.held = passes
            if memory.replay is None and self.captures:
                self._capture(memory)
            if memory.replay is None:
                outputs = self._attached(lambda: self._run(memory.passes))
            else:
                memory.replay()
                assert memory.outputs is not None
                outputs = memory.outputs
        self.training.taken(self.graphs.fetch(outputs))

    def _passes_of(self, made: list[Pass]) -> list[Pass]:
        if self.training.per_epoch == 1:  # all rows, in every step
            return made
        if self._host is None or self._host[0] is not made:
            self._host = made, [_levelled(each) for each in made]
        return self._host[1]

    def _attached(self, run: Callable[[], Any]) -> Any:
        with self.training.learner.attached(self.training.settings.backend):
            return run()

    def _capture(self, memory: _Memory) -> None:
        try:
            captured = self._attached(lambda: self.graphs.capture(lambda: self._run(memory.passes)))
            memory.replay, memory.outputs = captured
        except Exception as error:
            name, reason = type(self.training.model).__name__, f"{type(error).__name__}: {error}"
            if self.training.settings.graph == "on":
                raise RuntimeError(f"graph='on': a step of {name} cannot be captured ({reason})") from error
            log.warning("a step of %s cannot be captured, steps run without graphs (%s)", name, reason)
            self.captures = False
            self.training.optimizer.zero_grad()

    def _run(self, passes: Sequence[Pass]) -> Outputs:
        """A step, of which the host reads nothing; the gradient norm and the sum of the losses."""
        training = self.training

        def forward(batch: Batch, _: Sequence[int]) -> Forward:
            return training.learner.forward(batch, self._seed)

        losses = run_passes(passes, 1, training.settings, forward, training.model.device)[0]
        norm, losses = training.clip(losses)
        finite = torch.isfinite(norm) & torch.isfinite(losses)
        self._failed.copy_(torch.maximum(self._failed, (~finite).float()))
        training.step()
        return norm, losses


def _levelled(each: Pass) -> Pass:
    batch, factors = levelled(each.batch)
    new = len(factors) - len(each.factors)
    return replace(
        each,
        batch=batch,
        owners=each.owners + each.owners[-1:] * new,
        factors=factors * torch.nn.functional.pad(each.factors, (0, new)),
        shares=torch.nn.functional.pad(each.shares, (0, new)),
    )


def _tensors(each: Pass) -> dict[str, Tensor]:
    """All tensors of a pass by name."""
    of_batch = {f.name: getattr(each.batch, f.name) for f in fields(Batch)}
    found = {name: x for name, x in of_batch.items() if isinstance(x, Tensor)}
    return {**found, "factors": each.factors, "shares": each.shares}


def _with(each: Pass, tensors: dict[str, Tensor]) -> Pass:
    of_batch = {name: x for name, x in tensors.items() if name not in ("factors", "shares")}
    batch = replace(each.batch, **of_batch)
    return replace(each, batch=batch, factors=tensors["factors"], shares=tensors["shares"])


def _numbers(passes: Sequence[Pass]) -> Tensor:
    """All numbers of passes, int64; the bits of those that are fp64."""
    tensors = [x.contiguous() for each in passes for x in _tensors(each).values()]
    return torch.cat([(x.view(torch.int64) if x.is_floating_point() else x.long()).flatten() for x in tensors])


def _shape(each: Pass) -> tuple:
    """What a graph of a pass has fixed."""
    sizes = tuple((name, tuple(x.shape)) for name, x in _tensors(each).items())
    return sizes, each.batch.answer_sizes, each.owners, each.weight, each.count
