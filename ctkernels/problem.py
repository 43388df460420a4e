"""Problem: everything about a call that is not differentiated. All backends receive this one description."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ctkernels.mask import check_row_ids, check_spans


class Problem(NamedTuple):
    """A list of rows, and the rules that say which key a query sees.

    The fields are in the order of the registered operators' schemas (`ops.py`). A tensor is None if the call does not
    use the feature. q, k, v are `[B, H, S, D]`, or with `cu_seqlens` `[1, H, N, D]` with the rows packed along N.
    """

    alibi_slopes: Tensor | None  # fp32 [H]
    cu_seqlens: Tensor | None  # int32 [B+1]
    seq_lens: Tensor | None  # int [B], number of valid own keys of each padded row
    prefix_index: Tensor | None  # int [B]
    prefix_lens: Tensor | None  # int [G]
    hidden: Tensor | None  # int [B, 2]
    row_ids: Tensor | None  # int [B]
    keep: Tensor | None  # bool [B, C]
    seed_in_memory: Tensor | None  # int64 [1], in the place of `seed`: read when kernels run
    context_length: int  # C
    drop_p: float
    seed: int  # signed 64-bit pattern of the seed
    scale: float
    causal: bool
    window: int  # 0: none
    window_prefix: bool
    softcap: float  # 0: none


PROBLEM_TENSORS = 9  # the first fields


class Prepared(NamedTuple):
    """What earlier calls of a step have computed, from `prepare`. None: the call computes it.

    Backends that know of it have two functions. `tables(q, k, v, prefix_k, prefix_v, prefix_bias, problem, backward)`
    depends on the problem, and on sizes and types, but not on what the other tensors hold. `order(q)` says which calls
    may use what another one has computed: those of the same value.
    """

    forward_tables: Tensor | None = None
    backward_tables: Tensor | None = None
    prefix_k: Tensor | None = None  # in the rows' type, in the place of an fp32 one
    prefix_v: Tensor | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the softmax and of all accumulation for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_count(q: Tensor, problem: Problem) -> int:
    """B, the number of rows of a call whose q is `[B, H, S, D]`, or `[1, H, N, D]` with cu_seqlens."""
    return q.shape[0] if problem.cu_seqlens is None else problem.cu_seqlens.shape[0] - 1


def check_values(q: Tensor, k: Tensor, prefix_k: Tensor, problem: Problem) -> None:
    """Raise ValueError for indices and lengths that would read outside of a tensor, or that have no meaning.

    CPU tensors only, since it reads values; kernels on other devices clamp them. `python_bindings/cpu.cpp` makes the
    same checks for the C++ kernels.
    """
    if q.device.type != "cpu":
        return
    check_spans(problem.hidden, problem.context_length)
    check_row_ids(problem.row_ids)
    G, P, T = prefix_k.shape[0], prefix_k.shape[2], k.shape[2]
    _check_range("prefix_index", problem.prefix_index, G - 1)
    _check_range("prefix_lens", problem.prefix_lens, P)
    _check_range("seq_lens", problem.seq_lens, T)
    if problem.prefix_index is None and G == 0 and row_count(q, problem):
        raise ValueError("prefix_k must hold at least one prefix (G >= 1) when there are rows, got G = 0")
    cu_seqlens = problem.cu_seqlens
    if cu_seqlens is not None:
        steps = cu_seqlens.diff()
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != q.shape[2] or bool((steps < 0).any()):
            raise ValueError(
                f"cu_seqlens must start at 0, never decrease and end at N = {q.shape[2]}, got {cu_seqlens.tolist()}"
            )


def _check_range(name: str, x: Tensor | None, last: int) -> None:
    if x is None or x.numel() == 0:
        return
    low, high = (int(value) for value in x.aminmax())
    if low < 0 or high > last:
        raise ValueError(f"{name} must be in [0, {last}], got {low if low < 0 else high}")
