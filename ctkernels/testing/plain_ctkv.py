"""CT-KV in plain PyTorch and transformers, the way the authors' code does it: what `ctkernels` is compared with.

It shares no code with `ctkernels`. Every epoch the prefix is expanded over the batch into a `DynamicCache`, all rows
are right-padded, a 4D additive mask hides each row's own demonstration and the dropped tokens, the output head runs
on every token, and autograd sums the B expanded prefix gradients:

    loss = mean over rows of the mean cross-entropy of the row's answer tokens
    one AdamW step per epoch (betas 0.9/0.999, no decay), norm clipped at 1, cosine to 0 without warm-up
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class PlainRow:
    """One training row: its tokens, of which those from `answer_start` on are the answer, and its demonstration."""

    tokens: Sequence[int]
    answer_start: int
    held_out: int = -1  # index of the demonstration hidden from this row; -1 hides nothing


@dataclass
class PlainResult:
    """What a run leaves: the prefix per layer ([1, Hk, P, D]), and one loss and one time in seconds per epoch."""

    keys: list[Tensor]
    values: list[Tensor]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def initial_prefix(model: PreTrainedModel, context: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer after one forward pass over `context` (int64 [P]), as leaves that need grad."""
    with torch.no_grad():
        cache = model(input_ids=context[None], use_cache=True).past_key_values
    keys = [layer.keys.detach().clone().requires_grad_() for layer in cache.layers]
    values = [layer.values.detach().clone().requires_grad_() for layer in cache.layers]
    return keys, values


def pad_rows(rows: Sequence[PlainRow]) -> tuple[Tensor, Tensor]:
    """Right-padded `tokens` [B, S] and next-token `labels` [B, S] (-100 where a position predicts no answer token)."""
    size = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), size, dtype=torch.long)
    labels = torch.full((len(rows), size), -100)
    for b, row in enumerate(rows):
        ids = torch.tensor(list(row.tokens))
        tokens[b, : len(ids)] = ids
        labels[b, row.answer_start - 1 : len(ids) - 1] = ids[row.answer_start :]
    return tokens, labels


def attention_mask(visible: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, S, P + S] from the visible prefix tokens [B, P] and causality among the row's own."""
    batch, prefix = visible.shape
    own = torch.ones(batch, size, size, dtype=torch.bool, device=visible.device).tril()
    seen = torch.cat([visible[:, None, :].expand(batch, size, prefix), own], dim=-1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def row_losses(
    model: PreTrainedModel, keys: list[Tensor], values: list[Tensor], rows: Sequence[PlainRow], visible: Tensor
) -> Tensor:
    """Mean cross-entropy of each row's answer tokens, [B]; a row sees the prefix tokens of `visible`, bool [B, P]."""
    tokens, labels = (x.to(keys[0].device) for x in pad_rows(rows))
    batch, size = tokens.shape
    length = visible.shape[1]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    logits = model(
        input_ids=tokens,
        attention_mask=attention_mask(visible, size, keys[0].dtype),
        position_ids=torch.arange(length, length + size, device=tokens.device).expand(batch, size),
        past_key_values=cache,
        use_cache=True,
    ).logits
    loss = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return loss.sum(1) / (labels != -100).sum(1)


def step(
    model: PreTrainedModel,
    keys: list[Tensor],
    values: list[Tensor],
    rows: Sequence[PlainRow],
    visible: Tensor,
    optimizer: torch.optim.Optimizer,
    clip_norm: float = 1.0,
) -> tuple[float, Tensor]:
    """One epoch: the loss, and the norm of its gradient before it is clipped. Arguments as in `row_losses`."""
    loss = row_losses(model, keys, values, rows, visible).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([*keys, *values], clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm


def tune(
    model: PreTrainedModel,
    context: Tensor,
    segments: Tensor,
    rows: Sequence[PlainRow],
    *,
    epochs: int,
    lr: float,
    stop_after: int | None = None,
    keep: Callable[[int], Tensor] | None = None,
    clip_norm: float = 1.0,
) -> PlainResult:
    """Tune the prefix of `context` (int64 [P], demonstration i at `segments[i]:segments[i + 1]`) on `rows`.

    `keep(epoch)` gives the token-dropout pattern, bool [B, P], True = kept. `stop_after` ends the run early without
    changing its schedule. The model should use SDPA attention; it is left frozen.
    """
    model.requires_grad_(False).eval()
    keys, values = initial_prefix(model, context)
    result = PlainResult(keys, values)
    parameters = [*keys, *values]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    shown = torch.ones(len(rows), len(context), dtype=torch.bool)
    for b, row in enumerate(rows):
        if row.held_out >= 0:
            shown[b, segments[row.held_out] : segments[row.held_out + 1]] = False
    for epoch in range(epochs if stop_after is None else min(stop_after, epochs)):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        visible = shown if keep is None else shown & keep(epoch)
        result.losses.append(step(model, keys, values, rows, visible, optimizer, clip_norm)[0])
        result.seconds.append(time.perf_counter() - started)
    return result
