"""What goes through an attached model with one forward pass, from the attachment to the attention of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ctkernels import ContextMask
from ctkernels.tuning.hf.kinds import Reach

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KeySpan(NamedTuple):
    """Which of a row's T keys are valid.

    lengths: int64 `[B]`, number of valid keys.  The others only with left padding, else None: row int64 `[B, 1]`, row
    numbers; forward int64 `[B, T]`, indices that move each row's first valid key to the front; back int64 `[B, T]`, the
    inverse of forward.
    """

    lengths: Tensor
    row: Tensor | None = None
    forward: Tensor | None = None
    back: Tensor | None = None


@dataclass(eq=False)
class ForwardState:
    """What one forward pass of an attached model needs in every layer.

    It is passed through the model as a keyword argument and not kept on the attachment. So gradient checkpointing runs
    a layer again with the mask of its own forward pass, and two threads can run one model.

    keys, values: per layer `[Hk, P, D]`, or `[G, Hk, P, D]` with prefix_index (int `[B]`) and prefix_lens (int `[G]`).
    mask: from `prepare`, so that layers share what follows from it.  reaches: what the mask of each layer hides.  own:
    position of each token in its row, int `[B or 1, S]`.  past: how many own tokens are in the cache.  group: see
    `parallel.head_group`.  recording: whether gradients are recorded around the model.  layout: that of the batch, for
    classes of `own.py`.  consumed: the layers whose attention has read keys and values.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: ContextMask | None
    cu_seqlens: Tensor | None
    backend: str | None
    reaches: tuple[Reach, ...]
    own: Tensor
    past: int
    group: ProcessGroup | None = None
    recording: bool = False
    prefix_index: Tensor | None = None
    prefix_lens: Tensor | None = None
    layout: Tensor | None = None
    consumed: set[int] = field(default_factory=set)
    halves: dict[int, int] = field(default_factory=dict)
    states: Mapping[str, Tensor] = field(default_factory=dict)
    rows: list[tuple[int, int, int]] | None = None
    kept: set[int] = field(default_factory=set)
    spans: dict[int, tuple[Tensor, KeySpan]] = field(default_factory=dict)

    def span(self, layout: Tensor, T: int) -> KeySpan:
        """`key_span` of a layout over T keys, computed once for all layers with that layout."""
        known = self.spans.get(id(layout))
        if known is None:
            known = self.spans[id(layout)] = layout, key_span(layout, T)
        return known[1]

    def length(self, index: int) -> int:
        """P, the length of the prefix, or of the longest one."""
        return self.keys[index].shape[-2]

    def lengths(self, layout: Tensor | None, key: Tensor) -> Tensor:
        """Number of valid ones of the keys `[B, Hk, T, D]` of each row, int64 `[B]`."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().to(key.device, torch.int64)
        if layout is None or layout.shape[-1] == 0:
            return torch.full((key.shape[0],), key.shape[2], device=key.device)
        return self.span(layout, key.shape[2]).lengths


def key_span(layout: Tensor, T: int) -> KeySpan:
    """The valid ones of T keys, from a layout `[B, 1, 1, 1]` or `[B, 1, 1, 2]`."""
    if layout.shape[-1] == 1:
        return KeySpan(layout.flatten())
    first, end = layout.flatten(0, 2).split(1, dim=-1)  # [B, 1]
    row, position = torch.arange(len(first), device=first.device)[:, None], torch.arange(T, device=first.device)
    return KeySpan((end - first).flatten(), row, (position + first) % T, (position - first) % T)
