"""SoftPrompt: trainable embeddings in front of a row, and the KV prefix they amount to once they are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.hf.encode import encode_embeddings
from ctkernels.tuning.hf.models import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SoftPrompt(nn.Module):
    """Embeddings of C soft prompt tokens.

    Args:
        embeddings: `[C, E]`, in the space of the model's input embeddings; fp32, or fp64 for an fp64 model.
        segments: int64 `[K+1]`, offsets of the demonstrations in the prompt; `[c]` if there are none.

    Raises:
        ValueError: embeddings of another shape.
    """

    def __init__(self, embeddings: Tensor, segments: Tensor) -> None:
        super().__init__()
        if embeddings.dim() != 2 or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be floating [C, E], got {embeddings.dtype} {tuple(embeddings.shape)}")
        self.embeddings = nn.Parameter(embeddings.detach().clone())
        self.segments: Tensor
        self.register_buffer("segments", torch.as_tensor(segments).to(embeddings.device, torch.int64))

    @property
    def length(self) -> int:
        """C, the number of soft prompt tokens."""
        return self.embeddings.shape[0]

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, model: PreTrainedModel, input_ids: Tensor, segments: Tensor) -> SoftPrompt:
        """The embeddings of tokens, int `[C]`."""
        embedded = model.get_input_embeddings()(torch.as_tensor(input_ids).to(find_decoder(model).device))
        return cls(embedded.to(find_decoder(model).prefix_dtype), segments)

    @torch.no_grad()
    def to_prefix(self, model: PreTrainedModel, metadata: PrefixMetadata) -> KVPrefix:
        """The keys and values of the prompt in every layer: a row behind this prefix equals one behind the prompt."""
        keys, values, states = encode_embeddings(model, self.embeddings)
        return KVPrefix(keys, values, self.segments, self.length, metadata, states)
