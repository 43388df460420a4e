"""Batch: rows of different prefixes and lengths that a model continues together.

    batch = Batch(model, size=16)
    logits = batch.join([prompt, other], [routing, sentiment])    # two rows; logits of their next tokens
    logits = batch.step([5, 7])                                   # one token more of every row
    batch.leave(0)                                                # the last row is now row 0

The result of a row does not depend on the others: each has its own positions and length, and reads its own prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctkernels.serving.server.slots import Slots
from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ctkernels.tuning.hf.protocols import PrefixLike

SPARE_TOKENS = 4096  # up to so many, padding included, prefixes stay side by side that no row reads any more


class Batch:
    """Up to `size` rows of one model, which belongs to the batch until `close`.

    Args:
        model: in eval mode, of a class that `proof.require_servable` admits.
        size: most rows, and most prefixes that are kept side by side.
    """

    def __init__(self, model: PreTrainedModel, size: int, backend: str | None = None) -> None:
        self.size = size
        self._decoder, self._backend, self._slots = find_decoder(model), backend, Slots(size)
        self._read: list[PrefixLike] = []  # by each row
        self._kept: list[PrefixLike] = []  # side by side; the first ones were in use most recently
        self._attachment: Attachment | None = None

    def __len__(self) -> int:
        return len(self._read)

    @torch.no_grad()
    def join(self, prompts: Sequence[Sequence[int]], prefixes: Sequence[PrefixLike]) -> Tensor:
        """Add rows of at least one token each: logits `[n, V]` of their next tokens. If it raises, no row was added."""
        lengths = [len(prompt) for prompt in prompts]
        attachment = self._attach(prefixes)
        attachment.prefix_index = torch.tensor([self._kept.index(prefix) for prefix in prefixes])
        self._slots.join(lengths)
        rows = [torch.tensor(prompt, device=self._decoder.device) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        last = torch.tensor(lengths, device=ids.device) - 1
        wanted, where = last.unique(return_inverse=True)
        logits = self._run(attachment, ids, torch.arange(ids.shape[1], device=ids.device)[None], last + 1, wanted)
        self._slots.lengths += lengths
        self._read += prefixes
        return logits[torch.arange(len(rows), device=ids.device), where]

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """One token more of every row, in their order: logits `[B, V]` of the next ones."""
        attachment = self._attach(())
        attachment.prefix_index = torch.tensor([self._kept.index(prefix) for prefix in self._read])
        self._slots.step()
        ids = torch.tensor(tokens, device=self._decoder.device)[:, None]
        past = torch.tensor(self._slots.lengths, device=ids.device)
        logits = self._run(
            attachment, ids, past[:, None], past + 1, torch.zeros(1, dtype=past.dtype, device=past.device)
        )
        self._slots.lengths = [length + 1 for length in self._slots.lengths]
        return logits[:, 0]

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        self._slots.leave(row)
        last = self._read.pop()
        if row != len(self._read):
            self._read[row] = last

    def close(self) -> None:
        """Remove all rows and leave the model as it was."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.detach()
        self._slots, self._read, self._kept = Slots(self.size), [], []

    def _attach(self, new: Sequence[PrefixLike]) -> Attachment:
        """The attachment of prefixes that include those of all rows and the `new` ones."""
        missing = [prefix for prefix in dict.fromkeys(new) if prefix not in self._kept]
        if self._attachment is None or missing:
            kept = list(dict.fromkeys((*self._read, *new)))
            longest = max(prefix.length for prefix in kept)
            for spare in [prefix for prefix in self._kept if prefix not in kept]:
                longest = max(longest, spare.length)
                if len(kept) == self.size or longest * (len(kept) + 1) > SPARE_TOKENS:
                    break
                kept.append(spare)
            attachment = PrefixSet(kept).attach(self._decoder.model, [0], backend=self._backend)
            if self._attachment is not None:
                self._attachment.detach()
            self._attachment, self._kept = attachment.enable(), kept
            attachment.adopt(self._slots)
        return self._attachment

    def _run(self, attachment: Attachment, ids: Tensor, positions: Tensor, lengths: Tensor, wanted: Tensor) -> Tensor:
        """Logits `[n, len(wanted), V]` at the positions `wanted` of ids `[n, S]`; lengths: valid keys of each row."""
        return self._decoder.model(
            input_ids=ids,
            position_ids=positions.expand_as(ids),
            attention_mask=lengths[:, None, None, None],
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=wanted,
        ).logits
