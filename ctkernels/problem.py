"""Problem: everything about a call that is not differentiated. One description that all backends receive."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A list of rows and the rules that say which key a query sees.

    The fields are in the order of the registered operators' schemas (`ops.py`). Tensors are None where a call does not
    use the feature. With `cu_seqlens`, q, k, v are `[1, H, N, D]` with the rows packed along N; without,
    `[B, H, S, D]`.
    """

    alibi_slopes: Tensor | None  # fp32 [H]
    cu_seqlens: Tensor | None  # int32 [B+1]
    seq_lens: Tensor | None  # int [B], valid own keys of each padded row
    prefix_index: Tensor | None  # int [B]
    prefix_lens: Tensor | None  # int [G]
    hidden: Tensor | None  # int [B, 2]
    row_ids: Tensor | None  # int [B]
    keep: Tensor | None  # bool [B, C]
    context_length: int  # C
    drop_p: float
    seed: int  # signed 64-bit pattern of the seed
    scale: float
    causal: bool
    window: int  # 0: none
    window_prefix: bool
    softcap: float  # 0: none
    backend: str


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the softmax and of all accumulation for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_count(q: Tensor, problem: Problem) -> int:
    """B, the number of rows of a call whose q is `[B, H, S, D]`, or `[1, H, N, D]` with cu_seqlens."""
    return q.shape[0] if problem.cu_seqlens is None else problem.cu_seqlens.shape[0] - 1
