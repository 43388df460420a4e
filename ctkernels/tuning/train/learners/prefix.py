"""Training a KV prefix: rows read it in every layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ctkernels import ContextMask
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.forward import row_losses
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.objectives import Forward
from ctkernels.tuning.train.learners.base import Learner
from ctkernels.tuning.train.masks import Dropout, LeaveOneOut, Rows, context_mask
from ctkernels.tuning.train.reparametrise import LowRankPrefix, NetworkOptions, NetworkPrefix, TrainedPrefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PrefixOptions(NetworkOptions, Dropout):
    """What of a prefix is trained, and how.

    Args:
        trained: what of the prefix is trained: "both", "keys" or "values".
        top_layers: train the prefix of the last so many layers alone; None trains all.
        frozen_tokens: the first so many prefix tokens stay as they were (an attention sink).
        pull: weight of the L2 pull towards the start: pull / 2 * sum of (weight * squared distance).
        fisher: weigh the pull by the diagonal of the Fisher information at the start, scaled to mean 1; without `rank`
            and `mlp_width`.
        rank: train an update of the prefix of this rank in every layer instead of the prefix itself; None is full rank.
        train_states: train what layers begin with that keep a state, too (hybrid models); without `rank` and
            `mlp_width`.
        ema: decay in [0, 1) of a moving average of the prefix over optimiser steps, which is the result; 0 takes the
            prefix of the last step.
    """

    trained: Literal["both", "keys", "values"] = "both"
    top_layers: int | None = None
    frozen_tokens: int = 0
    pull: float = 0.0
    fisher: bool = False
    rank: int | None = None
    train_states: bool = True
    ema: float = 0.0

    def check(self) -> None:
        self.at_least(1, "top_layers", "rank", or_none=True)
        self.at_least(0, "frozen_tokens")
        self.require(0 <= self.pull < float("inf"), "pull", "at least 0")
        self.require(0 <= self.ema < 1, "ema", "in [0, 1)")
        if self.rank is not None and self.mlp_width is not None:
            raise ValueError("rank and mlp_width exclude each other: both write the prefix; set one of them to None")
        if self.fisher and not self.pull:
            raise ValueError("fisher weighs the pull towards the start, which is 0; set pull, too")
        if self.fisher and (self.rank is not None or self.mlp_width is not None):
            raise ValueError("fisher needs the prefix itself to be trained; set rank and mlp_width to None")


class PrefixLearner(Learner):
    """Trains `prefix` in place, or, with a `rank` or a network, what is added to it; `result` has the outcome."""

    def __init__(self, model: PreTrainedModel, prefix: KVPrefix, rows: Sequence[Row], settings: PrefixOptions) -> None:
        self.model, self.prefix, self.settings, self._rows = model, prefix, settings, rows
        layers = len(prefix.keys)
        self.check(model, settings, prefix.length)
        first = layers - (settings.top_layers or layers)
        trained = {
            (kind, layer): kind in _KINDS[settings.trained] and layer >= first
            for kind in ("keys", "values")
            for layer in range(layers)
        }
        self.module: KVPrefix | TrainedPrefix = prefix
        if settings.rank is not None:
            self.module = LowRankPrefix(prefix, trained, settings.rank, settings.frozen_tokens, settings.seed)
        elif settings.mlp_width is not None:
            self.module = NetworkPrefix(prefix, trained, settings.mlp_width, settings.frozen_tokens, settings.seed)
        else:
            for (kind, layer), flag in trained.items():
                getattr(prefix, kind)[layer].requires_grad_(flag)
            for state in prefix.states.values():
                state.requires_grad_(settings.train_states)
        self._trained = [key for key, flag in trained.items() if flag]
        self._start = [x.detach().clone() for x in self._tensors()] if settings.pull else []
        self._weights: list[Tensor | None] = [None] * len(self._start)
        # of the steps so far, n of them: sum of (1 - ema) ema^(n - i) x_i, and of the weights alone, 1 - ema^n
        self._average = [torch.zeros_like(x, requires_grad=False) for x in self._tensors()] if settings.ema else []
        self._share = torch.zeros((), dtype=torch.float64, device=prefix.keys[0].device)

    @staticmethod
    def check(model: PreTrainedModel, settings: PrefixOptions, length: int | None = None) -> None:
        """Refuse settings that the model, or a prefix of `length` tokens, cannot have. Raises ValueError."""
        decoder = find_decoder(model)
        layers = len(decoder.layers)
        if decoder.keepers and isinstance(settings, LeaveOneOut) and settings.leave_one_out != "none":
            kinds = ", ".join(dict.fromkeys(type(keeper).__name__ for keeper in decoder.keepers))
            raise ValueError(
                f"leave_one_out={settings.leave_one_out!r} hides a demonstration from attention alone, but "
                f"{type(decoder.model).__name__} has layers whose state contains it ({kinds}); set "
                'leave_one_out="none"'
            )
        if (settings.top_layers or 0) > layers:
            raise ValueError(f"top_layers must be at most the model's {layers} layers, got {settings.top_layers}")
        if length is not None and settings.frozen_tokens >= max(length, 1):
            raise ValueError(
                f"frozen_tokens must be less than the prefix's {length} tokens, got {settings.frozen_tokens}"
            )

    def rows(self, epoch: int) -> Sequence[Row]:
        return self._rows

    @contextmanager
    def attached(self, backend: str | None) -> Iterator[None]:
        with Attachment(self.module, self.model, backend=backend) as self._attachment:
            yield

    def forward(self, batch: Batch, seed: int | Tensor) -> Forward:
        self._attachment.mask = self.mask(batch, seed)
        return Forward(self.model, self._attachment, batch)

    def mask(self, batch: Batch | Rows, seed: int | Tensor) -> ContextMask:
        """What of the prefix rows see."""
        return context_mask(self.settings, self.prefix.segments, batch, seed, self.prefix.length)

    def identity(self) -> object:
        return self.prefix.segments.tolist(), self.prefix.first_position

    def before_training(self, rows: Iterable[Batch]) -> None:
        """Fisher weights, where asked for: mean over rows of the squared gradient of the answer's loss, all of the
        prefix visible but what leave-one-out hides; scaled to mean 1."""
        if not (self.settings.pull and self.settings.fisher):
            return
        still = replace(self.settings, drop_p=0.0)
        squares = [torch.zeros_like(x) for x in self._start]
        for batch in rows:
            self._attachment.mask = context_mask(still, self.prefix.segments, batch, 0, self.prefix.length)
            loss = row_losses(self.model, self._attachment, batch).sum()
            for total, gradient in zip(squares, torch.autograd.grad(loss, self._tensors()), strict=True):
                total += gradient.square()
        entries = sum(x.numel() for x in squares)
        mean = sum(x.sum() for x in squares) / entries
        self._weights = [x / mean.clamp(min=torch.finfo(x.dtype).tiny) for x in squares]

    def before_step(self) -> None:
        """AdamW without decay leaves an entry whose gradient was always zero exactly where it is."""
        if self.settings.frozen_tokens and self.module is self.prefix:
            for tensor in self._layers():
                tensor.grad[:, : self.settings.frozen_tokens].zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        for average, now in zip(self._average, self._tensors() if self._average else (), strict=True):
            average.lerp_(now, 1 - self.settings.ema)
        self._share.lerp_(torch.ones_like(self._share), 1 - self.settings.ema)

    def state(self) -> dict[str, Tensor]:
        if not self._average:
            return {}
        return {"average.share": self._share, **{f"average.{i}": x for i, x in enumerate(self._average)}}

    def penalty(self) -> Tensor | None:
        if not self.settings.pull:
            return None
        total = torch.zeros((), dtype=self._start[0].dtype, device=self._start[0].device)
        for now, start, weight in zip(self._tensors(), self._start, self._weights, strict=True):
            square = (now - start).square()
            total = total + (square if weight is None else weight * square).sum()
        return 0.5 * self.settings.pull * total

    def result(self) -> KVPrefix:
        """The trained prefix, or its average over the steps."""
        return self.current().requires_grad_(True)

    def current(self) -> KVPrefix:
        """What the result would be if training ended now; training may go on."""
        prefix = self.module if isinstance(self.module, KVPrefix) else self.module.materialised()
        first = self.settings.frozen_tokens  # which an average would round
        if self._average and self._share:
            prefix = copy.deepcopy(prefix)
            layers = len(self._trained)
            with torch.no_grad():
                for (kind, layer), average in zip(self._trained, self._average[:layers], strict=True):
                    getattr(prefix, kind)[layer][:, first:] = average[:, first:] / self._share.to(average)
                if self._average[layers:]:  # all states are trained, or none
                    for state, average in zip(prefix.states.values(), self._average[layers:], strict=True):
                        state.copy_(average / self._share.to(average))
        return prefix

    def _tensors(self) -> list[Tensor]:
        """All that is trained of the prefix as it is now."""
        states = self.prefix.states.values()
        return [*self._layers(), *(x for x in states if x.requires_grad)]

    def _layers(self) -> list[Tensor]:
        """The trained keys and values `[Hk, P, D]` as they are now."""
        both = {"keys": list(self.module.keys), "values": list(self.module.values)}
        return [both[kind][layer] for kind, layer in self._trained]


_KINDS = {"both": ("keys", "values"), "keys": ("keys",), "values": ("values",)}
