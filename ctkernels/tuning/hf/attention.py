"""The attention function and the mask function that transformers calls in a model with an attached prefix.

    model's forward -> row_layout (once per forward and layer type): 2D padding mask -> where each row's keys are
                    -> attention_forward (every layer): the op on [prefix of this layer | own keys]

transformers builds a `[B, 1, S, T]` mask for most attention functions. The op only needs to know where a row's valid
keys begin and end, so `row_layout` returns a small int64 tensor instead of a mask. It has four dimensions, because
transformers passes on any mask with four:

    None                    every key is valid
    [B, 1, 1, 1]            end of each row's valid keys (right padding, static caches)
    [B, 1, 1, 2]            first and end of each row's valid keys (left padding, too)
    [1, 1, 1, 0]            every key is valid, or rows are packed (passed by an attachment instead of no mask, so that
                            transformers makes none)

They have a name of their own: a model under `attn_implementation="ctkernels"` without a prefix is served by plain.py,
and never gets a layout for a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks, sdpa_mask

from ctkernels import prefix_attention
from ctkernels.attention import attend as packed_attention
from ctkernels.tuning.hf.forward_state import ForwardState
from ctkernels.tuning.hf.kinds import Expand, expand_of
from ctkernels.tuning.hf.llama4 import by_chunk, tempered
from ctkernels.tuning.hf.parallel import own_heads
from ctkernels.tuning.hf.plain import IMPLEMENTATION, causal_rule, inside, unknown_argument

STATE = "ctkernels_state"  # the keyword argument that passes the state of a forward pass to the layers
ATTACHED_IMPLEMENTATION = f"{IMPLEMENTATION}_attached"
REACHES = ("sliding_window", "attention_chunk_size")  # what a layer's mask may hide is known, see `Reach`
ATTACHED = "_ctkernels_layer_index"  # attribute of an attention module while a prefix is attached to it
HALVED = "_ctkernels_halved"  # the same, of a class that attends twice, with half of the values each time
# arguments of the op that a layer with packed rows may leave out, and what they are then
PACKED = {"seq_lens": None, "causal": True, "window_prefix": True} | dict.fromkeys(
    ("scale", "window", "softcap", "alibi_slopes", "prefix_bias", "sinks")
)
COMPILED_MASK = "under torch.compile, a padding mask must have rows that are one run of ones, up to the last query"


def no_padding(device: torch.device) -> Tensor:
    """The layout for packed rows, or if every key is valid."""
    return torch.empty(1, 1, 1, 0, dtype=torch.int64, device=device)


def is_layout(mask: Any) -> bool:
    """Whether `mask` is a layout of `row_layout`. (Users' 4D masks are bool or floating.)"""
    return (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.dtype == torch.int64
        and mask.shape[1:3] == (1, 1)
        and mask.shape[3] <= 2
    )


def row_layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The layout of a batch (see the top of this file), or a dense bool mask `[B, 1, S, T]` if no layout describes it.

    transformers calls it; the arguments are those of its mask functions. attention_mask: bool `[B, L]`, True = token. A
    layout is possible if the rule is causal (perhaps with a sliding window, which the op applies itself) and the tokens
    of each row are one run, which with a cache (T > S) ends at the last query.
    """
    plain = (
        not use_vmap
        and "allow_is_bidirectional_skip" not in kwargs
        and (
            allow_is_causal_skip or q_length == 1 or _has_no_blocks(mask_function)
        )  # transformers sets it to False if the rule is not just causal
        and (local_size is None or local_size in (getattr(config, name, None) for name in REACHES))
    )
    limit = q_offset + q_length - kv_offset  # keys up to the last query
    bounded = isinstance(limit, Tensor) or limit < kv_length
    if plain and attention_mask is None:
        if not bounded:
            return None
        return torch.as_tensor(limit, device=device).reshape(1, 1, 1, 1).expand(batch_size, 1, 1, 1)
    if plain:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        valid = nn.functional.pad(valid, (0, kv_length - valid.shape[1]))
        position = torch.arange(kv_length, device=valid.device)
        if bounded:
            valid = valid & (position < limit)
        count = valid.sum(dim=1)
        end = ((position + 1) * valid).amax(dim=1)
        first = end - count
        one_run = (valid == ((first[:, None] <= position) & (position < end[:, None]))).all()
        ends_at_query = ((end == limit) | (count == 0)).all() if kv_length > q_length else one_run
        if torch.compiler.is_compiling():  # a graph cannot depend on values: the general layout, checked at run time
            torch._assert_async(one_run & ends_at_query, COMPILED_MASK)
            return torch.stack((first, end), dim=-1)[:, None, None]
        # one transfer from the device for all three values
        complete, representable, from_start = torch.stack(
            ((count == kv_length).all(), one_run & ends_at_query, (first == 0).all())
        ).tolist()
        if complete:
            return None
        if representable:
            return (end[:, None] if from_start else torch.stack((first, end), dim=-1))[:, None, None]
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **kwargs,
    )


def _has_no_blocks(mask_function: Callable) -> bool:
    """Whether it is the causal rule, or that within a window, extended by blocks (images) of which there are none."""
    if getattr(mask_function, "__code__", None) is not _OR:
        return False
    rule, *blocks = inside(mask_function)["mask_functions"]
    if not causal_rule(rule)[0] or any(getattr(x, "__code__", None) is not _BLOCKS for x in blocks):
        return False
    return all(bool((inside(x)["block_sequence_ids"] < 0).all()) for x in blocks)


_OR = or_masks(causal_mask_function).__code__
_BLOCKS = blockwise_overlay(torch.empty(0)).__code__


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    ctkernels_state: ForwardState | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    query `[B, H, S, D]`, key and value `[B, Hk, T, D]` (transposed views, read in place), T > S with a cache.
    s_aux: attention sinks `[H]`, the name that transformers gives them.
    Returns (`[B, S, H, D]`, None): there are no attention weights.

    Raises:
        ValueError: attention dropout, a mask that is not padding, an argument whose meaning is not known, or a layer
            that runs without a prefix or outside of its model's forward.
    """
    index = getattr(module, ATTACHED, None)
    name = type(module).__name__
    if index is None:
        raise ValueError(f"{name}: this layer has no prefix, or its attach block was left while the model ran")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layout = attention_mask if is_layout(attention_mask) else None
    unknown = unknown_argument(kwargs)
    if dropout > 0:
        raise ValueError(
            f"{name}: attention dropout {dropout} is not supported; put the model in eval mode: model.eval()"
        )
    if ctkernels_state is None:  # in layers that pass no keyword arguments on
        ctkernels_state = getattr(kwargs.get("position_ids"), STATE, None)
    if ctkernels_state is None:
        raise ValueError(f"{name}: a layer with an attached prefix was called outside of its model's forward")
    if unknown is not None:
        raise ValueError(f"{name}: an attached model cannot take the argument {unknown}, whose meaning is not known")
    if not is_causal or (layout is None and attention_mask is not None):
        raise ValueError(
            f"{name}: an attached model takes causal attention with a 2D padding mask whose rows are one run of ones, "
            "got another mask or bidirectional attention; rows packed into one sequence need attachment.cu_seqlens"
        )
    reach = ctkernels_state.reaches[index]
    if reach.tempered:
        query = tempered(module, query, ctkernels_state, index)
    half = None
    if hasattr(module, HALVED):  # calls of a layer take turns, also when gradient checkpointing runs it again
        half = ctkernels_state.halves[index] = 1 - ctkernels_state.halves.get(index, 1)
    window = reach.window if sliding_window is None else sliding_window
    settings = {"scale": scaling, "window": window, "softcap": softcap or None, "sinks": s_aux}
    rows = query, key, value, layout, expand_of(module), half
    if reach.chunk is None or ctkernels_state.length(index) + ctkernels_state.past + query.shape[2] <= reach.chunk:
        return attend(ctkernels_state, index, *rows, **settings), None
    tensors = dict(zip(("query", "key", "value", "layout", "expand", "half"), rows, strict=True))
    run = partial(attend, index=index, **tensors, **settings)
    return by_chunk(run, reach.chunk, ctkernels_state, ctkernels_state.lengths(layout, key), index), None


def attend(
    state: ForwardState,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor | None,
    expand: Expand | None = None,
    half: int | None = None,
    **settings: Any,
) -> Tensor:
    """The op on layer `index`: q `[B, H, S, D]`, k and v `[B, Hk, T, D]` -> `[B, S, H, D]`.

    expand: see `expand_of`.  half: which half of the prefix's value heads stands in for all of them, as it does in
    `value`; default: neither.
    """
    held = state.keys[index], state.values[index]
    prefix = [*held]
    if expand is None and held[0].shape[-3] != key.shape[1]:
        prefix = [own_heads(x, key.shape[1], state.group) for x in held]
    elif expand is not None:
        alone = held[0].dim() == 3
        prefix = list(expand(*(x.to(query.dtype)[None] if alone else x.to(query.dtype) for x in held)))
        prefix = [x[0] for x in prefix] if alone else prefix
    if half is not None:
        prefix[1] = torch.cat((prefix[1].chunk(2, dim=-3)[half],) * 2, dim=-3)
    here = query.device  # layers of one model may be on different devices
    settings["prefix_index"] = None if state.prefix_index is None else state.prefix_index.to(here)
    settings["prefix_lens"] = None if state.prefix_lens is None else state.prefix_lens.to(here)
    settings["backend"], mask = state.backend, None if state.mask is None else state.mask.to(here)
    state.consumed.add(index)
    if state.cu_seqlens is not None:
        rows = {**PACKED, **settings, "cu_seqlens": state.cu_seqlens.to(here)}
        return packed_attention(query, key, value, *prefix, mask, **rows)[0].transpose(1, 2)
    if layout is None or layout.shape[-1] == 0:
        return prefix_attention(query, key, value, *prefix, mask, **settings).transpose(1, 2)
    lengths, row, forward, back = state.span(layout, key.shape[2])
    aligned = query.shape[2] == key.shape[2]
    if row is not None:
        # The op expects padding after a row's keys: move each row's first valid key to the front. The queries move,
        # too, if there is one for every key. With a cache (T > S) they already are the last S of the valid keys.
        key, value = (x.transpose(1, 2)[row, forward].transpose(1, 2) for x in (key, value))
        query = query.transpose(1, 2)[row, forward].transpose(1, 2) if aligned else query
    out = prefix_attention(query, key, value, *prefix, mask, seq_lens=lengths, **settings).transpose(1, 2)
    return out if row is None or not aligned else out[row, back]


AttentionInterface.register(ATTACHED_IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(ATTACHED_IMPLEMENTATION, row_layout)
