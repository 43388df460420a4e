"""What a training row sees of the context: leave-one-out in its variants, and token dropout.

    context          demo 0   demo 1   demo 2   demo 3
row of demo 1
    self             ######   ......   ######   ######
    suffix           ######   ......   ......   ......
    power            ......   ......   ######   ......     a random half of the others, drawn anew each epoch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ctkernels.mask import ContextMask, dropped_positions
from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.train.options import Options

Hide = Literal["none", "self", "suffix", "power"]
SUBSETS = 1 << 63  # tells the random stream of subsets from that of token dropout, whose seeds are below 2^63


class Rows(NamedTuple):
    """What a mask asks of the rows of a batch: their indices and what each holds out, int64 `[B]` both."""

    row_ids: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Dropout(Options):
    """Token dropout.

    Args:
        drop_p: token dropout: probability in [0, 1) that a row does not see a context token in an epoch.
        drop_from: context tokens before this position are never dropped (an attention sink, an instruction).
    """

    drop_p: float = 0.0
    drop_from: int = 0

    def check(self) -> None:
        self.require(0 <= self.drop_p < 1, "drop_p", "in [0, 1)")
        self.at_least(0, "drop_from")


@dataclass(frozen=True)
class LeaveOneOut(Options):
    """Leave-one-out.

    Args:
        leave_one_out: what a row does not see of the demonstrations: "none" hides nothing, "self" its own, "suffix" its
            own and all after it, "power" its own and a random half of the others, drawn anew each epoch.
        leave_one_out_from: hide demonstrations only if there are at least so many of them.
    """

    leave_one_out: Hide = "none"
    leave_one_out_from: int = 0

    def check(self) -> None:
        self.at_least(0, "leave_one_out_from")

    def hides(self, count: int) -> bool:
        """Whether rows of `count` demonstrations have some hidden from them."""
        return self.leave_one_out != "none" and count >= max(self.leave_one_out_from, 1)


def context_mask(
    settings: Dropout, segments: Tensor, batch: Batch | Rows, seed: int | Tensor, length: int, in_row: bool = False
) -> ContextMask:
    """The mask of a batch of training rows.

    Args:
        settings: token dropout, and leave-one-out if they have it (`LeaveOneOut`).
        segments: int64 `[K+1]`, offsets of the K demonstrations in the context; no demonstrations, nothing to hide.
        seed: of this epoch; in memory (int64 `[1]`) as in `ContextMask`.
        length: number of context positions.
        in_row: the context lies in each row's own keys (a soft prompt) instead of the prefix.
    """
    count = segments.shape[0] - 1
    hide = settings.leave_one_out if isinstance(settings, LeaveOneOut) and settings.hides(count) else "none"
    common = {"row_ids": batch.row_ids, "length": length if in_row else None}
    hidden = None if hide == "none" else _hidden(segments, batch.held_out, to_end=hide == "suffix")
    keep = None
    if hide == "power":
        keep = _subsets(segments, batch.row_ids, seed, length)
    if settings.drop_p == 0 or settings.drop_from == 0:
        return ContextMask(hidden=hidden, keep=keep, drop_p=settings.drop_p, seed=seed, **common)
    dropped = dropped_positions(batch.row_ids, length, settings.drop_p, seed)
    dropped[:, : settings.drop_from].fill_(False)
    return ContextMask(hidden=hidden, keep=~dropped if keep is None else keep & ~dropped, **common)


def side_by_side(masks: Sequence[ContextMask], counts: Sequence[int], length: int) -> ContextMask:
    """The mask of a batch whose first `counts[0]` rows are those of `masks[0]`, and so on, over prefixes of at most
    `length` tokens. A mask has one seed: rows that draw from several get their dropped tokens in `keep`."""
    draws = {(mask.drop_p, mask.seed) for mask in masks}
    drop_p, seed = draws.pop() if len(draws) == 1 else (0.0, 0)
    keeps = [_kept(mask, length, not drop_p) for mask in masks]
    spans = [mask.hidden for mask in masks]
    like = torch.cat([mask.row_ids for mask in masks])
    keep = hidden = None
    if any(x is not None for x in keeps):
        all_of_it = [like.new_ones(count, length, dtype=torch.bool) for count in counts]
        keep = torch.cat([y if x is None else x for x, y in zip(keeps, all_of_it, strict=True)])
    if any(x is not None for x in spans):
        hidden = torch.cat([like.new_zeros(n, 2) if x is None else x for x, n in zip(spans, counts, strict=True)])
    return ContextMask(hidden=hidden, drop_p=drop_p, seed=seed, row_ids=like, keep=keep)


def _kept(mask: ContextMask, length: int, dropped: bool) -> Tensor | None:
    """`mask.keep`, perhaps without what the mask drops, bool `[B, length]`; None if that is everything."""
    keep = None if mask.keep is None else pad(mask.keep, (0, length - mask.keep.shape[1]), value=True)
    if not dropped or mask.drop_p == 0:
        return keep
    shown = ~dropped_positions(mask.row_ids, length, mask.drop_p, mask.seed)
    return shown if keep is None else keep & shown


def _hidden(segments: Tensor, held_out: Tensor, to_end: bool) -> Tensor:
    """Spans `[B, 2]` that rows must not see: their own demonstration, or also all after it; none for held_out = -1."""
    index = held_out.clamp(min=0)
    end = segments[-1].expand_as(held_out) if to_end else segments[index + 1]
    return torch.stack((segments[index], end), dim=-1) * (held_out >= 0)[:, None]


def _subsets(segments: Tensor, row_ids: Tensor, seed: int | Tensor, length: int) -> Tensor:
    """A random half of the demonstrations for each row, bool `[B, length]`; what is no demonstration stays visible."""
    count = segments.shape[0] - 1
    other = SUBSETS if isinstance(seed, int) else SUBSETS - (1 << 64)  # the same bits, in a signed number
    hides = dropped_positions(row_ids, count, 0.5, seed | other)  # [B, K]
    position = torch.arange(length, device=row_ids.device)
    owner = torch.searchsorted(segments, position, right=True) - 1  # -1 before the first, K behind the last
    inside = (owner >= 0) & (owner < count)
    return ~(hides[:, owner.clamp(0, count - 1)] & inside)
