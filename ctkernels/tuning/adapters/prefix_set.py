"""PrefixSet: several prefixes of one model, read by different rows of one batch.

tasks = PrefixSet([routing, sentiment])
with tasks.attach(model, torch.tensor([0, 1, 1])):     # row 0 reads routing, rows 1 and 2 sentiment
    model.generate(input_ids, attention_mask=mask)     # left-padded, as ever
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctkernels import ContextMask
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.models import other_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixSet:
    """G prefixes side by side, the shorter ones padded: a copy, which takes no gradient.

    Args:
        prefixes: at least one, all of one model; lengths and first positions may differ.

    Attributes:
        prefixes: as given.  keys, values: per layer `[G, Hk, P, D]`, P the longest.  states: `[G, ...]` each, by name.
        lengths, first_positions: int64 `[G]`.

    Raises:
        ValueError: none, or prefixes that do not belong to one model.
        PrefixFileError: as `KVPrefix.check_file`.
    """

    def __init__(self, prefixes: Sequence[KVPrefix]) -> None:
        self.prefixes = tuple(prefixes)
        if not self.prefixes:
            raise ValueError("prefixes must hold at least one KVPrefix, got none")
        first = self.prefixes[0]
        for index, prefix in enumerate(self.prefixes):
            prefix.check_file()
            other = other_architecture(first.metadata, prefix.metadata)
            if other is None and len(prefix.keys) != len(first.keys):
                other = f"{len(prefix.keys)} layers instead of {len(first.keys)}"
            if other is not None:
                raise ValueError(
                    f"prefixes[{index}] was made for {prefix.metadata.model_class} {prefix.metadata.model_id!r}, "
                    f"prefixes[0] for {first.metadata.model_class} {first.metadata.model_id!r}: it has {other}"
                )
        device = first.keys[0].device
        self.lengths = torch.tensor([prefix.length for prefix in self.prefixes], device=device)
        self.first_positions = torch.tensor([prefix.first_position for prefix in self.prefixes], device=device)
        self.keys = [_stack(layers) for layers in zip(*(prefix.keys for prefix in self.prefixes), strict=True)]
        self.values = [_stack(layers) for layers in zip(*(prefix.values for prefix in self.prefixes), strict=True)]
        self.states = {
            name: torch.stack([prefix.states[name].detach() for prefix in self.prefixes]) for name in first.states
        }

    def __len__(self) -> int:
        return len(self.prefixes)

    def attach(
        self,
        model: PreTrainedModel,
        prefix_index: Tensor | Sequence[int],
        mask: ContextMask | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> Attachment:
        """A context manager in which row b of a batch reads prefix `prefix_index[b]`.

        Args:
            prefix_index: integer `[B]`, also as a list; `attachment.prefix_index` may be set for the next batch. Where
                a forward pass has n * B rows, each row is taken to be n in place, as `generate` repeats rows for
                beams and for several sequences each.
            mask, cu_seqlens, backend: as in `KVPrefix.attach`; context positions count to the longest prefix.

        Raises:
            TypeError, ValueError: as `KVPrefix.attach`; an index out of range.
        """
        return Attachment(
            self, model, mask=mask, cu_seqlens=cu_seqlens, backend=backend, prefix_index=torch.as_tensor(prefix_index)
        )


def _stack(layers: Sequence[Tensor]) -> Tensor:
    """Tensors `[Hk, P_g, D]` as one `[G, Hk, P, D]`, zeros behind the shorter ones."""
    heads, _, dimension = layers[0].shape
    longest = max(layer.shape[1] for layer in layers)
    out = layers[0].new_zeros(len(layers), heads, longest, dimension)
    for place, layer in zip(out, layers, strict=True):
        place[:, : layer.shape[1]] = layer.detach()
    return out


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A right-padded batch, int `[B, S]` both, with its padding moved to the left, where `generate` wants it.

    Raises:
        ValueError: tokens of a row that are not one run.
    """
    present = attention_mask.bool()
    S = present.shape[1]
    lengths, position = present.sum(dim=1, keepdim=True), torch.arange(S, device=present.device)
    first = (present.long().cumsum(dim=1) == 0).sum(dim=1, keepdim=True)  # of a row's tokens
    if (present != ((first <= position) & (position < first + lengths))).any():
        raise ValueError("attention_mask must have one run of ones in each row")
    source = (position + first + lengths) % S  # the last token comes to the end
    return input_ids.gather(1, source), attention_mask.gather(1, source)
