"""What `generate()` answers behind stored prefixes, and whether an engine's tokens are as good.

Greedy decoding takes the token of the greatest logit. Two programs that add the same numbers in another order differ in
the last digits of a logit, and take different tokens where two logits are nearer than that. Hence the rule, for every
request and every token: it is the one of `generate()`; or, given all tokens before it, its logit is within `MARGIN` of
the greatest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctkernels.tuning import KVPrefix, PrefixStore

MARGIN = 2e-3  # of logits in fp32
BATCH = 16


@dataclass(frozen=True)
class Request:
    """One request. prefix: its name, or None for a plain prompt.  row: tokens behind it."""

    prefix: str | None
    row: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Verdict:
    """Of an engine's answers. equal: those of `generate()`.  ties: others by the rule above.  wrong: the rest.

    margin: the largest distance of a tie from the greatest logit.
    """

    requests: int
    equal: int
    ties: int
    wrong: list[int]
    margin: float


class Reference:
    """A model in fp32 with a store beside it."""

    def __init__(self, folder: str, store: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.store = PrefixStore(store, self.model)
        stops = self.model.generation_config.eos_token_id
        self._stops = set(stops if isinstance(stops, list) else [stops])

    def noised(self, name: str, prefix: KVPrefix, seed: int, scale: float = 0.1) -> None:
        """Store a prefix with noise of `scale` times the standard deviation of each layer; its context stays."""
        generator = torch.Generator().manual_seed(seed)

        def layers(kind: str) -> list[Tensor]:
            found = [x.detach() for x in getattr(prefix, kind)]
            return [x + scale * x.std() * torch.randn(x.shape, generator=generator) for x in found]

        about = (prefix.segments, prefix.first_position, prefix.metadata)
        self.store.put(name, KVPrefix(layers("keys"), layers("values"), *about, context=prefix.context))

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """The greedy tokens of each request, up to a stop token."""
        answers = []
        for part in _batches(requests):
            ids, mask = _left_padded([request.row for request in part])
            with self._attached(part):
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=max(request.new_tokens for request in part),
                    do_sample=False,
                    repetition_penalty=1.0,
                    pad_token_id=0,
                )
            rows = out[:, ids.shape[1] :].tolist()
            answers += [self.cut(row[: request.new_tokens]) for row, request in zip(rows, part, strict=True)]
        return answers

    def cut(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Tokens up to the first stop token, which is among them."""
        end = next((at + 1 for at, token in enumerate(tokens) if token in self._stops), len(tokens))
        return tuple(tokens[:end])

    @torch.no_grad()
    def distance(self, request: Request, answer: Sequence[int]) -> float:
        """How far a token of an answer is at most from the greatest logit, given all before it."""
        ids = torch.tensor([[*request.row, *answer]])
        with self._attached([request]):
            logits = self.model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
        return float((logits.max(dim=-1).values - logits[range(len(answer)), list(answer)]).max())

    def judge(
        self, requests: Sequence[Request], expected: Sequence[tuple[int, ...]], answers: Sequence[Sequence[int]]
    ) -> Verdict:
        """Hold an engine's answers against those of `generate`."""
        equal, ties, wrong, margin = 0, 0, [], 0.0
        for at, (request, own, answer) in enumerate(zip(requests, expected, answers, strict=True)):
            if tuple(own) == self.cut(answer):
                equal += 1
                continue
            distance = self.distance(request, answer) if len(answer) else float("inf")
            if distance <= MARGIN and (len(answer) == request.new_tokens or answer[-1] in self._stops):
                ties, margin = ties + 1, max(margin, distance)
            else:
                wrong.append(at)
        return Verdict(len(requests), equal, ties, wrong, margin)

    def _attached(self, requests: Sequence[Request]) -> contextlib.AbstractContextManager:
        names = [request.prefix for request in requests]
        return contextlib.nullcontext() if names[0] is None else self.store.attach([str(name) for name in names])


def _batches(requests: Sequence[Request]) -> list[list[Request]]:
    """Parts of at most BATCH requests, with a prefix all or none, in order."""
    parts: list[list[Request]] = []
    for request in requests:
        if parts and len(parts[-1]) < BATCH and (parts[-1][0].prefix is None) == (request.prefix is None):
            parts[-1].append(request)
        else:
            parts.append([request])
    return parts


def _left_padded(rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
