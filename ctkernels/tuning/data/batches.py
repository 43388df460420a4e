"""Batches of rows: packed without padding, or padded on the right. Logits are computed only where there is a label.

Three rows in the two layouts (`.` is padding):

    packed   input_ids [1, N]   a0 a1 a2 a3 b0 b1 c0 c1 c2      padded   input_ids [B, S]   a0 a1 a2 a3
             cu_seqlens [B+1]   0           4     6        9                                b0 b1 .  .
                                                                                            c0 c1 c2 .

With `lead`, each row starts with so many positions for a soft prompt, whose embeddings are filled in later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ctkernels.tuning.data.formats import Choice, Row

Layout = Literal["packed", "padded"]
IGNORED = -100  # a label without a loss, as in torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model call with a prefix attached.

    input_ids, position_ids: int64 [1, N] packed or [B, S] padded; positions count a row's own tokens from 0.
    cu_seqlens: int32 [B+1], packed only.  attention_mask: int64 [B, S], padded only (1 = a token, 0 = padding).
    row_ids: int64 [B], index of each row in the list that it came from.  held_out: int64 [B].
    logit_positions: int64 [U], positions along dim 1 with logits (the model's `logits_to_keep`).
    label_index: int64 [M], for each label the index of its logits, among all logits as [-1, V].  labels: int64 [M].
    answer_sizes: number of labels of each answer, in order; their sum is M.
    lead: number of soft prompt positions at the start of each row; their input_ids are not used.
    choices: those of each row, whose answers then are the rows' labels.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    attention_mask: Tensor | None
    row_ids: Tensor
    held_out: Tensor
    logit_positions: Tensor
    label_index: Tensor
    labels: Tensor
    answer_sizes: tuple[int, ...]
    lead: int = 0
    choices: tuple[tuple[Choice, ...], ...] = ()

    def with_prompt(self, embedded: Tensor, prompt: Tensor) -> Tensor:
        """`embedded` `[1, N, E]` or `[B, S, E]` with `prompt` `[lead, E]` in the first positions of each row."""
        if self.cu_seqlens is None:
            return torch.cat((prompt.expand(len(embedded), -1, -1), embedded[:, self.lead :]), dim=1)
        starts = self.cu_seqlens[:-1].long()
        where = (starts[:, None] + torch.arange(self.lead, device=starts.device)).flatten()
        prompts = prompt.expand(len(starts), -1, -1).flatten(0, 1)
        return embedded[0].index_copy(0, where, prompts)[None]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**moved)


def split_by_tokens(rows: Sequence[Row], max_tokens: int, layout: Layout = "packed", lead: int = 0) -> list[list[int]]:
    """Indices of the rows of each batch, in order. A batch has at most `max_tokens` tokens.

    Padding, the `lead` soft prompt tokens and the branches of each row count. A row longer than `max_tokens` gets its
    own batch.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    groups: list[list[int]] = []
    total = longest = beside = 0
    for i, row in enumerate(rows):
        size, branches = lead + len(row.tokens), sum(len(tokens) for _, tokens in row.branches)
        longest, total, beside = max(longest, size), total + size, beside + branches
        cost = beside + (total if layout == "packed" else longest * (len(groups[-1]) + 1 if groups else 1))
        if not groups or cost > max_tokens:
            groups.append([])
            longest, total, beside = size, size, branches
        groups[-1].append(i)
    return groups


def make_batch(rows: Sequence[Row], indices: Sequence[int], layout: Layout = "packed", lead: int = 0) -> Batch:
    """A batch of `rows[i] for i in indices`, each with `lead` positions for a soft prompt, on the CPU."""
    picked = [rows[i] for i in indices]
    sizes = [lead + len(row.tokens) for row in picked]
    positions = [torch.arange(size) for size in sizes]
    tokens = [torch.tensor((0,) * lead + row.tokens, dtype=torch.long) for row in picked]
    cu_seqlens = attention_mask = None
    if layout == "packed":
        cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        starts = cu_seqlens.tolist()[:-1]
        input_ids, position_ids = torch.cat(tokens)[None], torch.cat(positions)[None]
    else:
        starts = [0] * len(picked)
        input_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        attention_mask = (position_ids < torch.tensor(sizes)[:, None]).long()

    labels, where, answer_sizes = [], [], []  # where: (row, position along dim 1) of the logits of each label
    for b, row in enumerate(picked):
        for number, answer in enumerate(row.answers):
            labels += answer
            where += [(b, starts[b] + lead + t) for t in row.label_positions(number)]
            answer_sizes.append(len(answer))
    kept = sorted({position for _, position in where})
    index = {position: u for u, position in enumerate(kept)}
    stride = 0 if layout == "packed" else len(kept)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        attention_mask=attention_mask,
        row_ids=torch.tensor(list(indices), dtype=torch.long),
        held_out=torch.tensor([row.held_out for row in picked], dtype=torch.long),
        logit_positions=torch.tensor(kept, dtype=torch.long),
        label_index=torch.tensor([b * stride + index[position] for b, position in where], dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        answer_sizes=tuple(answer_sizes),
        lead=lead,
        choices=tuple(row.choices for row in picked),
    )


def levelled(batch: Batch) -> tuple[Batch, Tensor]:
    """A packed batch with one answer per row in sizes that many batches share, for what is captured once per size.

        rows      as many as a multiple of 4, and one more; the new ones have no labels, and nothing reads them
        tokens    a multiple of 64, those in excess in the last row
        logits    a multiple of 16; those in excess have no labels
        labels    of each answer as many as a power of two; those in excess are ignored

    Returns the batch, and factors of the answers' mean losses, fp64 `[rows]`, that make up for ignored labels (0 for
    a new row).
    """
    assert batch.cu_seqlens is not None
    sizes = batch.answer_sizes
    rows, most = len(sizes), 1 << (max(sizes) - 1).bit_length()
    tokens, new = batch.input_ids.shape[1], _up(rows, 4) + 1 - rows
    extra = _up(tokens + new * max(batch.lead, 1), 64) - tokens  # of new rows, each of which has a soft prompt, too
    lengths = [batch.lead] * (new - 1) + [extra - batch.lead * (new - 1)]
    at = torch.arange(len(batch.labels)) - torch.tensor([0, *sizes[:-1]]).cumsum(0).repeat_interleave(
        torch.tensor(sizes)
    )
    at += (most * torch.arange(rows)).repeat_interleave(torch.tensor(sizes))
    labels = torch.full(((rows + new) * most,), IGNORED)
    labels[at] = batch.labels
    label_index = torch.zeros_like(labels)
    label_index[at] = batch.label_index
    positions = torch.cat([batch.position_ids[0], *map(torch.arange, lengths)])[None]
    logits = _up(len(batch.logit_positions), 16) - len(batch.logit_positions)
    level = replace(
        batch,
        input_ids=pad(batch.input_ids, (0, extra)),
        position_ids=positions,
        cu_seqlens=torch.cat((batch.cu_seqlens, tokens + torch.tensor(lengths).cumsum(0).to(torch.int32))),
        row_ids=pad(batch.row_ids, (0, new)),
        held_out=pad(batch.held_out, (0, new), value=-1),
        logit_positions=pad(batch.logit_positions, (0, logits)),
        label_index=label_index,
        labels=labels,
        answer_sizes=(most,) * (rows + new),
        choices=(*batch.choices, *((),) * new),
    )
    return level, pad(most / torch.tensor(sizes, dtype=torch.float64), (0, new))


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def answer_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each answer's tokens in nats, [number of answers], fp32 (fp64 for fp64 logits).

    logits: [1, U, V] or [B, U, V], at `batch.logit_positions`.
    """
    flat = logits.flatten(0, 1).index_select(0, batch.label_index)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    losses = cross_entropy(flat, batch.labels, reduction="none")
    # split and mean instead of a scatter: the order is fixed, so every device gives the same bits
    return torch.stack([part.mean() for part in losses.split(batch.answer_sizes)])
