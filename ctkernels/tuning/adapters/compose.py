"""Prefixes at other positions, and several prefixes as one.

A prefix's keys carry the positions at which they were made. Where a model rotates keys they can be turned on to other
positions; where it adds learned embeddings they are what they are; under ALiBi keys carry no position, distances count
along the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.hf.attach import check_fit
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.hf.models import ALIBI, LEARNED, Decoder, find_decoder
from ctkernels.tuning.hf.rotary import check_fixed_rotation, rotated, unrotated
from ctkernels.tuning.hf.states import copies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def moved(prefix: KVPrefix, model: PreTrainedModel, first_position: int) -> KVPrefix:
    """A copy for rows that begin at another position, every key moved as far as they are; `prefix` if they are not.

    Attention under rotary embedding depends on differences of positions alone, so that rows read the same.

    Raises:
        ValueError: a prefix for another model; a model whose keys cannot be moved (learned positions, ALiBi, a rotation
            that depends on the sequence's length).
    """
    decoder = find_decoder(model)
    check_fit(prefix, decoder)
    steps = first_position - prefix.first_position
    if steps == 0:
        return prefix
    keys = moved_keys(decoder, list(prefix.keys), steps)
    values = [v.detach().clone() for v in prefix.values]
    about = (prefix.segments, first_position, prefix.metadata, copies(prefix.states), prefix.context)
    return KVPrefix(keys, values, *about)


def check_movable(decoder: Decoder) -> None:
    """Raises ValueError, as `moved`, for a model whose keys cannot be moved."""
    name = type(decoder.model).__name__
    if decoder.family.positions == LEARNED:
        raise ValueError(f"{name} adds learned positions to its input, so the keys of a prefix cannot be moved")
    if decoder.family.positions == ALIBI:
        raise ValueError(f"{name} counts distances along the keys: rows begin right behind those of the prefix")
    check_fixed_rotation(decoder, "another first position")


def moved_keys(decoder: Decoder, keys: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Keys `[Hk, P, D]` of every layer, moved by `steps` positions. Raises ValueError as `moved`."""
    check_movable(decoder)
    here = torch.zeros(keys[0].shape[1], dtype=torch.int64)
    return [
        rotated(decoder, layer, unrotated(decoder, layer, key.detach(), here), here + steps)
        for layer, key in enumerate(keys)
    ]


def concatenate(
    prefixes: Sequence[KVPrefix],
    model: PreTrainedModel,
    positions: Literal["consecutive", "shared"] = "consecutive",
) -> KVPrefix:
    """Several prefixes of one model as one, whose rows read all of them.

    The parts have not read one another: this is not what encoding the concatenated demonstrations gives, but what
    encoding each on its own gives, and trained parts stay what they were trained to be.

    Args:
        prefixes: at least one; the order matters for "consecutive" alone.
        positions: "consecutive" moves the keys of each part behind the one before, as if its context had been encoded
            there (rotary embedding and ALiBi; not possible with learned positions). "shared" leaves all keys where
            they are, so that the parts lie side by side and every one of them stays as near to the rows as it was;
            rows begin behind the longest (rotary and learned positions; not possible with ALiBi). A model with a
            sliding window counts keys, under both.

    Returns:
        A prefix of the parts' keys and values in order. Its demonstrations are those of the parts; what lies between
        the demonstrations of two parts (BOS, learned tokens) counts to the later one.

    Raises:
        ValueError: no prefixes, one for another model, positions that the model cannot have, or more of them than the
            model has.
    """
    if not prefixes:
        raise ValueError("prefixes must hold at least one KVPrefix, got none")
    if positions not in ("consecutive", "shared"):
        raise ValueError(f"positions must be 'consecutive' or 'shared', got {positions!r}")
    decoder = find_decoder(model)
    name, scheme = type(decoder.model).__name__, decoder.family.positions
    for prefix in prefixes:
        check_fit(prefix, decoder)
    if decoder.keepers and len(prefixes) > 1:
        kinds = ", ".join(dict.fromkeys(type(keeper).__name__ for keeper in decoder.keepers))
        raise ValueError(
            f"{name} has layers that keep a state ({kinds}): those of several contexts are not that of all of them"
        )
    if positions == "shared" and scheme == ALIBI and len(prefixes) > 1:
        raise ValueError(f"{name} counts distances along the keys; its prefixes cannot share positions")
    if positions == "consecutive" and scheme == LEARNED and len(prefixes) > 1:
        raise ValueError(f"{name} adds learned positions to its input, so keys cannot be moved; use positions='shared'")
    if positions == "shared":
        parts, first_position = list(prefixes), max(prefix.first_position for prefix in prefixes)
    else:
        parts, first_position = [], 0
        for prefix in prefixes:
            parts.append(prefix if scheme == ALIBI else moved(prefix, model, first_position + prefix.first_position))
            first_position += prefix.first_position
    check_context_length(model, first_position)
    keys, values = (
        [torch.cat([layer.detach() for layer in layers], dim=1) for layers in zip(*kinds, strict=True)]
        for kinds in ([part.keys for part in parts], [part.values for part in parts])
    )
    about = (_joined_segments(parts), first_position, _joined_metadata(prefixes, positions), copies(parts[0].states))
    contexts = [part.context for part in parts]
    context = None if None in contexts else [token for tokens in contexts for token in tokens]
    return KVPrefix(keys, values, *about, context)


def _joined_segments(parts: Sequence[KVPrefix]) -> torch.Tensor:
    """Offsets of all demonstrations; a part without any has none to add."""
    offsets: list[int] = []
    length = 0
    for part in parts:
        if part.num_demonstrations:
            own = [length + offset for offset in part.segments.tolist()]
            offsets += own[1:] if offsets else own
        length += part.length
    return torch.tensor(offsets or [length])


def _joined_metadata(prefixes: Sequence[KVPrefix], positions: str) -> PrefixMetadata:
    """Of the first, with what the parts were; a text format only if they agree on it."""
    parts = [{"method": prefix.metadata.method, "length": prefix.length} for prefix in prefixes]
    settings: dict[str, Any] = {"positions": positions, "parts": parts}
    formats = [prefix.metadata.settings.get("text_format") for prefix in prefixes]
    if formats[0] is not None and all(entry == formats[0] for entry in formats):
        settings["text_format"] = formats[0]
    return replace(prefixes[0].metadata, method="concatenated", settings=settings)
