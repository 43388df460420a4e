"""Removing rotary position embeddings from keys, and applying them at any position."""

from __future__ import annotations

import torch
from torch import Tensor

from ctkernels.tuning.hf.models import ROTARY, Decoder, rope_switch


def unrotated(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys `[Hk, n, D]` of a layer without the rotary embedding of their positions, int64 `[n]`.

    The embedding rotates each pair of dimensions and scales it: (c, s) = scale * (cos, sin). Its inverse rotates back
    and divides by c^2 + s^2. Without rotary embeddings in the model the keys are returned unchanged.
    """
    return _turn(decoder, layer, keys, positions, back=True)


def rotated(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys `[Hk, n, D]` of a layer with the rotary embedding of positions, int64 `[n]`."""
    return _turn(decoder, layer, keys, positions, back=False)


def check_fixed_rotation(decoder: Decoder, what: str) -> None:
    """Raise ValueError for a model whose rotation depends on the length of the sequence."""
    if rope_switch(decoder.config, 0) is not None:
        raise ValueError(
            f"{what} moves keys to other positions, but {type(decoder.model).__name__} rotates keys differently in "
            "longer sequences (dynamic or longrope scaling)"
        )


@torch.no_grad()
def _turn(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor, back: bool) -> Tensor:
    if decoder.family.positions != ROTARY or positions.numel() == 0:
        return keys
    kinds = getattr(decoder.config, "layer_types", None)
    parameters = getattr(decoder.config, "rope_parameters", None) or {}
    by_kind = (kinds[layer],) if kinds and set(kinds) <= set(parameters) else ()  # Gemma 3: one rotation per layer type
    c, s = (x[0] for x in decoder.base.rotary_emb(keys[:1], positions.to(keys.device)[None], *by_kind))  # [n, R]
    turned, rest = keys[..., : c.shape[-1]], keys[..., c.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    quarter = torch.cat((-second, first), dim=-1)
    turned = (turned * c - quarter * s) / (c * c + s * s) if back else turned * c + quarter * s
    return torch.cat((turned, rest), dim=-1)
