"""The objectives in plain PyTorch: every option of every row is a run of its own, nothing is shared.

Shares no code with `ctkernels`. `Score` gives the log-likelihoods of the tokens of a continuation, `[n]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokens = Sequence[int]


@dataclass(frozen=True)
class PlainChoice:
    """The tokens before an output, the output, all options, and which are right. No options: free text."""

    before: Tokens
    output: Tokens
    options: Sequence[Tokens] = ()
    right: Sequence[int] = ()


def row_loss(
    choices: Sequence[PlainChoice],
    likelihoods: Callable[[Tokens, Tokens], Tensor],
    objective: str,
    score: str,
    mixed: float,
    factor: float,
) -> Tensor:
    """The loss of a row with the outputs of `choices`; factor: of the answers' loss."""
    answers = -torch.cat([likelihoods(c.before, c.output) for c in choices]).mean() * factor
    if objective == "answers":
        return answers
    losses = []
    for choice in choices:
        scores = []
        for option in choice.options:
            tokens = likelihoods(choice.before, option)
            scores.append({"mean": tokens.mean(), "sum": tokens.sum(), "first-token": tokens[0]}[score])
        if scores:
            shares = torch.stack(scores).softmax(0)
            losses.append(-sum(shares[i] for i in choice.right).log())
    if not losses:
        return answers
    options = torch.stack(losses).mean()
    return options if objective == "options" else (1 - mixed) * answers + mixed * options


def likelihoods_of(logits: Tensor, sequence: Tokens, count: int) -> Tensor:
    """Of the last `count` tokens of a sequence, from its logits `[S, V]`."""
    own = logits.log_softmax(-1)[len(sequence) - count - 1 : len(sequence) - 1]
    return own[range(count), list(sequence[len(sequence) - count :])]
