"""What Llama 4 does in long sequences: attention within chunks of positions, and queries that are scaled by position.

Neither is a rule of the op. Both are exact here, and chunks are slow: the op runs once for each of them. In sequences
that are shorter than a chunk (8192 tokens in published models) nothing of this happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctkernels import ContextMask
from ctkernels.tuning.hf.forward_state import ForwardState


def by_chunk(
    run: Callable[[ForwardState], Tensor], chunk: int, state: ForwardState, lengths: Tensor, index: int
) -> Tensor:
    """Attention of layer `index` within chunks of positions `[B, S, H, D]`: once for each chunk, without other keys.

        keys      0 1 2 3 | 4 5 6 7 | 8 9
        query 5             # #
        query 8                       #

    run: attention as for a state.  lengths: number of valid own keys of each row, int64 `[B]`.
    """
    B, P, here = len(lengths), state.length(index), lengths.device
    # own position of the first key: a cache keeps no more than a chunk
    first = state.own.to(here)[:, -1] + 1 - lengths if state.past else torch.zeros_like(lengths)
    T = int(lengths.max())
    own = (_starts(state, index, here) + first)[:, None] + torch.arange(T, device=here)
    keys = torch.cat((torch.arange(P, device=here).expand(B, P), own), dim=1) // chunk  # [B, P+T]
    queries = positions(state, index, here) // chunk  # [B, S]
    visible = keys.new_ones(keys.shape, dtype=torch.bool)
    if state.mask is not None:
        context = P if state.mask.length is None else state.mask.length
        visible[:, :context] = state.mask.to(here).dense(B, context)
    out: Tensor | None = None
    for number in range(int(queries.min()), int(queries.max()) + 1):
        mask = ContextMask(keep=visible & (keys == number), length=P + T)
        part = run(replace(state, mask=mask))
        out = part if out is None else torch.where((queries == number)[..., None, None], part, out)
    assert out is not None
    return out


def tempered(attention: Any, query: Tensor, state: ForwardState, index: int) -> Tensor:
    """Queries `[B, H, S, D]` of layer `index`, which its class has scaled for their positions, scaled for those that
    they have behind the prefix.

    In layers without rotary embedding it scales by log1p(floor((n + 1) / floor_scale)) * attn_scale + 1, where n counts
    the tokens before, without those of the prefix.
    """
    own = torch.arange(state.past, state.past + query.shape[2], device=query.device)[None]
    exact = torch.promote_types(query.dtype, torch.float32)

    def scale(n: Tensor) -> Tensor:  # fp32, as in the class
        factor = torch.log1p(torch.floor((n.float() + 1) / attention.floor_scale)) * attention.attn_scale + 1
        return factor.to(exact)

    factor = scale(positions(state, index, query.device)) / scale(own)
    return (query * factor[:, None, :, None]).to(query.dtype)


def positions(state: ForwardState, index: int, device: torch.device) -> Tensor:
    """Position of each query along `[prefix | own tokens]`, int64 `[B or 1, S]`."""
    starts = _starts(state, index, device)
    if state.cu_seqlens is not None:
        lengths = state.cu_seqlens.diff().to(device)
        starts = starts.expand(len(lengths)).repeat_interleave(lengths, output_size=state.own.shape[1])
        return starts + state.own.to(device)
    return starts[:, None] + state.own.to(device)


def _starts(state: ForwardState, index: int, device: torch.device) -> Tensor:
    """Position of each row's first own token, int64 `[B]` or `[1]`."""
    if state.prefix_index is None or state.prefix_lens is None:
        return torch.full((1,), state.length(index), device=device)
    return state.prefix_lens.to(device, torch.int64)[state.prefix_index.to(device)]
