"""ContextMask: which context positions a row may see.

The context rule is written once per language: here for Python, in `csrc/mask.h` for C++, in `backends/triton/mask.py`
for Triton. The tests compare them bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF


def philox4x32(
    counter: Sequence[Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words.

    counter: four broadcastable int64 tensors; key: two words, or tensors of one. Returns the four output words, int64
    in [0, 2^32).
    """
    c0, c1, c2, c3 = (c & LOW_32 for c in counter)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64: both 32-bit halves of the unsigned product are exact
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & LOW_32) ^ c1 ^ k0,
            p1 & LOW_32,
            ((p0 >> 32) & LOW_32) ^ c3 ^ k1,
            p0 & LOW_32,
        )
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & LOW_32, (k1 + PHILOX_KEY_STEPS[1]) & LOW_32
    return c0, c1, c2, c3


def dropped_positions(row_ids: Tensor, length: int, drop_p: float, seed: int | Tensor) -> Tensor:
    """Token dropout pattern, bool `[B, length]`, True = dropped.

    Position c of row r is dropped iff word `c & 3` of Philox4x32-10 with key (seed & 0xffffffff, seed >> 32) and
    counter (c >> 2, r, 0, 0) is less than floor(drop_p * 2^32). A seed in memory (int64 `[]` or `[1]`, on the device
    of `row_ids`) gives the bits of the number that it holds, and the host does not read it.
    """
    quads = torch.arange((length + 3) // 4, device=row_ids.device)
    rows = row_ids.to(torch.int64)[:, None]
    zero = torch.zeros_like(rows)
    quad = philox4x32((quads[None, :] + zero, rows, zero, zero), (seed & LOW_32, (seed >> 32) & LOW_32))
    words = torch.stack(torch.broadcast_tensors(*quad), dim=-1).flatten(1)[:, :length]
    return words < math.floor(drop_p * 2**32)


def apply_context_rule(
    visible: Tensor,
    hidden: Tensor | None,
    keep: Tensor | None,
    row_ids: Tensor | None,
    drop_p: float,
    seed: int | Tensor,
) -> None:
    """Set to False, in place, what the context rule hides in `visible`, bool `[B, C]`."""
    batch, length = visible.shape
    if hidden is not None:
        position = torch.arange(length, device=visible.device)
        start, end = hidden.long().unbind(-1)
        visible &= ~((start[:, None] <= position) & (position < end[:, None]))
    if keep is not None:
        visible &= keep[:, :length]
    if drop_p > 0:
        row_ids = torch.arange(batch, device=visible.device) if row_ids is None else row_ids
        visible &= ~dropped_positions(row_ids, length, drop_p, seed)


@dataclass(frozen=True, eq=False)
class ContextMask:
    """Visibility of context positions per row: hidden span, token dropout, explicit pattern.

    A row's keys are the concatenation `[prefix | own keys]`. The first C of them are the context. Context position c is
    visible to the queries of row b iff it is outside `hidden[b]`, `keep[b, c]` is true, and it was not dropped. Two
    rows that leave out their own demonstration, with token dropout (`.` hidden, `x` dropped, `#` visible):

        context     demo 0   demo 1   demo 2
        row 0       ......   ##x###   ######
        row 2       ###x##   ######   ......

    Args:
        hidden: integer `[B, 2]`, half-open span [start, end) of context positions that a row must not see.
        drop_p: token dropout probability in [0, 1). A dropped token is masked before the softmax, without rescaling.
        seed: 64-bit integer. The same seed drops the same tokens on every backend. It may also be an int64 tensor `[]`
            or `[1]` on the rows' device: kernels then read the number when they run, and a captured CUDA graph draws
            anew in every replay with another number there.
        row_ids: integer `[B]` in [0, 2^32), each row's number in the random stream (default 0..B-1). A row with the
            same number drops the same tokens, wherever it is in a batch.
        keep: bool `[B, C]`, True = visible.
        length: C, the number of context positions (default: the prefix length).

    Raises:
        ValueError, TypeError: an argument has the wrong type, shape or range, or two arguments have different B.

    Nothing here is differentiable.
    """

    hidden: Tensor | None = None
    drop_p: float = 0.0
    seed: int | Tensor = 0
    row_ids: Tensor | None = None
    keep: Tensor | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        _check_integers("hidden", self.hidden, "[B, 2]", lambda s: len(s) == 2 and s[1] == 2)
        _check_integers("row_ids", self.row_ids, "[B]", lambda s: len(s) == 1)
        if self.keep is not None:
            if not isinstance(self.keep, Tensor) or self.keep.dtype != torch.bool:
                raise TypeError(f"keep must be a bool tensor [B, C], got {_describe(self.keep)}")
            if self.keep.dim() != 2:
                raise ValueError(f"keep must be a bool tensor [B, C], got {_describe(self.keep)}")
        if isinstance(self.drop_p, bool) or not isinstance(self.drop_p, (int, float)):
            raise TypeError(f"drop_p must be a number in [0, 1), got {type(self.drop_p).__name__}")
        if not 0.0 <= self.drop_p < 1.0:
            raise ValueError(f"drop_p must be in [0, 1), got {self.drop_p}")
        if isinstance(self.seed, Tensor):
            if self.seed.dtype != torch.int64 or tuple(self.seed.shape) not in ((), (1,)):
                raise TypeError(f"seed must be a 64-bit integer or an int64 tensor [], got {_describe(self.seed)}")
            object.__setattr__(self, "seed", self.seed.reshape(1))  # once: what layers share depends on the object
        elif isinstance(self.seed, bool) or not isinstance(self.seed, (int, torch.SymInt)):
            raise TypeError(f"seed must be a 64-bit integer or an int64 tensor [], got {_describe(self.seed)}")
        elif not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
        if self.length is not None:
            if isinstance(self.length, bool) or not isinstance(self.length, (int, torch.SymInt)):
                raise TypeError(f"length must be an integer, got {type(self.length).__name__}")
            if self.length < 0:
                raise ValueError(f"length must be >= 0, got {self.length}")
        sizes = [t.shape[0] for t in (self.hidden, self.row_ids, self.keep) if t is not None]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(f"hidden, row_ids and keep must agree on the number of rows B, got {sizes}")
        if self.keep is not None and self.length is not None and self.keep.shape[1] != self.length:
            raise ValueError(f"keep must be [B, {self.length}] since length={self.length}, got {_describe(self.keep)}")
        if not torch.compiler.is_compiling():
            check_spans(self.hidden, self.length)
            check_row_ids(self.row_ids)

    def to(self, device: torch.device | str) -> ContextMask:
        """The same mask on another device."""
        tensors = {name: getattr(self, name) for name in ("hidden", "row_ids", "keep", "seed")}
        moved: dict[str, Any] = {name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)}
        return self if all(x is tensors[name] for name, x in moved.items()) else replace(self, **moved)

    @classmethod
    def leave_one_out(
        cls,
        segments: Tensor,
        held_out: Tensor,
        drop_p: float = 0.0,
        seed: int | Tensor = 0,
        row_ids: Tensor | None = None,
    ) -> ContextMask:
        """Each row hides one segment of the context.

        Args:
            segments: integer `[K+1]`, offsets of the K demonstrations, non-decreasing from >= 0.
            held_out: integer `[B]`, index of the demonstration that a row must not see; -1 hides nothing.
            drop_p, seed, row_ids: as in the class.

        Raises:
            ValueError, TypeError: wrong shape or type. For CPU tensors also decreasing offsets, or an index outside
                [-1, K); on other devices values are not checked.
        """
        segments, held_out = torch.as_tensor(segments), torch.as_tensor(held_out)
        _check_integers("segments", segments, "[K+1] with K >= 0", lambda s: len(s) == 1 and s[0] >= 1)
        _check_integers("held_out", held_out, "[B]", lambda s: len(s) == 1)
        count = segments.shape[0] - 1
        if segments.device.type == "cpu" and not torch.compiler.is_compiling():
            offsets = segments.tolist()
            if offsets[0] < 0 or any(a > b for a, b in pairwise(offsets)):
                raise ValueError(f"segments must be non-decreasing offsets from >= 0, got {_shorten(offsets)}")
        if held_out.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = [i for i in held_out.tolist() if not -1 <= i < count]
            if bad:
                raise ValueError(f"held_out must be in [-1, {count}) for {count} segments, got {bad[0]}")
        segments = segments.to(held_out.device)
        if count == 0:
            hidden = held_out.new_zeros(held_out.shape[0], 2)
        else:
            index = held_out.long()
            hides = index >= 0
            index = index.clamp(0, count - 1)
            hidden = torch.stack((segments[index], segments[index + 1]), dim=-1) * hides[:, None]
        return cls(hidden=hidden, drop_p=drop_p, seed=seed, row_ids=row_ids)

    def dense(self, batch: int, length: int | None = None) -> Tensor:
        """The mask as a tensor: bool `[batch, length]`, True = visible.

        `length` defaults to `self.length`. Positions from `self.length` on are not context, so they are visible.
        """
        if length is None:
            length = self.length if self.length is not None else (None if self.keep is None else self.keep.shape[1])
        if length is None:
            raise ValueError("length must be given: the mask has none")
        context = length if self.length is None else min(self.length, length)
        if self.length is None and self.keep is not None and self.keep.shape[1] != length:
            raise ValueError(f"keep must be [B, {length}] for length={length}, got {_describe(self.keep)}")
        device = next((t.device for t in (self.hidden, self.keep, self.row_ids) if t is not None), torch.device("cpu"))
        visible = torch.ones(batch, length, dtype=torch.bool, device=device)
        for name in ("hidden", "row_ids", "keep"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[0] != batch:
                raise ValueError(f"{name} must have {batch} rows, got {_describe(tensor)}")
        apply_context_rule(visible[:, :context], self.hidden, self.keep, self.row_ids, self.drop_p, self.seed)
        return visible


def check_spans(hidden: Tensor | None, length: int | None) -> None:
    """Raise ValueError for spans that are reversed or reach outside [0, length]. CPU tensors only: it reads values."""
    if hidden is None or hidden.device.type != "cpu" or hidden.shape[0] == 0:
        return
    start, end = hidden.long().unbind(-1)
    limit = torch.iinfo(torch.int64).max if length is None else length
    bad = (start < 0) | (end < start) | (end > limit)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        bound = "" if length is None else f" <= {length} context positions"
        raise ValueError(
            f"hidden must hold spans with 0 <= start <= end{bound}, got {tuple(hidden[row].tolist())} in row {row}"
        )


def check_row_ids(row_ids: Tensor | None) -> None:
    """Raise ValueError for ids outside [0, 2^32): the random stream has 32 bits for them. CPU tensors only."""
    if row_ids is None or row_ids.device.type != "cpu" or row_ids.shape[0] == 0:
        return
    low, high = (int(x) for x in row_ids.long().aminmax())
    if low < 0 or high > LOW_32:
        raise ValueError(f"row_ids must be in [0, 2^32), got {low if low < 0 else high}")


def _check_integers(name: str, tensor: Tensor | None, shape: str, fits) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor {shape}, got {_describe(tensor)}")
    if not fits(tuple(tensor.shape)):
        raise ValueError(f"{name} must be an integer tensor {shape}, got {_describe(tensor)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _shorten(values: list, limit: int = 8) -> str:
    return str(values) if len(values) <= limit else f"[{', '.join(map(str, values[:limit]))}, ...]"
