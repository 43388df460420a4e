"""Keys and values of a context whose tokens see each other in both directions, as in a prefix LM (Raffel and others,
arXiv 1910.10683): the stock model runs with a mask that hides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache

from ctkernels.tuning.hf.discover import own_attention
from ctkernels.tuning.hf.encode import Encoded, _eval_mode
from ctkernels.tuning.hf.kinds import Reach
from ctkernels.tuning.hf.models import ALIBI, Decoder, find_decoder
from ctkernels.tuning.hf.parallel import head_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layers = list[Tensor]  # [Hk, P, D] per layer
WITH_A_MASK = ("sdpa", "eager")  # implementations that add the mask they are given, and no causal one


def encode_both_ways(model: PreTrainedModel, input_ids: Tensor) -> Encoded:
    """Keys and values `[Hk, P, D]` of every layer for a context, int `[P]`, every token of which sees all others.

    Raises:
        ValueError: a model or length for which this is not exact, as in `check_both_ways`; a model that saw its tokens
            in one direction nevertheless.
    """
    decoder, length = find_decoder(model), len(input_ids)
    check_both_ways(model, length)
    keys, values = _run(decoder, input_ids)
    if length > 1 and len(keys) > 1:  # with a mask of its own, the first token would read nothing but itself
        alone, _ = _run(decoder, input_ids[:1])
        rounding = 8 * torch.finfo(decoder.dtype).eps
        if all(torch.allclose(a[:, :1], b, rounding, rounding) for a, b in zip(keys[1:], alone[1:], strict=True)):
            raise ValueError(
                f"start='prefix-lm' needs attention in both directions, but {type(decoder.model).__name__} with "
                f"attn_implementation={_implementation(decoder)!r} hides later tokens whatever mask it is given"
            )
    return Encoded(keys, values, {})


def check_both_ways(model: PreTrainedModel, length: int) -> None:
    """Refuse a model, or a context of `length` tokens, that cannot be encoded in both directions exactly.

    Raises:
        ValueError: ALiBi (its bias is one of causal attention), a sliding window that is shorter than the context,
            an attention implementation that takes no mask, or weights that other processes hold a part of.
    """
    decoder = find_decoder(model)
    name, config = type(decoder.model).__name__, decoder.config
    if decoder.family.positions == ALIBI:
        raise ValueError(f"start='prefix-lm' is not defined for {name}: ALiBi biases attention to earlier tokens alone")
    plain = not decoder.keepers and not decoder.borrowers and decoder.first_position_id == 0
    if not plain or own_attention(decoder.attentions[0]) is not None or any(r != Reach() for r in decoder.reaches):
        raise ValueError(
            "start='prefix-lm' needs a model whose mask alone says what a token sees, and all layers of which have "
            f"keys and values of their own; {name} is none"
        )
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or any(kind != "full_attention" for kind in kinds)
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and length > window:
        raise ValueError(
            f"start='prefix-lm' lets all tokens see each other, but {name} has layers with a window of {window}, and "
            f"the context has {length} tokens"
        )
    if _implementation(decoder) not in WITH_A_MASK:
        raise ValueError(
            f"start='prefix-lm' needs attn_implementation 'sdpa' or 'eager', which take any mask, got "
            f"{_implementation(decoder)!r}"
        )
    if isinstance(decoder.model, FSDPModule) or head_group(decoder.attentions[0]) is not None:
        raise ValueError(f"start='prefix-lm' needs weights in one piece, but those of this {name} are sharded")


def _implementation(decoder: Decoder) -> str | None:
    return getattr(decoder.config, "_attn_implementation", None)


def _run(decoder: Decoder, input_ids: Tensor) -> tuple[Layers, Layers]:
    tokens = torch.as_tensor(input_ids).to(decoder.device)[None]
    length = tokens.shape[1]
    nothing_hidden = torch.zeros(1, 1, length, length, dtype=decoder.dtype, device=decoder.device)
    positions = torch.arange(length, device=decoder.device)[None]
    cache = DynamicCache()  # without a config every layer keeps all positions
    with torch.no_grad(), _eval_mode(decoder.model):
        decoder.base(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=nothing_hidden,
            past_key_values=cache,
            use_cache=True,
        )
    dtype = decoder.prefix_dtype
    keys, values = (
        [getattr(cache.layers[index], name)[0] for index in decoder.cache_indices] for name in ("keys", "values")
    )
    return [x.to(dtype, copy=True).contiguous() for x in keys], [x.to(dtype, copy=True).contiguous() for x in values]
