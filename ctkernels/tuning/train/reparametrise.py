"""Prefixes that are written by something smaller while they are trained: keys and values = start + update.

    LowRankPrefix   update = A B in every layer, A [P, r], B [r, Hk * D]; B starts at zero (LoRA, arXiv 2106.09685)
    NetworkPrefix   update = tanh(E W1) W2 for all layers, E [P, E]; W2 starts at zero (the two-layer network of
                    prefix tuning, arXiv 2101.00190, around the start as in residual prompt tuning, arXiv 2305.03937)

Both start exactly at the prefix they are given, and can be attached like one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.train.options import Options

Trained = Mapping[tuple[str, int], bool]  # ("keys" or "values", layer) -> whether it is trained


@dataclass(frozen=True)
class NetworkOptions(Options):
    """Whether a network writes what is trained.

    Args:
        mlp_width: width of a two-layer network that writes the prefix or prompt while training; None trains it
            directly.
    """

    mlp_width: int | None = None

    def check(self) -> None:
        self.at_least(1, "mlp_width", or_none=True)


class TrainedPrefix(nn.Module, ABC):
    """A prefix whose trained keys and values are its start plus `updates()`; attachable in place of a KVPrefix.

    prefix: the start; it takes no gradient itself.  frozen: the first so many tokens get no update.
    """

    def __init__(self, prefix: KVPrefix, trained: Trained, frozen: int) -> None:
        super().__init__()
        self._prefix = [prefix.requires_grad_(False)]  # in a list: not a submodule, so not among what is trained
        self._order = [key for key, flag in trained.items() if flag]
        self._frozen = frozen

    @property
    def prefix(self) -> KVPrefix:
        return self._prefix[0]

    @property
    def keys(self) -> list[Tensor]:
        """Per layer `[Hk, P, D]`."""
        return self._kind("keys")

    @property
    def values(self) -> list[Tensor]:
        """Per layer `[Hk, P, D]`."""
        return self._kind("values")

    @property
    def states(self) -> Mapping[str, Tensor]:
        """Those of the start, which are not trained."""
        return dict(self.prefix.states)

    @property
    def length(self) -> int:
        return self.prefix.length

    @property
    def segments(self) -> Tensor:
        return self.prefix.segments

    @property
    def first_position(self) -> int:
        return self.prefix.first_position

    @property
    def metadata(self) -> PrefixMetadata:
        return self.prefix.metadata

    @abstractmethod
    def updates(self, kind: str) -> Iterator[tuple[int, Tensor]]:
        """What is added to the keys or values of each trained layer: the layer and `[P, Hk * D]`."""

    @torch.no_grad()
    def materialised(self) -> KVPrefix:
        """A KVPrefix with these keys and values."""
        described = (self.segments, self.first_position, self.metadata, self.states, self.prefix.context)
        return KVPrefix(self.keys, self.values, *described)

    def _kind(self, kind: str) -> list[Tensor]:
        tensors = list(getattr(self.prefix, kind))
        heads, length, dimension = tensors[0].shape
        trained = (torch.arange(length, device=tensors[0].device) >= self._frozen)[:, None]
        for layer, update in self.updates(kind):
            tensors[layer] = tensors[layer] + (update * trained).view(length, heads, dimension).transpose(0, 1)
        return tensors

    def _layers(self, kind: str) -> Iterator[tuple[int, int]]:
        """Each trained layer of a kind, and its place among all that is trained."""
        return ((layer, at) for at, (name, layer) in enumerate(self._order) if name == kind)


class LowRankPrefix(TrainedPrefix):
    """A low-rank update of every trained layer."""

    def __init__(self, prefix: KVPrefix, trained: Trained, rank: int, frozen: int, seed: int) -> None:
        super().__init__(prefix, trained, frozen)
        heads, length, dimension = prefix.keys[0].shape
        generator = torch.Generator().manual_seed(seed)
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for kind, layer in self._order:
            like = getattr(prefix, kind)[layer]
            start = torch.randn(length, rank, generator=generator, dtype=like.dtype) * rank**-0.5
            self.left[f"{kind}_{layer}"] = nn.Parameter(start.to(like.device))
            self.right[f"{kind}_{layer}"] = nn.Parameter(like.new_zeros(rank, heads * dimension))

    def updates(self, kind: str) -> Iterator[tuple[int, Tensor]]:
        return ((i, self.left[f"{kind}_{i}"] @ self.right[f"{kind}_{i}"]) for i, _ in self._layers(kind))


class NetworkPrefix(TrainedPrefix):
    """An update that one network writes for all trained layers."""

    def __init__(self, prefix: KVPrefix, trained: Trained, mlp_width: int, frozen: int, seed: int) -> None:
        super().__init__(prefix, trained, frozen)
        like = prefix.keys[0]
        heads, length, dimension = like.shape
        self._width = heads * dimension
        self.network = Network(length, mlp_width, len(self._order) * self._width, seed).to(like.device, like.dtype)

    def updates(self, kind: str) -> Iterator[tuple[int, Tensor]]:
        hidden, outputs = self.network.hidden(), self.network.second.split(self._width, dim=1)
        return ((layer, hidden @ outputs[at]) for layer, at in self._layers(kind))


class Network(nn.Module):
    """Two layers over a learned embedding of each token: tanh(E W1 + b) W2, where W2 starts at zero."""

    def __init__(self, length: int, mlp_width: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(length, mlp_width, generator=generator))
        self.first = nn.Parameter(torch.randn(mlp_width, mlp_width, generator=generator) * mlp_width**-0.5)
        self.bias = nn.Parameter(torch.zeros(mlp_width))
        self.second = nn.Parameter(torch.zeros(mlp_width, outputs))

    def hidden(self) -> Tensor:
        """`[P, mlp_width]`"""
        return torch.tanh(self.embedding @ self.first + self.bias)

    def forward(self) -> Tensor:
        """`[P, outputs]`"""
        return self.hidden() @ self.second
