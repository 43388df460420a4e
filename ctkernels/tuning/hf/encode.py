"""Keys and values of contexts: the model's cache after a forward pass without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.attention import ATTACHED
from ctkernels.tuning.hf.models import ALIBI, Decoder, find_decoder
from ctkernels.tuning.hf.numbering import numbered
from ctkernels.tuning.hf.parallel import all_heads, head_group
from ctkernels.tuning.hf.protocols import PrefixLike
from ctkernels.tuning.hf.states import States, cache_for, copies, states_of

Layers = list[Tensor]  # [Hk, P, D] per layer


class Encoded(NamedTuple):
    """What is left of a context: keys `[Hk, P, D]` and values of every layer, and states by name (`states.py`)."""

    keys: Layers
    values: Layers
    states: States


def encode(
    model: PreTrainedModel, input_ids: Tensor, behind: PrefixLike | None = None, position: int | None = None
) -> Encoded:
    """What is left of a context, int `[P]`, in every layer.

    Args:
        behind: a prefix that the context reads. Its keys and values are not in the result; states go on from its own.
        position: position id of the first token; default: the prefix's `first_position`, or 0 without a prefix.

    Raises:
        ValueError: the model already has a prefix attached.
    """
    decoder = find_decoder(model)
    return _encode(decoder, {"input_ids": torch.as_tensor(input_ids).to(decoder.device)[None]}, behind, position)


def encode_tokens(
    model: PreTrainedModel, input_ids: Tensor, behind: PrefixLike | None = None, position: int | None = None
) -> tuple[Layers, Layers]:
    """Keys and values of `encode`, for those who make of them what has no state.

    Raises:
        ValueError: a model with layers that keep a state; as `encode`.
    """
    decoder = find_decoder(model)
    if decoder.keepers:
        kinds = ", ".join(dict.fromkeys(type(keeper).__name__ for keeper in decoder.keepers))
        raise ValueError(
            f"{type(decoder.model).__name__} has layers that keep a state ({kinds}), which belongs to one context as a "
            "whole and cannot be put together from others; use the context's own prefix"
        )
    return encode(model, input_ids, behind, position)[:2]


def encode_embeddings(model: PreTrainedModel, embeddings: Tensor) -> Encoded:
    """As `encode`, for input embeddings `[P, E]`."""
    decoder = find_decoder(model)
    return _encode(decoder, {"inputs_embeds": embeddings.to(decoder.device, decoder.dtype)[None]}, None, None)


def _encode(decoder: Decoder, inputs: dict[str, Tensor], behind: PrefixLike | None, position: int | None) -> Encoded:
    if any(hasattr(attention, ATTACHED) for attention in decoder.attentions):
        raise ValueError(
            f"this {type(decoder.model).__name__} has a prefix attached; leave that block to encode another"
        )
    length = next(iter(inputs.values())).shape[1]
    if length == 0:
        return Encoded(_empty(decoder, "key_dim"), _empty(decoder, "value_dim"), _first_states(decoder, behind))
    first = 0 if behind is None else behind.first_position
    start = first if position is None else position
    # an attached model adds the prefix's first position
    own = torch.arange(start - first, start - first + length, device=decoder.device)[None]
    positions = own + (0 if behind is not None else decoder.first_position_id)
    attached = nullcontext() if behind is None else Attachment(behind, decoder.model)
    cache = cache_for(decoder)
    with torch.no_grad(), _eval_mode(decoder.model), numbered(decoder.base, positions), attached:
        mask = torch.ones(1, length, dtype=torch.int64, device=decoder.device)
        told = {} if decoder.family.positions == ALIBI else {"position_ids": positions}
        run = decoder.base
        if isinstance(decoder.model, FSDPModule):  # it gathers its weights only if the whole model is called
            run = partial(decoder.model, logits_to_keep=1)
        run(**inputs, **told, attention_mask=mask, past_key_values=cache, use_cache=True)
    # a copy: the cache may share memory between layers or with the model
    dtype, group = decoder.prefix_dtype, head_group(decoder.attentions[0])

    def own_copies(kind: str, dim: str) -> Layers:
        copies = []
        for index, (at, shape) in enumerate(zip(decoder.cache_indices, decoder.shapes, strict=True)):
            layer = cache.layers[at] if at < len(cache.layers) else None
            if not isinstance(getattr(layer, kind, None), Tensor):
                raise ValueError(f"layer {index} of {type(decoder.model).__name__} caches no {kind} of its own")
            cached = getattr(layer, kind)[0].to(dtype, copy=True).contiguous()
            copies.append(all_heads(cached, shape.heads, group))
            if copies[-1].shape != (shape.heads, length, getattr(shape, dim)):
                raise ValueError(
                    f"layer {index} of {type(decoder.model).__name__} caches {kind} {list(copies[-1].shape)}, expected "
                    f"{[shape.heads, length, getattr(shape, dim)]}"
                )
        return copies

    states = {name: x[0].to(dtype, copy=True).contiguous() for name, x in states_of(cache).items()}
    return Encoded(own_copies("keys", "key_dim"), own_copies("values", "value_dim"), states)


def _first_states(decoder: Decoder, behind: PrefixLike | None) -> States:
    """States behind no token: those of the prefix, or zeros."""
    if not decoder.keepers:
        return {}
    if behind is not None:
        return copies(behind.states)
    token = torch.zeros(1, dtype=torch.int64)
    return {name: torch.zeros_like(x) for name, x in encode(decoder.model, token).states.items()}


def _empty(decoder: Decoder, dim: str) -> Layers:
    return [
        torch.empty(shape.heads, 0, getattr(shape, dim), dtype=decoder.prefix_dtype, device=device)
        for shape, device in zip(decoder.shapes, decoder.devices, strict=True)
    ]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block dropout and checkpointing (which drops caches) are off; then each module gets its mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for module, _ in before:
            module.training = differentiable_mode(module)
        yield
    finally:
        for module, training in before:
            module.training = training


def differentiable_mode(module: nn.Module) -> bool:
    """Whether a module must stay in training mode to keep its derivative.

    On some CPUs the 4-bit layers of bitsandbytes convert their weights, when they first run in eval mode, to a format
    that has no derivative.
    """
    return any(
        kind.__module__.startswith("bitsandbytes.") and kind.__name__ == "Linear4bit" for kind in type(module).__mro__
    )
