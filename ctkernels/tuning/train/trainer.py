"""The one training loop, whatever is trained:

    for each epoch:
        rows  <- of the learner; seed <- (settings.seed, epoch)     token dropout, drawn once per (row, token)
        for each step: all rows, or `batch_rows` of them in a new random order
            lr    <- cosine from settings.lr to 0 over all steps, no warm-up     (`steps` of them, or `epochs` passes)
            loss  <- mean over the step's rows of the objective (nats; by default the mean cross-entropy of the row's
                     answer tokens, which `reduction="tokens"` weighs by their number)
            step  <- AdamW(betas 0.9/0.999, no decay) on the gradient of all of them (and of the learner's penalty),
                     its norm clipped

The gradient is that of `passes.py`. A `Training` is what happens around it, for one learner: `loop.py` runs one, its
steps as CUDA graphs if they can be (`graphs.py`), and `together.py` several side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ctkernels.tuning.data.batches import Batch, make_batch
from ctkernels.tuning.data.demonstrations import DataError
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.objectives import Forward
from ctkernels.tuning.train.checkpoint import Checkpoint, fingerprint, model_fingerprint
from ctkernels.tuning.train.distributed import Ranks, is_sharded
from ctkernels.tuning.train.learners import Learner
from ctkernels.tuning.train.options import LoopOptions
from ctkernels.tuning.train.passes import Pass, Step, make_passes, run_passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED = ("cuda",)  # device types whose AdamW is one launch


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


def losses_of(training: Training) -> Tensor:
    """Run the passes of the next step, with the learner attached; the sum of the losses of this process's rows."""
    learner, step, device = training.learner, training.next_step(), training.model.device

    def forward(batch: Batch, _: Sequence[int]) -> Forward:
        return learner.forward(batch, step.seed)

    return run_passes(training.passes_of(step, device), 1, training.settings, forward, device)[0]


def adamw(parameters: Collection[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW without decay. On a GPU it is one launch that reads the learning rate from memory, as a captured one must,
    so that steps have the same bits, captured or not."""
    devices = {p.device for p in parameters}
    if len(devices) > 1 or next(iter(devices)).type not in FUSED or any(isinstance(p, DTensor) for p in parameters):
        return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    rate = torch.tensor(lr, dtype=torch.float32, device=devices.pop())
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True, capturable=True)


Outcome = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class _Epoch:
    """An epoch that has begun: its number from 0, its rows, the rows of each step, and what its steps so far have left.

    unread: wait for the gradient norm and the loss of a step, of those that are not read yet.
    """

    number: int
    rows: Sequence[Row]
    steps: Sequence[list[int]]
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    lrs: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    unread: list[Outcome] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)


class Training:
    """One learner in training: its steps, epochs and checkpoints, but for the passes through the model.

        begin, until done: (next_step, take) until epoch_over, end_epoch; end

    The model is frozen from `begin` to the last `end_epoch`. Only between these calls, whoever makes them may have the
    learner attached.

    Args:
        model, learner, settings: what is trained, and how.
        run: how it is kept and watched.
        stage: name of one of several loops of a run, whose checkpoint has a folder of its own.
        identity: what the run depends on besides settings, rows and model, as JSON values by name.
        watch: items that choose the epoch whose outcome is kept.

    Attributes:
        parameters: what is trained, by name.  history: the epochs so far.

    Raises:
        DataError: no rows.
        ValueError: a checkpoint that the run does not resume; an objective that a sharded model cannot have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        learner: Learner,
        settings: LoopOptions,
        run: RunControl | None = None,
        *,
        stage: str = "",
        identity: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.model, self.learner, self.settings, self.watch = model, learner, settings, watch
        self.run, self.stage = run or RunControl(), stage
        ranks = self.run.ranks
        self._first_rows = rows = learner.rows(0)
        if not rows:
            raise DataError("training needs demonstrations, got none")
        self.per_epoch = len(self._steps(len(rows), 0))
        self.total_steps = settings.epochs * self.per_epoch if settings.steps is None else settings.steps
        self.epochs = math.ceil(self.total_steps / self.per_epoch)
        self.parameters = learner.parameters()
        self.optimizer = adamw(self.parameters.values(), settings.lr)
        self._now = {**self.parameters, **learner.state()}
        self._best = {} if watch is None else {f"best.{name}": x.detach().clone() for name, x in self._now.items()}
        self.history: list[EpochRecord] = []
        self._curve: list[float] = []  # losses of the held-out items
        self._epoch: _Epoch | None = None
        self._ended: list[_Epoch] = []  # not recorded yet, since a step of theirs is unread
        self._recorded = 0.0  # when the last one was
        self._passes: tuple[Step, torch.device, list[Pass]] | None = None  # of the last step
        known = {}
        if self.run.checkpoint_dir is not None or ranks.size > 1:
            known = _identity(model, learner, rows, settings)
        ranks.agree(**known)
        ranks.share_start(self.parameters.values())
        self._store = None
        if self.run.checkpoint_dir is not None:
            self._store = Checkpoint(self.run.checkpoint_dir / stage, {**(identity or {}), **known})
            if self._store.exists() and not self.run.resume:
                raise ValueError(
                    f"checkpoint_dir already holds {self._store.path}; resume from it, or choose another folder"
                )

    @property
    def bytes(self) -> int:
        """Of what is trained with its gradient and the optimiser's two moments, and of what a checkpoint keeps beside
        it."""
        kept = sum(x.nbytes for x in (*self._now.values(), *self._best.values()))
        return kept + 3 * sum(x.nbytes for x in self.parameters.values())

    @property
    def done(self) -> bool:
        """Whether all epochs have been run, or one has ended the run."""
        return self._begun >= self.epochs or (bool(self.history) and self.history[-1].stopped)

    @property
    def _begun(self) -> int:
        """How many epochs have ended."""
        return len(self.history) + len(self._ended)

    @property
    def epoch_over(self) -> bool:
        """Whether the epoch that has begun has no steps left."""
        return self._epoch is not None and len(self._epoch.lrs) == len(self._epoch.steps)

    def begin(self) -> None:
        """Prepare the learner, go on from the checkpoint if there is one, and look at the held-out items.

        Raises:
            CheckpointError: a checkpoint of another run.
        """
        learner, layout, ranks, rows = self.learner, self.settings.layout, self.run.ranks, self._first_rows
        singly = (make_batch(rows, [i], layout, learner.lead).to(self.model.device) for i in range(len(rows)))
        with learner.attached(self.settings.backend):
            learner.before_training(singly)  # before a checkpoint replaces the start
        if self._store is not None and self._store.exists():
            saved = self._store.load({**self._now, **self._best}, self.optimizer)
            self.history = [EpochRecord(**record) for record in saved]
        ranks.agree(checkpoint=f"checkpoint after {len(self.history)} epochs")
        self._curve = [loss for r in self.history for loss in (r.held_out_start, r.held_out) if loss is not None]
        if self.watch is not None and not self._curve:
            self._curve = [ranks.first(self.watch.loss())]
            _copy(self._now.values(), self._best.values())

    def next_step(self) -> Step:
        """The rows of the next step; gradients are zero then, and what is learned is what they have to be taken of.
        Asking again without `take` gives the same step again."""
        number = self._begun
        before = number * self.per_epoch
        if self._epoch is None:
            rows = self.learner.rows(number)
            self._epoch = _Epoch(number, rows, self._steps(len(rows), number)[: self.total_steps - before])
        taken = len(self._epoch.lrs)
        self._lr = 0.5 * self.settings.lr * (1 + math.cos(math.pi * (before + taken) / self.total_steps))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self._lr)
            else:
                group["lr"] = self._lr
        self.optimizer.zero_grad()
        return Step(self._epoch.rows, self._epoch.steps[taken], self.settings.dropout_seed(number))

    def passes_of(self, step: Step, device: torch.device) -> list[Pass]:
        """The passes of this process for a step, on a device; those of the last one if its rows are the same."""
        if self._passes is not None:
            last, where, made = self._passes
            if last.rows is step.rows and last.indices == step.indices and where == device:
                return made
        ranks = self.run.ranks
        together = ranks.size > 1 and is_sharded(self.model)
        made = [each.to(device) for each in make_passes([step], self.settings, ranks, self.learner.lead, together)]
        self._passes = step, device, made
        return made

    def take(self, losses: Tensor) -> None:
        """The optimiser's step on the gradients that are there now.

        losses: sum of the losses of this process's rows of the step, fp64 `[]`.

        Raises:
            TrainingError: the loss or the gradient is not finite, or there is none; what is learned has not changed.
        """
        norm, losses = self.clip(losses)
        assert self._epoch is not None
        self._note(self._epoch, norm, losses)
        self._epoch.lrs.append(self._lr)
        self.step()

    def clip(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Complete the gradient, and clip it. Returns its norm before, and the sum of the losses of all processes."""
        parameters = self.parameters
        penalty = self.learner.penalty() if self.run.ranks.rank == 0 else None
        if penalty is not None:
            penalty.backward()
        self._require_gradients()
        losses = self.run.ranks.sum(parameters.values(), losses)
        self.learner.before_step()
        return torch.nn.utils.clip_grad_norm_(parameters.values(), self.settings.clip_norm or math.inf), losses

    def step(self) -> None:
        """The step itself, on a clipped gradient."""
        self.optimizer.step()
        self.learner.after_step()

    def taken(self, outcome: Outcome) -> None:
        """A step has been taken whose gradient norm and loss come later; those of the steps before are there now."""
        assert self._epoch is not None
        self._epoch.lrs.append(self._lr)
        self._epoch.unread.append(outcome)
        self._catch_up(1)

    def _catch_up(self, behind: int) -> None:
        """Read what steps have left, but for the last `behind` of them, and record the epochs that are complete.

        Raises:
            TrainingError, Interrupted: as `take` and `end_epoch`.
        """
        epochs = [*self._ended, *([] if self._epoch is None else [self._epoch])]
        excess = sum(len(epoch.unread) for epoch in epochs) - behind
        for epoch in epochs:
            while epoch.unread and excess > 0:
                self._note(epoch, *epoch.unread.pop(0)())
                excess -= 1
        while self._ended and not self._ended[0].unread:
            self._record(self._ended.pop(0))

    def _note(self, epoch: _Epoch, norm: Tensor, losses: Tensor) -> None:
        total = epoch.total + losses
        if not torch.isfinite(norm) or not torch.isfinite(total):
            seen = sum(map(len, epoch.steps))
            raise TrainingError(
                f"epoch {epoch.number + 1}: the loss is {total.item() / seen} and the gradient norm "
                f"{float(norm)}; try a smaller lr than {self.settings.lr}, or a wider dtype than {self.model.dtype}"
            )
        epoch.total = total
        epoch.norms.append(norm)

    def end_epoch(self) -> None:
        """Record the epoch, ask the held-out items and `on_epoch`, and write a checkpoint if one is due.

        If nobody looks at what is learned between epochs, the last step may be read when the next epoch has begun.

        Raises:
            Interrupted: `RunControl.ends` said so, and the run can be resumed.
        """
        assert self._epoch is not None
        self._ended.append(self._epoch)
        self._epoch = None
        looked_at = self.run.on_epoch or self.run.ends or self.watch or self._store
        self._catch_up(0 if looked_at or self.done else 1)

    def _record(self, epoch: _Epoch) -> None:
        run, curve = self.run, self._curve
        norm = float(torch.stack(epoch.norms).mean())
        record = EpochRecord(
            epoch=len(self.history) + 1,
            loss=epoch.total.item() / sum(map(len, epoch.steps)),
            lr=epoch.lrs[0],
            grad_norm=norm,
            seconds=time.perf_counter() - max(epoch.started, self._recorded),
            stage=self.stage,
            steps=len(epoch.steps),
        )
        self._recorded = time.perf_counter()
        if self.watch is not None:
            start = None if self.history else curve[0]
            curve.append(run.ranks.first(self.watch.loss()))
            record = replace(record, held_out=curve[-1], held_out_start=start)
            if curve[-1] < min(curve[:-1]):
                _copy(self._now.values(), self._best.values())
        stop = run.on_epoch is not None and bool(run.on_epoch(record, self.learner.module))
        if self.watch is not None and self.watch.patience is not None:
            stop |= len(curve) - 1 - curve.index(min(curve)) >= self.watch.patience
        self.history.append(replace(record, stopped=self._any(stop)))
        ends = self._any(run.ends is not None and run.ends())
        due = record.epoch % run.checkpoint_every == 0 or self.done or ends
        if self._store is not None and due and run.ranks.writes:
            self._store.save({**self._now, **self._best}, self.optimizer, [asdict(r) for r in self.history])
        if ends and not self.done:
            raise Interrupted

    def end(self) -> list[EpochRecord]:
        """Leave the learner as its best epoch left it, without gradients. Returns the history."""
        self.optimizer.zero_grad()
        _copy(self._best.values(), self._now.values() if self._best else ())
        return self.history

    def _any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return bool(self.run.ranks.sum((), torch.tensor(float(flag), dtype=torch.float64)))

    def _steps(self, count: int, epoch: int) -> list[list[int]]:
        """Indices of the rows of each optimiser step of an epoch."""
        size = self.settings.batch_rows
        if size is None or size >= count:
            return [list(range(count))]
        generator = torch.Generator().manual_seed(self.settings.dropout_seed(epoch))
        order = torch.randperm(count, generator=generator).tolist()
        return [order[i : i + size] for i in range(0, count, size)]

    def _require_gradients(self) -> None:
        missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if missing:
            raise TrainingError(
                f"no gradient reached {', '.join(missing[:4])}{', ...' if missing[4:] else ''}: something in "
                f"{type(self.model).__name__} has no derivative, such as quantised layers that were run in eval mode "
                "before"
            )


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for x, y in zip(source, target, strict=True):
        y.copy_(x)


def _identity(model: PreTrainedModel, learner: Learner, rows: Sequence[Row], settings: LoopOptions) -> dict[str, Any]:
    """What the bits of a run depend on, by name."""
    tokens = [(r.tokens, r.answers, r.held_out, r.predicted_at, *r.choices) for r in rows]
    return {
        **asdict(settings),
        "demonstrations": fingerprint((learner.identity(), tokens)),
        "model": model_fingerprint(model),
    }
