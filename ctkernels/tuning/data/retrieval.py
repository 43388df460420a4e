"""Demonstrations shown as text before an input: which ones, and their tokens."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import PairEncoder, TextFormat, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Demonstrate = Literal["similar", "embedding", "random", "fixed"]
Embed = Callable[[Sequence[Tokens]], Tensor]  # token lists -> one vector each, [n, E]
SATURATION, LENGTH = 1.5, 0.75  # k1 and b of BM25


class InWordsEncoder(PairEncoder):
    """Encodes an input after `shots` demonstrations of a pool, as text: `x0 _ y0 _ x1 _ y1 _ x _`.

    demonstrate: "similar" shows the pairs whose inputs have the highest BM25 score for the input (Robertson and
    Zaragoza, 2009; over tokens), the best one last; "embedding" those whose inputs have the nearest embeddings (by
    cosine). "random" draws the pairs of each input from `seed` and the input; "fixed" shows the same pairs before every
    input, drawn once from `seed`. A pair is never shown before itself.
    embed: gives the embeddings of inputs, such as `hf.embeddings.mean_states` of a model; only "embedding" needs it.

    Raises:
        ValueError: "embedding" without `embed`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_format: TextFormat | None,
        pool: Sequence[Demonstration],
        shots: int,
        demonstrate: Demonstrate,
        seed: int,
        embed: Embed | None = None,
    ) -> None:
        super().__init__(tokenizer, text_format)
        self.pool, self.shots = list(pool), shots
        self.demonstrate, self.seed = demonstrate, seed
        self._vectors: Tensor | None = None
        self._embed = embed
        if demonstrate == "embedding" and embed is None:
            raise ValueError('demonstrate="embedding" needs the model whose embeddings are compared, got none')
        self._fixed: list[Demonstration] | None = None
        if demonstrate == "fixed":
            order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
            self._fixed = [self.pool[i] for i in order.tolist()]
        self._counts = [Counter(self.encode(d.input)) for d in self.pool]
        self._frequency = Counter(token for counts in self._counts for token in counts)
        self._mean_length = sum(c.total() for c in self._counts) / max(len(self.pool), 1)

    def prompt(self, demonstration: Demonstration, longest_answer: int) -> tuple[int, ...]:
        shown: tuple[int, ...] = ()
        for pair in self.choose(demonstration):
            answer = self.answer(pair, pair.output)
            shown += (*super().prompt(pair, len(answer)), *answer, self.delimiter)
        return shown + super().prompt(demonstration, longest_answer)

    def choose(self, demonstration: Demonstration) -> list[Demonstration]:
        """The pairs to show before an input, in the order in which they are shown."""
        if self._fixed is not None:
            return [pair for pair in self._fixed if pair != demonstration][: self.shots]
        others = [i for i, pair in enumerate(self.pool) if pair != demonstration]
        if self.demonstrate == "random":
            own = hashlib.sha256(f"{self.seed}\0{demonstration.input}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(own[:8], "big"))
            drawn = torch.randperm(len(others), generator=generator)[: self.shots].tolist()
            return [self.pool[others[i]] for i in drawn]
        scores = self._scores(self.encode(demonstration.input), others)
        best = sorted(others, key=lambda i: (-scores[i], i))[: self.shots]
        return [self.pool[i] for i in reversed(best)]

    def _scores(self, query: Tokens, others: Sequence[int]) -> dict[int, float]:
        """How similar the inputs of the pool are to a query: cosine of embeddings, or BM25."""
        if self._embed is None or self.demonstrate != "embedding":
            return {i: self._score(set(query), i) for i in others}
        if self._vectors is None:
            self._vectors = normalize(self._embed([self.encode(pair.input) for pair in self.pool]).double(), dim=1)
        similarity = self._vectors @ normalize(self._embed([query]).double(), dim=1)[0]
        return {i: similarity[i].item() for i in others}

    def _score(self, query: set[int], index: int) -> float:
        """BM25: sum over shared tokens of idf * tf (k1 + 1) / (tf + k1 (1 - b + b * length / mean length))."""
        counts = self._counts[index]
        norm = SATURATION * (1 - LENGTH + LENGTH * counts.total() / self._mean_length)
        total = 0.0
        for token in sorted(query & counts.keys()):  # sorted: every process adds in the same order
            containing = self._frequency[token]
            idf = math.log(1 + (len(self.pool) - containing + 0.5) / (containing + 0.5))
            total += idf * counts[token] * (SATURATION + 1) / (counts[token] + norm)
        return total
