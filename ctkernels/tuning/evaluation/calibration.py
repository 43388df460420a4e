"""Calibrated choice: every option has an offset, which is subtracted from its loss before the lowest one is chosen.

    none           no offset
    batch          mean loss of the option over the scored inputs, without their answers (arXiv 2309.17249)
    content-free   mean loss over inputs without content (after arXiv 2102.09690, where probabilities are averaged)
    dev            b of the largest posterior under validation items: p(option) ~ exp(b - loss), and a normal prior
                   of deviation 1 nat around the option's mean loss over their inputs

The first two assume about as many items of each class; where one class has most of them they hurt, and `dev` sees it.
Offsets belong to one set of options, which all items have to share, and to one form of the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ctkernels.tuning.data.demonstrations import ContentFree, DataError, Demonstration
from ctkernels.tuning.data.formats import Score
from ctkernels.tuning.data.metrics import choice_losses

Calibrate = Literal["none", "batch", "dev", "content-free"]
Losses = Mapping[str, float]  # of each option, in nats
NO_CONTENT = ("N/A", "", "[MASK]")  # as in arXiv 2102.09690
BINS = 10  # of the expected calibration error


@dataclass(frozen=True)
class Offsets:
    """What is subtracted from the loss of each option.

    calibrate: how they were found.  score: the form of the losses that they belong to.  values: in nats, by option.
    """

    calibrate: Calibrate
    score: Score
    values: dict[str, float]

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Offsets | None:
        """Those in the description of a file, or None.

        Raises:
            ValueError: values that are not finite.
        """
        if "offsets" not in description:
            return None
        offsets = cls(**description["offsets"])
        if not all(map(math.isfinite, offsets.values.values())):
            raise ValueError(f"its offsets of the options must be finite, got {offsets.values}")
        return offsets

    def fits(self, items: Sequence[Demonstration], score: Score) -> bool:
        """Whether they are of the options of all items, and of that form of the score."""
        return score == self.score and all(set(item.options or ()) == set(self.values) for item in items)


def share_options(items: Sequence[Demonstration]) -> bool:
    """Whether all items have options, and the same ones."""
    sets = {frozenset(item.options or ()) for item in items}
    return len(sets) == 1 and frozenset() not in sets


def require_shared_options(calibrate: Calibrate, items: Sequence[Demonstration]) -> None:
    """Refuse items that offsets of options say nothing about. Raises DataError."""
    first = set(items[0].options or ())
    for index, item in enumerate(items):
        if not item.options or set(item.options) != first:
            raise DataError(
                f"{item.source or f'item {index}'}: calibrate={calibrate!r} needs items that share their options, got "
                f"{list(item.options or ())} beside {sorted(first)}; take calibrate='none'"
            )


def content_free(options: Sequence[str]) -> list[Demonstration]:
    """Items without content that have these options."""
    return [ContentFree(text, options[0], tuple(options), source=f"input {text!r}") for text in NO_CONTENT]


def mean_offsets(losses: Sequence[Losses]) -> dict[str, float]:
    """The mean loss of each option over items."""
    return {option: sum(of_item[option] for of_item in losses) / len(losses) for option in losses[0]}


def fitted_offsets(losses: Sequence[Losses], items: Sequence[Demonstration]) -> dict[str, float]:
    """The offsets b that minimise, in fp64,

    sum over items of -log(share of the right options in exp(b - loss)) + sum over options of (b - mean loss)^2 / 2
    """
    options = list(losses[0])
    table = torch.tensor([[of_item[option] for option in options] for of_item in losses], dtype=torch.float64)
    right = torch.tensor([[option in item.right for option in options] for item in items])
    center = table.mean(dim=0)
    b = center.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [b], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = choice_losses(b - table, right).sum() + 0.5 * (b - center).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return dict(zip(options, b.tolist(), strict=True))


@dataclass(frozen=True)
class Reliability:
    """How much the probabilities of options, exp(-loss) normalised over them, are worth.

    nll: mean over items of -log of the right options' probability, in nats.
    ece: expected calibration error: mean over items, in ten bins of equal width by the probability of the choice, of
        |share of right choices - mean probability|.
    """

    nll: float
    ece: float


def reliability(losses: Sequence[Losses], items: Sequence[Demonstration]) -> Reliability:
    """Of the choices among options that may differ by item."""
    nll, found = 0.0, []  # (probability of the choice, whether it is right)
    for of_item, item in zip(losses, items, strict=True):
        shares = probabilities(of_item)
        scores = -torch.tensor(list(of_item.values()), dtype=torch.float64)
        right = torch.tensor([option in item.right for option in of_item])
        nll += float(choice_losses(scores[None], right[None]))
        choice = choose(of_item)
        found.append((shares[choice], choice in item.right))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for share, hit in found:
        bins.setdefault(min(int(share * BINS), BINS - 1), []).append((share, hit))
    error = sum(abs(sum(hit for _, hit in inside) - sum(share for share, _ in inside)) for inside in bins.values())
    return Reliability(nll / len(items), error / len(items))


def probabilities(losses: Losses) -> dict[str, float]:
    """exp(-loss) of each option, normalised over them."""
    shares = (-torch.tensor(list(losses.values()), dtype=torch.float64)).softmax(dim=0)
    return dict(zip(losses, shares.tolist(), strict=True))


def choose(losses: Losses) -> str:
    """The option with the lowest loss; of equal ones the first."""
    return min(losses, key=losses.__getitem__)


def shifted(losses: Losses, offsets: Mapping[str, float]) -> dict[str, float]:
    """The losses minus the offsets."""
    return {option: loss - offsets[option] for option, loss in losses.items()}
