"""Attention of a layer without a prefix: what `attn_implementation="ctkernels"` computes on an unmodified model.

The op computes causal attention with or without padding. transformers' own SDPA function computes the rest:

- what the op does not have: arbitrary masks, bidirectional or cross attention, attention dropout;
- on a CPU, calls that are so small that the op's set-up is most of their time;
- on other devices, where nothing has been measured yet, everything that it can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctkernels import ContextMask, prefix_attention

# On a CPU the op is faster than SDPA from so many pairs of a query and a key on, over all rows and heads; FEW_KEYS:
# with one query per row, keys times query heads per KV head. benchmarks/bench_dropin.py shows both sides of the limits.
SMALL = {torch.float32: 2**17, torch.float64: 2**17, torch.bfloat16: 2**12, torch.float16: 2**12}
FEW_KEYS = 2**13
# arguments of other models' attention that SDPA would silently ignore
IGNORED_BY_SDPA = ("s_aux", "head_mask")


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    *,
    mask: Tensor | None = None,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query `[B, H, S, D]`, key and value `[B, Hk, T, D]` -> (`[B, S, H, D]`, None), as a model's layer calls it.

    layout: where each row's valid keys are, from `attention.row_layout`.  mask: instead of a layout, any mask that SDPA
    takes.  kwargs: further arguments of the model.

    Raises:
        ValueError: an argument that neither the op nor SDPA has.
    """
    name = type(module).__name__
    ignored = [argument for argument in IGNORED_BY_SDPA if kwargs.get(argument) is not None]
    if ignored:
        raise ValueError(f"{name}: {', '.join(ignored)} cannot be served by ctkernels or SDPA")
    foreign = mask is not None or not is_causal or any(kwargs.get(x) is not None for x in ("position_bias", "cache"))
    if foreign and layout is not None:
        raise ValueError(f"{name}: padding together with bidirectional attention or a position bias is unsupported")
    if dropout > 0 and softcap is not None:
        raise ValueError(f"{name}: attention dropout {dropout} together with softcap is unsupported; use model.eval()")
    if not (foreign or dropout > 0 or (softcap is None and is_small(query, key))):
        return _op(query, key, value, layout, scale=scaling, window=window, softcap=softcap), None
    S, T = query.shape[2], key.shape[2]
    if not foreign and (layout is not None or 1 < S < T or (window is not None and window < T)):
        mask = dense_mask(layout, S, T, window, query.device)
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout, scaling, is_causal, softcap=softcap, **kwargs
    )


def is_small(query: Tensor, key: Tensor) -> bool:
    """Whether SDPA is faster than the op: measured on a CPU, assumed on other devices."""
    if query.device.type != "cpu":
        return True
    B, H, S, _ = query.shape
    Hk, T = key.shape[1:3]
    if S == 1 and query.dtype in (torch.float32, torch.float64) and T * (H // Hk) < FEW_KEYS:
        return True
    return SMALL[query.dtype] > B * H * S * T


def dense_mask(layout: Tensor | None, S: int, T: int, window: int | None, device: torch.device) -> Tensor:
    """A layout as a mask, bool `[B or 1, 1, S, T]`, True = visible.

    The S queries are the last ones of a row, as in the op: with S = T they start at key 0, otherwise they end where the
    row's keys end.
    """
    first, end = torch.zeros(2, 1, 1, 1, 1, dtype=torch.int64, device=device)
    end = end + T
    if layout is not None:
        *front, end = layout.split(1, dim=-1)
        first = front[0] if front else first
    position = torch.arange(T, device=device)
    query = torch.arange(S, device=device)[:, None] + (0 if S == T else end - S)
    visible = (first <= position) & (position < end) & (position <= query)
    return visible if window is None else visible & (query - position < window)


def _op(query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, **settings: Any) -> Tensor:
    """The op with an empty prefix. Padding on the left becomes a hidden span of own keys, so nothing is moved."""
    empty = key.new_empty(key.shape[1], 0, key.shape[3])
    if layout is None:
        return prefix_attention(query, key, value, empty, empty, **settings).transpose(1, 2)
    *first, end = layout.flatten(0, 2).split(1, dim=-1)  # [B, 1]
    context = None
    if first:
        hidden = torch.cat((torch.zeros_like(first[0]), first[0]), dim=-1)
        context = ContextMask(hidden=hidden, length=key.shape[2])
    out = prefix_attention(query, key, value, empty, empty, context, seq_lens=end.flatten(), **settings)
    return out.transpose(1, 2)
