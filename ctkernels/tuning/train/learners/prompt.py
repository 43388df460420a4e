"""Training a soft prompt: it lies in each row's own sequence, so that masks act on the row's first keys.

The mask holds for every query of the row, those of the soft prompt included: a hidden demonstration reaches neither the
row's tokens nor the later tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.objectives import Forward
from ctkernels.tuning.train.learners.base import Learner
from ctkernels.tuning.train.masks import Dropout, context_mask
from ctkernels.tuning.train.reparametrise import Network, NetworkOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptLearner(Learner):
    """Trains `prompt` in place, or, with a network, what is added to it; `result` has the outcome.

    settings: those of the mask, and of the network if they have it (`NetworkOptions`).
    radii: `[C]`, largest L2 distance of each token's embedding from its start; 0 freezes a token. None sets no bound.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: SoftPrompt,
        rows: Sequence[Row],
        settings: Dropout,
        radii: Tensor | None = None,
    ) -> None:
        self.model, self.prompt, self.settings, self._rows = model, prompt, settings, rows
        self.lead = prompt.length
        self._radii = None if radii is None else radii.to(prompt.embeddings)
        self._start = prompt.embeddings.detach().clone()
        self.module: nn.Module = prompt
        self._network: Network | None = None
        if isinstance(settings, NetworkOptions) and settings.mlp_width is not None:
            length, width = prompt.embeddings.shape
            self._network = Network(length, settings.mlp_width, width, settings.seed).to(prompt.embeddings)
            self.module = self._network

    def rows(self, epoch: int) -> Sequence[Row]:
        return self._rows

    @contextmanager
    def attached(self, backend: str | None) -> Iterator[None]:
        with Attachment(empty_prefix(self.model), self.model, backend=backend) as self._attachment:
            yield

    def forward(self, batch: Batch, seed: int | Tensor) -> Forward:
        segments, length = self.prompt.segments, self.prompt.length
        self._attachment.mask = context_mask(self.settings, segments, batch, seed, length, in_row=True)
        return Forward(self.model, self._attachment, batch, self._embeddings())

    def identity(self) -> object:
        return self.prompt.segments.tolist(), self.prompt.length

    def before_step(self) -> None:
        if self._radii is not None:
            self.prompt.embeddings.grad.masked_fill_((self._radii == 0)[:, None], 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Back onto the ball around the start, where a step left it."""
        if self._radii is None:
            return
        change = self.prompt.embeddings - self._start
        norm = change.norm(dim=1).clamp(min=torch.finfo(change.dtype).tiny)
        self.prompt.embeddings.copy_(self._start + change * (self._radii / norm).clamp(max=1)[:, None])

    @torch.no_grad()
    def result(self) -> SoftPrompt:
        """The trained prompt."""
        if self._network is not None:
            self.prompt.embeddings.copy_(self._embeddings())
        return self.prompt

    def _embeddings(self) -> Tensor:
        return self.prompt.embeddings if self._network is None else self._start + self._network()


def empty_prefix(model: PreTrainedModel) -> KVPrefix:
    """A prefix of no tokens, attached to run packed rows that bring their context along."""
    return KVPrefix.from_tokens(model, torch.empty(0, dtype=torch.long), torch.zeros(1, dtype=torch.long))
