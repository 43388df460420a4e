"""Rows packed one after another into one sequence, in each form in which transformers says so.

    cu_seq_lens_q, cu_seq_lens_k  integer [B+1]   offsets of the rows
    seq_idx                       integer [1, N]  row of each token
    position_ids                  integer [1, N]  start over at 0

These are what `DataCollatorWithFlattening` makes with return_flash_attn_kwargs, with return_seq_idx, and by default.
An attached model serves them as it serves `attachment.cu_seqlens`: no row sees another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
COMPILED = "position_ids are not consecutive; under torch.compile, packed rows need attachment.cu_seqlens"
TOLD_BY = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments of a model's forward


def packed_rows(own: Tensor | None, arguments: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """Offsets of the rows that are packed into `tokens`, integer `[B+1]`, or None where each row is one of the batch.

    own: `attachment.cu_seqlens`.  arguments: what the forward was given.

    Raises:
        TypeError: offsets or row numbers are not integer tensors.
        ValueError: they do not fit the tokens, or tell of different rows; position ids jump.
    """
    told = {name: arguments[name] for name in TOLD_BY if arguments.get(name) is not None}
    if own is not None:
        told = {"attachment.cu_seqlens": own, **told}
    for name, x in told.items():
        dimensions = 2 if name == "seq_idx" else 1
        if not isinstance(x, Tensor) or x.dim() != dimensions or x.dtype not in INTEGERS:
            raise TypeError(f"{name} must be an int32 tensor {['[B+1]', '[1, N]'][dimensions - 1]} or None")
    if told and tokens.shape[0] != 1:
        raise ValueError(
            f"with {next(iter(told))}, input_ids must be one packed sequence [1, N], got a batch of {tokens.shape[0]}"
        )
    if "seq_idx" in told:
        told["seq_idx"] = _offsets(told["seq_idx"][0].diff() != 0, tokens, told["seq_idx"])
    if not told:
        return _restarts(arguments, tokens)
    (first, offsets), *others = told.items()
    if first != "attachment.cu_seqlens" and not torch.compiler.is_compiling():
        _check_offsets(first, offsets.tolist(), tokens.shape[1])
    for name, other in others:
        if not torch.compiler.is_compiling() and other.tolist() != offsets.tolist():
            raise ValueError(f"{name} must tell of the same rows as {first}, {offsets.tolist()}, got {other.tolist()}")
    return offsets


def _restarts(arguments: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """The rows that position ids tell of: every one starts at 0."""
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None or arguments.get("past_key_values") is not None:
        return None
    jumps = positions.diff() != 1
    if torch.compiler.is_compiling():
        torch._assert_async(~jumps.any(), COMPILED)
        return None
    if not jumps.any():
        return None
    starts = positions[..., 1:][jumps]
    if tokens.shape[0] != 1 or starts.any() or positions.flatten()[0]:
        raise ValueError(
            "position_ids are not consecutive: rows packed into one sequence [1, N] start over at 0 each, padded rows "
            "need an attention_mask"
        )
    return _offsets(jumps.flatten(), tokens, positions)


def _offsets(new_row: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
    """Offsets of rows, given which of the tokens 1 to N-1 start one, bool `[N-1]`."""
    N = tokens.shape[1]
    if like.shape[-1] != N:
        raise ValueError(f"position_ids and seq_idx must have an entry for each of {N} tokens, got {list(like.shape)}")
    starts = new_row.nonzero().flatten() + 1
    return torch.cat((starts.new_zeros(1), starts, starts.new_full((1,), N)))


def _check_offsets(name: str, offsets: list[int], N: int) -> None:
    if offsets[:1] != [0] or offsets[-1] != N or sorted(offsets) != offsets:
        raise ValueError(f"{name} must rise from 0 to the number of tokens {N}, got {offsets}")
