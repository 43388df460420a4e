"""The one training loop, whatever is trained:

    for each epoch:
        rows  <- of the learner; seed <- (settings.seed, epoch)     token dropout, drawn once per (row, token)
        for each step: all rows, or `batch_rows` of them in a new random order
            lr    <- cosine from settings.lr to 0 over all steps, no warm-up     (`steps` of them, or `epochs` passes)
            loss  <- mean over the step's rows of the objective (nats; by default the mean cross-entropy of the row's
                     answer tokens, which `reduction="tokens"` weighs by their number)
            step  <- AdamW(betas 0.9/0.999, no decay) on the gradient of all of them (and of the learner's penalty),
                     its norm clipped

Rows run packed back to back (or right-padded) in micro-batches of at most `max_tokens` tokens; each contributes
`sum of its rows' losses / number of the step's rows`, so that loss and gradient do not depend on how they are split,
nor on how many processes share the rows of a step (`distributed.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctkernels.tuning.data.batches import Layout, make_batch, split_by_tokens
from ctkernels.tuning.data.demonstrations import DataError
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.objectives import OBJECTIVES, Weights
from ctkernels.tuning.train.checkpoint import Checkpoint, fingerprint, model_fingerprint
from ctkernels.tuning.train.distributed import Ranks, is_sharded
from ctkernels.tuning.train.learners import Learner
from ctkernels.tuning.train.options import LoopOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainingError(ArithmeticError):
    """Training that cannot go on: the loss or its gradient is not finite, or there is none."""


class Interrupted(KeyboardInterrupt):
    """A training that `RunControl.ends` ended behind an epoch, and behind its checkpoint."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number from 1, the mean loss of its rows before their steps (without penalty), the learning rate
    of its first step, the gradient norm before clipping (mean over steps), and the time in seconds. `stage` names one
    of several loops of a run, "" the last. `stopped`: it was the last one, since `on_epoch` or the held-out items said
    so. `steps`: optimiser steps it took, 0 if an earlier version did not record them. `held_out`: loss of the held-out
    items after the epoch, None without any; `held_out_start`: before the first one, in its record."""

    epoch: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    stage: str = ""
    stopped: bool = False
    steps: int = 0
    held_out: float | None = None
    held_out_start: float | None = None


OnEpoch = Callable[[EpochRecord, nn.Module], bool | None]


@dataclass(frozen=True)
class RunControl:
    """How a run is kept, watched and shared among processes.

    checkpoint_dir, checkpoint_every: where to keep a checkpoint, and after how many epochs to replace it.
    resume: continue from the checkpoint, if there is one.
    on_epoch: called after every epoch, before its checkpoint; True ends the loop.
    ranks: the processes that share the rows of a step; default: this one alone.
    ends: asked after every epoch; True (in any process) writes a checkpoint and raises Interrupted, unless that epoch
        is the last one.

    Raises:
        ValueError: `checkpoint_every` below 1.
    """

    checkpoint_dir: Path | None = None
    checkpoint_every: int = 5
    resume: bool = False
    on_epoch: OnEpoch | None = None
    ranks: Ranks = field(default_factory=Ranks)
    ends: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")


@dataclass(frozen=True)
class Watch:
    """Held-out items, looked at before the first epoch and after each. What had their lowest loss is what is returned.

    loss: theirs, in nats, under what is trained as it is now; nothing is attached when it is called.
    patience: so many epochs without a lower loss end the loop; None: all epochs run.
    """

    loss: Callable[[], float]
    patience: int | None = None


def train_learner(
    model: PreTrainedModel,
    learner: Learner,
    settings: LoopOptions,
    run: RunControl | None = None,
    *,
    stage: str = "",
    identity: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> list[EpochRecord]:
    """Train `learner` in place; errors as in `methods.tune`.

    stage: name of one of several loops of a run, whose checkpoint has a folder of its own.
    identity: what the run depends on besides settings, rows and model, as JSON values by name.
    watch: items that choose the epoch whose outcome is kept.
    """
    run = run or RunControl()
    ranks = run.ranks
    rows = learner.rows(0)
    if not rows:
        raise DataError("training needs demonstrations, got none")
    loop = _Loop(model, learner, settings, ranks, len(rows))
    parameters, optimizer = loop.parameters, loop.optimizer
    now = {**parameters, **learner.state()}
    best = {} if watch is None else {f"best.{name}": x.detach().clone() for name, x in now.items()}
    kept = {**now, **best}
    history: list[EpochRecord] = []
    store, known = None, {}
    if run.checkpoint_dir is not None or ranks.size > 1:
        known = _identity(model, learner, rows, settings)
    ranks.agree(**known)
    ranks.share_start(parameters.values())
    if run.checkpoint_dir is not None:
        store = Checkpoint(run.checkpoint_dir / stage, {**(identity or {}), **known})
        if store.exists() and not run.resume:
            raise ValueError(f"checkpoint_dir already holds {store.path}; resume from it, or choose another folder")
    with frozen(model, but=parameters.values()):
        singly = (make_batch(rows, [i], settings.layout, learner.lead).to(model.device) for i in range(len(rows)))
        with learner.attached(settings.backend):
            learner.before_training(singly)  # before a checkpoint replaces the start
        if store is not None and store.exists():
            history = [EpochRecord(**record) for record in store.load(kept, optimizer)]
        ranks.agree(checkpoint=f"checkpoint after {len(history)} epochs")
        curve = [loss for r in history for loss in (r.held_out_start, r.held_out) if loss is not None]
        if watch is not None and not curve:
            curve = [ranks.first(watch.loss())]
            _copy(now.values(), best.values())
        while len(history) < loop.epochs and not (history and history[-1].stopped):
            with learner.attached(settings.backend):
                record = replace(loop.run_epoch(len(history)), stage=stage)
            if watch is not None:
                start = None if history else curve[0]
                curve.append(ranks.first(watch.loss()))
                record = replace(record, held_out=curve[-1], held_out_start=start)
                if curve[-1] < min(curve[:-1]):
                    _copy(now.values(), best.values())
            stop = run.on_epoch is not None and bool(run.on_epoch(record, learner.module))
            if watch is not None and watch.patience is not None:
                stop |= len(curve) - 1 - curve.index(min(curve)) >= watch.patience
            stops = ranks.sum((), torch.tensor(float(stop), dtype=torch.float64))
            history.append(replace(record, stopped=bool(stops)))
            ends = bool(ranks.sum((), torch.tensor(float(run.ends is not None and run.ends()), dtype=torch.float64)))
            last = record.epoch == loop.epochs or bool(stops)
            due = record.epoch % run.checkpoint_every == 0 or last or ends
            if store is not None and due and ranks.writes:
                store.save(kept, optimizer, [asdict(r) for r in history])
            if ends and not last:
                raise Interrupted
    optimizer.zero_grad()
    _copy(best.values(), now.values() if best else ())
    return history


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for x, y in zip(source, target, strict=True):
        y.copy_(x)


class _Loop:
    """The epochs of a training: what is trained, by which optimiser, and which rows each step takes."""

    def __init__(
        self, model: PreTrainedModel, learner: Learner, settings: LoopOptions, ranks: Ranks, count: int
    ) -> None:
        self.model, self.learner, self.settings, self.ranks = model, learner, settings, ranks
        self.per_epoch = len(self._steps(count, 0))
        self.total_steps = settings.epochs * self.per_epoch if settings.steps is None else settings.steps
        self.epochs = math.ceil(self.total_steps / self.per_epoch)
        self.objective = OBJECTIVES[settings.objective]
        reads_options = self.objective.choices != "none"
        self.layout: Layout = "padded" if reads_options else settings.layout
        if reads_options and ranks.size > 1 and is_sharded(model):
            raise ValueError(
                f"objective={settings.objective!r} runs a model as often as its options need, and processes that share "
                "its weights must all run it equally often; take objective='answers', or a model in one piece"
            )
        self.parameters = learner.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0
        )

    def run_epoch(self, epoch: int) -> EpochRecord:
        """All steps of an epoch, counted from 0."""
        started = time.perf_counter()
        settings, learner, parameters = self.settings, self.learner, self.parameters
        rows = learner.rows(epoch)
        before = epoch * self.per_epoch
        steps = self._steps(len(rows), epoch)[: self.total_steps - before]
        seen = sum(map(len, steps))
        first_lr, total, norms = 0.0, torch.zeros((), dtype=torch.float64, device=self.model.device), []
        for number, step in enumerate(steps):
            lr = 0.5 * settings.lr * (1 + math.cos(math.pi * (before + number) / self.total_steps))
            first_lr = lr if number == 0 else first_lr
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.zero_grad()
            losses = self._accumulate(rows, step, settings.dropout_seed(epoch))
            penalty = learner.penalty() if self.ranks.rank == 0 else None
            if penalty is not None:
                penalty.backward()
            self._require_gradients()
            total += self.ranks.sum(parameters.values(), losses)
            learner.before_step()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm or math.inf))
            if not torch.isfinite(norms[-1]) or not torch.isfinite(total):
                raise TrainingError(
                    f"epoch {epoch + 1}: the loss is {total.item() / seen} and the gradient norm "
                    f"{float(norms[-1])}; try a smaller lr than {settings.lr}, or a wider dtype than {self.model.dtype}"
                )
            self.optimizer.step()
            learner.after_step()
        norm = float(torch.stack(norms).mean())
        seconds = time.perf_counter() - started
        return EpochRecord(epoch + 1, total.item() / seen, first_lr, norm, seconds, steps=len(steps))

    def _steps(self, count: int, epoch: int) -> list[list[int]]:
        """Indices of the rows of each optimiser step of an epoch."""
        size = self.settings.batch_rows
        if size is None or size >= count:
            return [list(range(count))]
        generator = torch.Generator().manual_seed(self.settings.dropout_seed(epoch))
        order = torch.randperm(count, generator=generator).tolist()
        return [order[i : i + size] for i in range(0, count, size)]

    def _accumulate(self, rows: Sequence[Row], step: list[int], seed: int) -> Tensor:
        """Add the gradient of this process's rows to that of the step's mean loss; returns the sum of their losses."""
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        per_row = sum(len(rows[i].answers[0]) for i in step) / len(step)  # labels
        for indices, weight in self._micro_batches(rows, step):
            batch = make_batch(rows, indices, self.layout, self.learner.lead).to(self.model.device)
            factors = torch.ones(len(indices), dtype=torch.float64, device=self.model.device)
            if self.settings.reduction == "tokens":
                factors = torch.tensor(batch.answer_sizes).to(factors) / per_row
            weights = Weights(self.settings.score, self.settings.mixed, factors)
            losses = self.objective.losses(self.learner.forward(batch, seed), weights)
            (weight * losses.sum() / len(step)).backward()
            total += weight * losses.detach().double().sum()
        return total

    def _micro_batches(self, rows: Sequence[Row], step: list[int]) -> list[tuple[list[int], float]]:
        """Indices of the rows of this process's micro-batches, and the weight of their losses.

        All processes run equally many, since a sharded model's forward pass is a collective call: one with fewer of its
        own repeats a row with weight 0.
        """
        batches = []
        for rank in range(self.ranks.size):
            share = self.ranks.share(step, rank)
            chosen = [rows[i] for i in share]
            groups = split_by_tokens(chosen, self.settings.max_tokens, self.layout, self.learner.lead)
            batches.append([[share[i] for i in group] for group in groups])
        mine, most = batches[self.ranks.rank], max(map(len, batches))
        return [(indices, 1.0) for indices in mine] + [([step[0]], 0.0)] * (most - len(mine))

    def _require_gradients(self) -> None:
        missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if missing:
            raise TrainingError(
                f"no gradient reached {', '.join(missing[:4])}{', ...' if missing[4:] else ''}: something in "
                f"{type(self.model).__name__} has no derivative, such as quantised layers that were run in eval mode "
                "before"
            )


def _identity(model: PreTrainedModel, learner: Learner, rows: Sequence[Row], settings: LoopOptions) -> dict[str, Any]:
    """What the bits of a run depend on, by name."""
    tokens = [(r.tokens, r.answers, r.held_out, r.predicted_at, *r.choices) for r in rows]
    return {
        **asdict(settings),
        "demonstrations": fingerprint((learner.identity(), tokens)),
        "model": model_fingerprint(model),
    }
