"""Slots: a cache whose rows join, grow by a token each, and leave.

    slot 0   a a a a a . . .      lengths  5
         1   b b . . . . . .               2      slots in use are the first ones
         2   c c c c . . . .               4

    joining   the next free slots get the prompts' keys and values, from the left
    a step    each row writes at its own length; attention reads the slots in place, up to that length
    leaving   the last row moves into the slot that becomes free

transformers' own caches have one length for all rows. Sliding windows are the attention's business: every layer keeps
all tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

GROWTH = 64  # tokens by which slots become longer


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slots, Hk, tokens, D]` each."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        count, tokens = self._slots.size, self._slots.tokens
        self.keys, self.values = (
            x.new_zeros(count, x.shape[1], tokens, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[n, Hk, S, D]` of this pass's rows; returns all they have now, `[n, Hk, T, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        kept = []
        for name, new in (("keys", key_states), ("values", value_states)):
            slots: Tensor = getattr(self, name)
            if slots.shape[2] < self._slots.tokens:
                slots = torch.nn.functional.pad(slots, (0, 0, 0, self._slots.tokens - slots.shape[2]))
                setattr(self, name, slots)
            kept.append(self._slots.write(slots, new))
        return kept[0], kept[1]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy what is in one slot into another."""
        for slots in (self.keys, self.values):
            if slots is not None:
                slots[target, :, :length] = slots[source, :, :length]

    def get_seq_length(self) -> int:
        return self._slots.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.past + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Slots(Cache):
    """Own keys and values of up to `size` rows.

    lengths: tokens of each row in use.  tokens: how many a slot has room for.  past: the most tokens that a row of this
    pass had before it.
    """

    def __init__(self, size: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))  # type: ignore[arg-type]
        self.size, self.tokens, self.past = size, 0, 0
        self.lengths: list[int] = []
        self._first = 0  # slot of this pass's first row
        self._at: Tensor | None = None  # where each row writes its one token; None: prompts, from the left

    def join(self, prompts: Sequence[int]) -> None:
        """The next pass is one of new rows, whose prompts have so many tokens."""
        self._first, self._at, self.past = len(self.lengths), None, 0
        self._reserve(max(prompts))

    def step(self) -> None:
        """The next pass is one token of every row in use."""
        self._first, self._at, self.past = 0, torch.tensor(self.lengths), max(self.lengths)
        self._reserve(self.past + 1)

    def leave(self, row: int) -> None:
        """Free the slot of a row; the last row gets its number."""
        last = len(self.lengths) - 1
        length = self.lengths.pop()
        if row != last:
            self.lengths[row] = length
            for layer in self.layers:
                layer.move(last, row, length)
        if not self.lengths:  # give back what the longest row took
            self.layers, self.tokens = [], 0

    def write(self, slots: Tensor, new: Tensor) -> Tensor:
        """Write `[n, Hk, S, D]` into `[slots, Hk, tokens, D]`; returns what the rows have now."""
        first, n, S = self._first, new.shape[0], new.shape[2]
        if self._at is None:
            slots[first : first + n, :, :S] = new
            return new
        self._at = self._at.to(new.device)
        slots[torch.arange(n, device=new.device), :, self._at] = new[:, :, 0]
        return slots[:n, :, : self.past + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def _reserve(self, tokens: int) -> None:
        self.tokens = max(self.tokens, -(-tokens // GROWTH) * GROWTH)
