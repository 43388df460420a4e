"""How the next token of a row is chosen: greedily, or drawn with the row's own random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most probable token.  top_p: draw among the fewest tokens with so much probability.  seed: the
    same one gives the same tokens, those of `generate(do_sample=True)` behind `torch.manual_seed(seed)`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


class Sampler:
    """The choice of one row's tokens."""

    def __init__(self, how: Sampling) -> None:
        self._greedy = how.temperature == 0
        self._random = torch.Generator()
        if how.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(how.seed)
        self._warpers = LogitsProcessorList()
        if not self._greedy and how.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(how.temperature)))
        if how.top_p < 1:
            self._warpers.append(TopPLogitsWarper(how.top_p))

    def __call__(self, logits: Tensor) -> int:
        """The next token after logits `[V]`. They are those of one step; the tokens before do not matter."""
        if self._greedy:
            return int(logits.argmax())
        scores = self._warpers(torch.empty(1, 0, dtype=torch.int64), logits[None].float().cpu())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random))
