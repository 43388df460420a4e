"""The one training loop: rows against a trainable prefix, one optimiser step per epoch.

    for each epoch:
        lr    <- cosine from settings.lr to 0, no warm-up
        seed  <- (settings.seed, epoch)                            token dropout, drawn once per (row, token)
        loss  <- mean over rows of the mean cross-entropy (nats) of the row's answer tokens
        step  <- AdamW(betas 0.9/0.999, no decay) on the gradient of all rows, its norm clipped

Rows run packed back to back (or right-padded) in micro-batches of at most `max_tokens` tokens; each contributes
`sum of its rows' means / number of all rows`, so that loss and gradient do not depend on how the rows are split.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctkernels import dispatch
from ctkernels.tuning.batches import Batch, answer_losses, make_batch, split_by_tokens
from ctkernels.tuning.checkpoint import Checkpoint, fingerprint, model_fingerprint
from ctkernels.tuning.data import DataError, Demonstration, Row, TextFormat, encode_context, encode_rows
from ctkernels.tuning.hf import Attachment
from ctkernels.tuning.hf_models import find_decoder
from ctkernels.tuning.methods import Method, get_method
from ctkernels.tuning.prefix import KVPrefix
from ctkernels.tuning.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainingError(ArithmeticError):
    """Training that cannot go on: the loss or its gradient is not finite."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number from 1, the loss before the step, the learning rate, the gradient norm before clipping,
    and the time in seconds."""

    epoch: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class TuneResult:
    """A prefix and how it came to be (`history` is empty for methods that train nothing)."""

    prefix: KVPrefix
    history: list[EpochRecord]


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    method: str = "ct-kv",
    settings: TrainSettings | None = None,
    text_format: TextFormat | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord, KVPrefix], None] | None = None,
) -> TuneResult:
    """Adapt a frozen model to a task: the prefix of `method` for these demonstrations, trained if the method trains.

    Args:
        model: a supported causal language model; its weights and its mode are left as they were.
        tokenizer: the model's.
        demonstrations: the task's pairs.
        method: a name of `methods.METHODS`.
        settings: default: those of the method.
        text_format: how pairs become tokens.
        checkpoint_dir, checkpoint_every: where to keep a checkpoint, and after how many epochs to replace it.
        resume: continue from the checkpoint, if there is one; the run ends with the same bits as if never stopped.
        on_epoch: called with the record and the prefix after every epoch, before its checkpoint.

    Raises:
        DataError: too few demonstrations, or more tokens than the model takes.
        ValueError: an unknown method; an unknown or unavailable backend.
        TypeError: a model class that is not supported.
        CheckpointError: `resume` with other settings, data or model than the checkpoint's.
        TrainingError: the loss is not finite.
    """
    how = get_method(method)
    settings = settings or how.settings()
    if settings.backend is not None:
        dispatch.choose(settings.backend, model.device)  # refuses an unusable one before the model runs
    if how.starts_from == "context" and not demonstrations:
        raise DataError(f"{method} needs demonstrations, got none")
    used = demonstrations if how.starts_from == "context" else ()
    context = encode_context(tokenizer, used, text_format)
    rows: list[Row] = []
    if how.trains != "nothing":
        rows = encode_rows(tokenizer, demonstrations, text_format, settings.learn_stop)
        _require_two(rows, settings)
    check_context_length(model, len(context.input_ids))
    check_row_lengths(model, len(context.input_ids), rows)
    recorded = {"text_format": asdict(text_format or TextFormat())} | (asdict(settings) if rows else {})
    prefix = KVPrefix.from_tokens(model, context.input_ids, context.segments, tokenizer, method, recorded)
    if not rows:
        return TuneResult(prefix, [])
    history = train_prefix(
        model,
        prefix,
        rows,
        how,
        settings,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        on_epoch=on_epoch,
    )
    return TuneResult(prefix, history)


def train_prefix(
    model: PreTrainedModel,
    prefix: KVPrefix,
    rows: Sequence[Row],
    method: Method,
    settings: TrainSettings,
    *,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord, KVPrefix], None] | None = None,
) -> list[EpochRecord]:
    """Train `prefix` in place on `rows`; arguments and errors as in `tune`."""
    _require_two(rows, settings)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    parameters = {name: p for name, p in prefix.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.0)
    history: list[EpochRecord] = []
    checkpoint = None
    if checkpoint_dir is not None:
        checkpoint = Checkpoint(checkpoint_dir, _run_identity(model, prefix, rows, method, settings))
        if checkpoint.exists() and not resume:
            raise ValueError(
                f"checkpoint_dir already holds {checkpoint.path}; resume from it, or choose another folder"
            )
        if checkpoint.exists():
            history = [EpochRecord(**record) for record in checkpoint.load(parameters, optimizer)]

    groups = split_by_tokens(rows, settings.max_tokens, settings.layout)
    batches = [make_batch(rows, group, settings.layout).to(model.device) for group in groups]
    with frozen(model), prefix.attach(model, backend=settings.backend) as attachment:
        for epoch in range(len(history), settings.epochs):
            started = time.perf_counter()
            lr = 0.5 * settings.lr * (1 + math.cos(math.pi * epoch / settings.epochs))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64, device=model.device)
            for batch in batches:
                attachment.mask = method.mask(settings, prefix.segments, batch, settings.dropout_seed(epoch))
                losses = row_losses(model, attachment, batch)
                (losses.sum() / len(rows)).backward()
                total += losses.detach().double().sum()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm or math.inf)
            loss = total.item() / len(rows)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"epoch {epoch + 1}: the loss is {loss} and the gradient norm {float(norm)}; "
                    f"try a smaller lr than {settings.lr}, or a wider dtype than {model.dtype}"
                )
            optimizer.step()
            record = EpochRecord(epoch + 1, loss, lr, float(norm), time.perf_counter() - started)
            history.append(record)
            if on_epoch is not None:
                on_epoch(record, prefix)
            if checkpoint is not None and (record.epoch % checkpoint_every == 0 or record.epoch == settings.epochs):
                checkpoint.save(parameters, optimizer, [asdict(r) for r in history])
    optimizer.zero_grad()
    return history


def row_losses(model: PreTrainedModel, attachment: Attachment, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of every answer of a batch, with a prefix attached; logits only where a label is."""
    attachment.cu_seqlens = batch.cu_seqlens
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.logit_positions,
        use_cache=False,
    ).logits
    return answer_losses(logits, batch)


@contextlib.contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Within the block no weight takes a gradient and no dropout is active; afterwards all is as it was.

    Modules under gradient checkpointing stay in training mode, since transformers checkpoints nothing outside of it.
    """
    needs_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False).eval()
        for module, _ in training:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for parameter, flag in needs_grad:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


def check_context_length(model: PreTrainedModel, length: int) -> None:
    """Refuse a context of `length` tokens that is longer than the model's. Raises DataError."""
    limit = find_decoder(model).context_limit
    if limit is not None and length > limit:
        raise DataError(
            f"the demonstrations have {length} tokens, more than the model's context of {limit}; "
            "use fewer of them, or a smaller max_pair_tokens"
        )


def check_row_lengths(model: PreTrainedModel, length: int, rows: Sequence[Row]) -> None:
    """Refuse a row that does not fit into the model's context behind a prefix of `length` tokens. Raises DataError."""
    limit = find_decoder(model).context_limit
    for row in rows:
        if limit is not None and length + len(row.tokens) > limit:
            raise DataError(
                f"{f'{row.source}: ' if row.source else ''}a row of {len(row.tokens)} tokens behind a prefix of "
                f"{length} exceeds the model's context of {limit}; use fewer demonstrations, or a smaller "
                "max_pair_tokens"
            )


def _require_two(rows: Sequence[Row], settings: TrainSettings) -> None:
    if not rows:
        raise DataError("training needs demonstrations, got none")
    if settings.leave_one_out and len(rows) < 2:
        raise DataError(
            "leave-one-out needs at least two demonstrations, got 1: its row would see nothing of the context; "
            "add demonstrations, or set leave_one_out=False"
        )


def _run_identity(
    model: PreTrainedModel, prefix: KVPrefix, rows: Sequence[Row], method: Method, settings: TrainSettings
) -> dict:
    """What the bits of a run depend on, by name."""
    return {
        "method": method.name,
        **asdict(settings),
        "demonstrations": fingerprint((prefix.segments.tolist(), [(r.tokens, r.answers, r.held_out) for r in rows])),
        "model": model_fingerprint(model),
    }
