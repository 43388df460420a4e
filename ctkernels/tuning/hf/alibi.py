"""BLOOM: ALiBi attention that does not use transformers' attention registry.

BloomAttention computes its own scores and never calls the registered function. While a prefix is attached, each
attention module of the model has its own `forward` (an instance attribute; no class changes). The decoder's
`build_alibi_tensor`, whose result every layer receives, returns the state of the forward pass instead. BLOOM adds
`slope * key position` and the op `-slope * distance`. They differ by a constant per query, which does not change the
softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, Cache

from ctkernels.tuning.hf.attention import ATTACHED, IMPLEMENTATION, ForwardState, attend, is_layout, row_layout
from ctkernels.tuning.hf.models import Decoder

# A separate name: a BLOOM model without an attached prefix must never get a layout instead of its mask.
ALIBI_IMPLEMENTATION = f"{IMPLEMENTATION}_alibi"
AttentionMaskInterface.register(ALIBI_IMPLEMENTATION, row_layout)


def alibi_slopes(heads: int) -> Tensor:
    """Slope of each head, fp32 `[heads]`.

    The first n heads, n the largest power of two up to `heads`, have 2^(-8 i / n) for i = 1..n. The others have the
    slopes of 2n heads at odd i.
    """
    n = 2 ** math.floor(math.log2(heads))
    exponents = [8 * i / n for i in range(1, n + 1)] + [4 * i / n for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor([2**-e for e in exponents])


def serve_alibi(decoder: Decoder, stack: ExitStack, current_state: Callable[[], ForwardState | None]) -> None:
    """Make the attention modules of `decoder` read the prefix until `stack` is closed.

    Raises:
        ValueError: the forward of an attention module is already replaced, for instance by offloading.
    """
    slopes = alibi_slopes(decoder.config.num_attention_heads).to(decoder.device)
    for attention in decoder.attentions:
        if "forward" in vars(attention):
            raise ValueError(
                f"the forward of a {type(attention).__name__} has been replaced, so it cannot be attached to"
            )
        attention.forward = partial(_forward, attention, slopes)
        stack.callback(delattr, attention, "forward")
    decoder.base.build_alibi_tensor = lambda attention_mask, num_heads, dtype: current_state()
    stack.callback(delattr, decoder.base, "build_alibi_tensor")


def _forward(
    module: nn.Module,
    slopes: Tensor,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: ForwardState | None,
    attention_mask: Tensor | None,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """BloomAttention.forward with a prefix: hidden_states, residual and the result are `[B, S, H * D]`."""
    if not isinstance(alibi, ForwardState):
        raise ValueError("BloomAttention: a layer with an attached prefix was called outside of its model's forward")
    if attention_mask is not None and not is_layout(attention_mask):
        raise ValueError(
            "BloomAttention: an attached model takes a 2D padding mask whose rows are one run of ones, got another mask"
        )
    if module.training and module.attention_dropout.p > 0:
        raise ValueError(
            f"BloomAttention: attention dropout {module.attention_dropout.p} is not supported; put the model in eval "
            "mode: model.eval()"
        )
    B, S, width = hidden_states.shape
    fused = module.query_key_value(hidden_states).view(B, S, module.num_heads, 3, module.head_dim)
    query, key, value = (x.transpose(1, 2) for x in fused.unbind(3))  # [B, H, S, D]
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    out = attend(
        alibi,
        getattr(module, ATTACHED),
        query,
        key,
        value,
        attention_mask,
        scale=module.inv_norm_factor,
        alibi_slopes=slopes.to(query.device),
    )
    out = module.dense(out.reshape(B, S, width))
    return residual + nn.functional.dropout(out, module.hidden_dropout, module.training), None
