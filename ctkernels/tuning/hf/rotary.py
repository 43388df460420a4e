"""Taking rotary position embeddings off keys and putting them on, at any position.

How a class turns keys (halves or neighbours, some dimensions or all) is what the `apply_rotary_pos_emb` of its modeling
file does; which layers turn theirs at all is seen from one token at two positions, where the result is checked, too.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ctkernels.tuning.hf.discover import ROTARY_TABLE
from ctkernels.tuning.hf.encode import encode
from ctkernels.tuning.hf.models import ROTARY, Decoder, rope_switch

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [Hk, n, D], cos and sin [n, R] -> x turned
MOVED = 5  # positions that the token is moved by
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # relative to the largest key; of others 3e-2


def unrotated(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys `[Hk, n, D]` of a layer without the rotary embedding of their positions, int64 `[n]`.

    The embedding turns each pair of dimensions by an angle and scales it, (c, s) = scale * (cos, sin); its inverse
    turns back and divides by c^2 + s^2. Keys of layers without rotary embedding are returned as they are.
    """
    return _turned(decoder, layer, keys, positions, back=True)


def rotated(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """Keys `[Hk, n, D]` of a layer with the rotary embedding of positions, int64 `[n]`."""
    return _turned(decoder, layer, keys, positions, back=False)


def check_fixed_rotation(decoder: Decoder, what: str) -> None:
    """Refuse models whose keys cannot be moved: their rotation depends on the length of the sequence, or is not known.

    Raises:
        ValueError: naming the model.
    """
    name = type(decoder.model).__name__
    if rope_switch(decoder.config, 0) is not None:
        raise ValueError(
            f"{what} moves keys to other positions, but {name} rotates keys differently in longer sequences (dynamic "
            "or longrope scaling)"
        )
    scaled = any("scaling_beta" in name for name in getattr(decoder.config, "rope_parameters", None) or {})
    if scaled or getattr(decoder.config, "attn_temperature_tuning", False):
        raise ValueError(f"{what} moves keys to other positions, but {name} scales queries by their position")
    if decoder.family.positions == ROTARY and _turns(decoder) is None:
        raise ValueError(f"{what} moves keys to other positions, but how {name} rotates them is not known")


def _turned(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor, back: bool) -> Tensor:
    if decoder.family.positions != ROTARY or positions.numel() == 0:
        return keys
    turns = _turns(decoder)
    if turns is None:
        raise ValueError(f"keys of {type(decoder.model).__name__} cannot be moved: how it rotates them is not known")
    return keys if turns[layer] is None else _apply(turns[layer], decoder, layer, keys, positions, back)


@torch.no_grad()
def _apply(turn: Turn, decoder: Decoder, layer: int, keys: Tensor, positions: Tensor, back: bool) -> Tensor:
    c, s = _angles(decoder, layer, keys, positions)  # [n, R]
    return turn(keys, c, -s) / (c * c + s * s)[:, :1] if back else turn(keys, c, s)


def _angles(decoder: Decoder, layer: int, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled cosines and sines of positions `[n]` in a layer, `[n, R]`."""
    attention, at = decoder.attentions[layer], decoder.cache_indices[layer]
    if hasattr(attention, ROTARY_TABLE):
        s, c = getattr(attention, ROTARY_TABLE).to(keys)[positions.to(keys.device)].chunk(2, dim=-1)
        return c, s
    kinds = getattr(decoder.config, "layer_types", None)
    parameters = getattr(decoder.config, "rope_parameters", None) or {}
    by_kind = (kinds[at],) if kinds and set(kinds) <= set(parameters) else ()  # Gemma 3: a rotation per layer type
    c, s = (x[0] for x in decoder.base.rotary_emb(keys[:1], positions.to(keys.device)[None], *by_kind))
    return c, s


_known: weakref.WeakKeyDictionary[nn.Module, tuple[Turn | None, ...] | None] = weakref.WeakKeyDictionary()


def _turns(decoder: Decoder) -> tuple[Turn | None, ...] | None:
    """How each layer turns its keys, None for one that does not; None if that is not known."""
    if decoder.base not in _known:
        _known[decoder.base] = _find_turns(decoder)
    return _known[decoder.base]


def _find_turns(decoder: Decoder) -> tuple[Turn | None, ...] | None:
    """From one token at positions 0 and MOVED: it sees itself alone, so that its keys differ by their rotation."""
    token = torch.tensor([decoder.base.get_input_embeddings().weight.shape[0] // 2])
    (here, values), (there, moved_values) = (encode(decoder.model, token, position=at)[:2] for at in (0, MOVED))
    tolerance = TOLERANCE.get(decoder.dtype, 3e-2)
    zero, moved = torch.tensor([0]), torch.tensor([MOVED])

    def same(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= tolerance * b.abs().max())

    def moves(turn: Turn, layer: int) -> bool:
        try:
            bare = _apply(turn, decoder, layer, here[layer], zero, back=True)
            return same(_apply(turn, decoder, layer, bare, moved, back=False), there[layer])
        except (RuntimeError, TypeError, ValueError, AttributeError):  # a class that does it in another way
            return False

    if not all(map(same, moved_values, values)):  # latent attention holds a rotated part in place of values
        return None
    found: list[Turn | None] = []
    for layer, attention in enumerate(decoder.attentions):
        if same(there[layer], here[layer]):
            found.append(None)
            continue
        turn = next((turn for turn in _candidates(attention) if moves(turn, layer)), None)
        if turn is None:
            return None
        found.append(turn)
    return tuple(found)


def _candidates(attention: nn.Module) -> list[Turn]:
    """Ways in which a class may turn keys."""
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        return []
    return [partial(_by_class, function, width) for width in (1, 2)]


def _by_class(function: Callable, width: int, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """`function` on the first dimensions of x, `width` times as many as it has angles; the others pass through."""
    turned, rest = x[None, ..., : width * c.shape[-1]], x[..., width * c.shape[-1] :]
    parameters = inspect.signature(function).parameters
    if "k" in parameters:  # queries and keys at once
        turned = function(turned, turned, c[None], s[None])[1]
    elif "tensor" in parameters:  # GPT-J, which has heads behind tokens
        turned = function(turned.transpose(1, 2), sin=s[None], cos=c[None]).transpose(1, 2)
    else:
        turned = function(turned, c[None], s[None])
    return torch.cat((turned[0], rest), dim=-1)
