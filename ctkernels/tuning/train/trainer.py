"""The one training loop, whatever is trained:

    for each epoch:
        rows  <- of the learner; seed <- (settings.seed, epoch)     token dropout, drawn once per (row, token)
        for each step: all rows, or `batch_rows` of them in a new random order
            lr    <- cosine from settings.lr to 0 over all steps, no warm-up
            loss  <- mean over the step's rows of the mean cross-entropy (nats) of the row's answer tokens
            step  <- AdamW(betas 0.9/0.999, no decay) on the gradient of all of them (and of the learner's penalty),
                     its norm clipped

Rows run packed back to back (or right-padded) in micro-batches of at most `max_tokens` tokens; each contributes
`sum of its rows' means / number of the step's rows`, so that loss and gradient do not depend on how they are split, nor
on how many processes share the rows of a step (`distributed.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctkernels import dispatch
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.batches import make_batch, split_by_tokens
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import Row, TextFormat
from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.methods import Run, get_method
from ctkernels.tuning.methods.base import require_demonstrations, require_transferable, require_weights
from ctkernels.tuning.train.checkpoint import Checkpoint, fingerprint, model_fingerprint
from ctkernels.tuning.train.distributed import Ranks, is_sharded
from ctkernels.tuning.train.learners import Learner
from ctkernels.tuning.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainingError(ArithmeticError):
    """Training that cannot go on: the loss or its gradient is not finite, or there is none."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number from 1, the mean loss of its rows before their steps (without penalty), the learning rate
    of its first step, the gradient norm before clipping (mean over steps), and the time in seconds. `stage` names one
    of several loops of a run, "" the last. `stopped`: it was the last one, since `on_epoch` said so."""

    epoch: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    stage: str = ""
    stopped: bool = False


OnEpoch = Callable[[EpochRecord, nn.Module], bool | None]


@dataclass(frozen=True)
class TuneResult:
    """An adapter and how it came to be (`history` is empty for methods that train nothing)."""

    adapter: Adapter
    history: list[EpochRecord]

    @property
    def prefix(self) -> KVPrefix:
        """The adapter's prefix. For methods that also change weights, use the adapter."""
        return self.adapter.prefix


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    method: str = "ct-kv",
    settings: TrainSettings | None = None,
    text_format: TextFormat | None = None,
    *,
    start_from: Adapter | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    group: ProcessGroup | None = None,
) -> TuneResult:
    """Adapt a frozen model to a task: the adapter of `method` for these demonstrations, trained if the method trains.

    Args:
        model: a supported causal language model; its weights and its mode are left as they were.
        tokenizer: the model's.
        demonstrations: the task's pairs.
        method: a name of `methods.METHODS`.
        settings: default: those of the method.
        text_format: how pairs become tokens.
        start_from: another task's adapter of the same model to start from: methods that start from demonstrations
            put its prefix or prompt in front of them, others take it in place of their own; ttt takes its LoRA.
        checkpoint_dir, checkpoint_every: where to keep a checkpoint, and after how many epochs to replace it.
        resume: continue from the checkpoint, if there is one; the run ends with the same bits as if never stopped.
        on_epoch: called with the record and what is trained after every epoch, before its checkpoint, on every process;
            nothing is attached then, so that it may evaluate. True (from any process) ends the stage with this epoch.
        group: a `torch.distributed` process group whose processes all make this call and share the rows of each step;
            all of them return the result of one process, the first one writes checkpoints, which all of them must be
            able to read. None: this process alone.

    Raises:
        DataError: too few demonstrations, or more tokens than the model takes.
        ValueError: an unknown method; settings that it does not read; an adapter it cannot start from; an unknown or
            unavailable backend; sharded or offloaded weights that the method needs in one piece.
        TypeError: a model class that is not supported.
        CheckpointError: `resume` with other settings, data or model than the checkpoint's.
        TrainingError: the loss is not finite, or has no gradient.
        PeerError: another process of the group failed.
    """
    ranks = Ranks(group, model.device, sharded=is_sharded(model))
    with ranks.together():
        return _tune(
            model,
            tokenizer,
            demonstrations,
            method,
            settings,
            text_format,
            start_from=start_from,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
            on_epoch=on_epoch,
            ranks=ranks,
        )


def _tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    method: str,
    settings: TrainSettings | None,
    text_format: TextFormat | None,
    *,
    start_from: Adapter | None,
    checkpoint_dir: str | Path | None,
    checkpoint_every: int,
    resume: bool,
    on_epoch: OnEpoch | None,
    ranks: Ranks,
) -> TuneResult:
    how = get_method(method)
    settings = settings or how.settings()
    how.check(settings)
    require_demonstrations(how, len(demonstrations), settings)
    require_transferable(how, start_from, model)
    require_weights(how, model)
    if settings.backend is not None:
        dispatch.choose(settings.backend, model.device)  # refuses an unusable one before the model runs
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    history: list[EpochRecord] = []
    origin = None if start_from is None else _adapter_fingerprint(start_from)

    def train(learner: Learner, stage_settings: TrainSettings | None = None, stage: str = "") -> None:
        checkpoint = None
        if checkpoint_dir is not None:
            identity = {"method": method, "stage": stage, "start_from": origin}
            checkpoint = (Path(checkpoint_dir) / stage, identity)
        history.extend(
            train_learner(
                model,
                learner,
                stage_settings or settings,
                stage=stage,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                resume=resume,
                on_epoch=on_epoch,
                ranks=ranks,
            )
        )

    run = Run(
        model=model,
        tokenizer=tokenizer,
        demonstrations=tuple(demonstrations),
        method=method,
        reads=how.reads,
        settings=settings,
        text_format=text_format or TextFormat(),
        start_from=start_from,
        train=train,
    )
    return TuneResult(how.fit(run), history)


def train_learner(
    model: PreTrainedModel,
    learner: Learner,
    settings: TrainSettings,
    *,
    stage: str = "",
    checkpoint: tuple[Path, dict] | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    ranks: Ranks | None = None,
) -> list[EpochRecord]:
    """Train `learner` in place; arguments and errors as in `tune`.

    checkpoint: its folder, and what the run depends on besides settings, rows and model, by name.
    ranks: the processes that share the rows, default: this one alone.
    """
    ranks = ranks or Ranks()
    rows = learner.rows(0)
    if not rows:
        raise DataError("training needs demonstrations, got none")
    parameters = learner.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
    history: list[EpochRecord] = []
    store, run = None, {} if checkpoint is None and ranks.size == 1 else _identity(model, learner, rows, settings)
    ranks.agree(**run)
    ranks.share_start(parameters.values())
    if checkpoint is not None:
        folder, identity = checkpoint
        store = Checkpoint(folder, identity | run)
        if store.exists() and not resume:
            raise ValueError(f"checkpoint_dir already holds {store.path}; resume from it, or choose another folder")
    with frozen(model, but=parameters.values()):
        singly = (make_batch(rows, [i], settings.layout, learner.lead).to(model.device) for i in range(len(rows)))
        with learner.attached(settings.backend):
            learner.before_training(singly)  # before a checkpoint replaces the start
        if store is not None and store.exists():
            history = [EpochRecord(**record) for record in store.load(parameters, optimizer)]
        ranks.agree(checkpoint=f"checkpoint after {len(history)} epochs")
        while len(history) < settings.epochs and not (history and history[-1].stopped):
            with learner.attached(settings.backend):
                record = _train_epoch(model, learner, settings, len(history), parameters, optimizer, ranks)
            record = replace(record, stage=stage)
            stop = on_epoch is not None and bool(on_epoch(record, learner.module))
            stops = ranks.sum((), torch.tensor(float(stop), dtype=torch.float64))
            history.append(replace(record, stopped=bool(stops)))
            due = record.epoch % checkpoint_every == 0 or record.epoch == settings.epochs or bool(stops)
            if store is not None and due and ranks.writes:
                store.save(parameters, optimizer, [asdict(r) for r in history])
    optimizer.zero_grad()
    return history


def _train_epoch(
    model: PreTrainedModel,
    learner: Learner,
    settings: TrainSettings,
    epoch: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> EpochRecord:
    started = time.perf_counter()
    rows = learner.rows(epoch)
    steps = _steps(len(rows), settings, epoch)
    first_lr, total, norms = 0.0, torch.zeros((), dtype=torch.float64, device=model.device), []
    for number, step in enumerate(steps):
        progress = (epoch * len(steps) + number) / (settings.epochs * len(steps))
        lr = 0.5 * settings.lr * (1 + math.cos(math.pi * progress))
        first_lr = lr if number == 0 else first_lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        losses = _accumulate(model, learner, settings, epoch, rows, step, ranks)
        penalty = learner.penalty() if ranks.rank == 0 else None
        if penalty is not None:
            penalty.backward()
        missing = [name for name, parameter in parameters.items() if parameter.grad is None]
        if missing:
            raise TrainingError(
                f"no gradient reached {', '.join(missing[:4])}{', ...' if missing[4:] else ''}: something in "
                f"{type(model).__name__} has no derivative, such as quantised layers that were run in eval mode before"
            )
        total += ranks.sum(parameters.values(), losses)
        learner.before_step()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm or math.inf))
        if not torch.isfinite(norms[-1]) or not torch.isfinite(total):
            raise TrainingError(
                f"epoch {epoch + 1}: the loss is {total.item() / len(rows)} and the gradient norm {float(norms[-1])}; "
                f"try a smaller lr than {settings.lr}, or a wider dtype than {model.dtype}"
            )
        optimizer.step()
        learner.after_step()
    norm = float(torch.stack(norms).mean())
    return EpochRecord(epoch + 1, total.item() / len(rows), first_lr, norm, time.perf_counter() - started)


def _accumulate(
    model: PreTrainedModel,
    learner: Learner,
    settings: TrainSettings,
    epoch: int,
    rows: Sequence[Row],
    step: list[int],
    ranks: Ranks,
) -> Tensor:
    """Add the gradient that this process's rows give to the mean loss of a step; returns the sum of their losses."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for indices, weight in _micro_batches(rows, step, settings, learner.lead, ranks):
        batch = make_batch(rows, indices, settings.layout, learner.lead).to(model.device)
        losses = learner.losses(batch, settings.dropout_seed(epoch))
        (weight * losses.sum() / len(step)).backward()
        total += weight * losses.detach().double().sum()
    return total


def _micro_batches(
    rows: Sequence[Row], step: list[int], settings: TrainSettings, lead: int, ranks: Ranks
) -> list[tuple[list[int], float]]:
    """Indices of the rows of this process's micro-batches, and the weight of their losses.

    All processes run equally many, since a sharded model's forward pass is a collective call: one with fewer of its own
    repeats a row with weight 0.
    """
    batches = []
    for rank in range(ranks.size):
        share = ranks.share(step, rank)
        groups = split_by_tokens([rows[i] for i in share], settings.max_tokens, settings.layout, lead)
        batches.append([[share[i] for i in group] for group in groups])
    mine, most = batches[ranks.rank], max(map(len, batches))
    return [(indices, 1.0) for indices in mine] + [([step[0]], 0.0)] * (most - len(mine))


def _steps(count: int, settings: TrainSettings, epoch: int) -> list[list[int]]:
    """Indices of the rows of each optimiser step of an epoch."""
    if settings.batch_rows is None or settings.batch_rows >= count:
        return [list(range(count))]
    generator = torch.Generator().manual_seed(settings.dropout_seed(epoch))
    order = torch.randperm(count, generator=generator).tolist()
    return [order[i : i + settings.batch_rows] for i in range(0, count, settings.batch_rows)]


def _identity(model: PreTrainedModel, learner: Learner, rows: Sequence[Row], settings: TrainSettings) -> dict:
    """What the bits of a run depend on, by name."""
    tokens = [(r.tokens, r.answers, r.held_out, r.predicted_at) for r in rows]
    return {
        **asdict(settings),
        "demonstrations": fingerprint((learner.identity(), tokens)),
        "model": model_fingerprint(model),
    }


def _adapter_fingerprint(adapter: Adapter) -> str:
    parts = [model_fingerprint(module) for module in (adapter.prefix, adapter.prompt) if module is not None]
    weights = {} if adapter.lora is None else adapter.lora.tensors
    parts += [(name, tensor.flatten()[:16].tolist()) for name, tensor in weights.items()]
    return fingerprint(parts)
