"""Embeddings of texts by a model itself: the mean of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mean_states(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The mean over positions of the last layer's states, `[n, E]`, of n sequences of token ids, each on its own.

    Raises:
        ValueError: a sequence without tokens.
    """
    decoder, means = find_decoder(model), []
    with torch.no_grad(), frozen(model):
        for sequence in sequences:
            if not len(sequence):
                raise ValueError("sequences must hold at least one token each, got an empty one")
            tokens = torch.tensor([list(sequence)], device=decoder.device)
            found = decoder.model(tokens, output_hidden_states=True, logits_to_keep=1, use_cache=False)
            means.append(found.hidden_states[-1][0].float().mean(dim=0))
    return torch.stack(means).cpu()
