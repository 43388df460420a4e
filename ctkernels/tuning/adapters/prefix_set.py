"""PrefixSet: several prefixes of one model, read by different rows of one batch.

tasks = PrefixSet([routing, sentiment])
with tasks.attach(model, torch.tensor([0, 1, 1])):     # row 0 reads routing, rows 1 and 2 sentiment
    model.generate(input_ids, attention_mask=mask)     # left-padded, as ever
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ctkernels import ContextMask
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.models import other_architecture
from ctkernels.tuning.hf.protocols import PrefixLike, check_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixSet:
    """G prefixes side by side, the shorter ones padded.

    Args:
        prefixes: at least one, all of one model; lengths and first positions may differ.
        trainable: keys, values and states are put together anew by every forward pass, and their gradients reach the
            prefixes. Otherwise they are copies of what the prefixes are now, which take no gradient.

    Attributes:
        prefixes, trainable: as given.  lengths, first_positions: int64 `[G]`.

    Raises:
        ValueError: none, or prefixes that do not belong to one model.
        PrefixFileError: as `KVPrefix.check_file`.
    """

    def __init__(self, prefixes: Sequence[PrefixLike], trainable: bool = False) -> None:
        self.prefixes, self.trainable = tuple(prefixes), trainable
        if not self.prefixes:
            raise ValueError("prefixes must hold at least one KVPrefix, got none")
        first, layers = self.prefixes[0], list(self.prefixes[0].keys)
        for index, prefix in enumerate(self.prefixes):
            check_file(prefix)
            other = other_architecture(first.metadata, prefix.metadata)
            if other is None and (count := len(list(prefix.keys))) != len(layers):
                other = f"{count} layers instead of {len(layers)}"
            if other is not None:
                raise ValueError(
                    f"prefixes[{index}] was made for {prefix.metadata.model_class} {prefix.metadata.model_id!r}, "
                    f"prefixes[0] for {first.metadata.model_class} {first.metadata.model_id!r}: it has {other}"
                )
        device = layers[0].device
        self.lengths = torch.tensor([prefix.length for prefix in self.prefixes], device=device)
        self.first_positions = torch.tensor([prefix.first_position for prefix in self.prefixes], device=device)
        self._copies: dict[str, Any] = {}
        if not trainable:
            with torch.no_grad():
                self._copies = {"keys": self.keys, "values": self.values, "states": self.states}

    @property
    def keys(self) -> list[Tensor]:
        """Per layer `[G, Hk, P, D]`, P the longest."""
        return self._copies.get("keys") or _side_by_side([prefix.keys for prefix in self.prefixes])

    @property
    def values(self) -> list[Tensor]:
        """Per layer `[G, Hk, P, D]`."""
        return self._copies.get("values") or _side_by_side([prefix.values for prefix in self.prefixes])

    @property
    def states(self) -> Mapping[str, Tensor]:
        """`[G, ...]` each, by name."""
        if "states" in self._copies:
            return self._copies["states"]
        states = [dict(prefix.states) for prefix in self.prefixes]
        return {name: torch.stack([each[name] for each in states]) for name in states[0]}

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


def _side_by_side(prefixes: Sequence[Iterable[Tensor]]) -> list[Tensor]:
    """Layers `[Hk, P_g, D]` of each prefix, as one `[G, Hk, P, D]` per layer, zeros behind the shorter ones."""
    stacked = []
    for layers in zip(*prefixes, strict=True):
        longest = max(layer.shape[1] for layer in layers)
        stacked.append(torch.stack([pad(layer, (0, 0, 0, longest - layer.shape[1])) for layer in layers]))
    return stacked


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
