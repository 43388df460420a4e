"""Demonstrations made worse or put into another order, for tests of how much a method depends on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ctkernels.tuning.data.demonstrations import DataError, Demonstration


def noisy(demonstrations: Sequence[Demonstration], share: float, seed: int) -> tuple[Demonstration, ...]:
    """The demonstrations, a `share` of them (rounded) with a wrong answer.

    A wrong answer is another option, drawn uniformly; without options, the output of another demonstration. The seed
    alone decides: what is wrong at one share is wrong in the same way at every larger one.

    Raises:
        ValueError: a share outside [0, 1].
        DataError: no wrong answer can be had.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"noise must be in [0, 1], got {share}")
    order = random.Random(seed).sample(range(len(demonstrations)), len(demonstrations))
    found = list(demonstrations)
    for index in order[: round(share * len(found))]:
        pair = demonstrations[index]
        others = pair.options or sorted({other.output for other in demonstrations})
        wrong = [answer for answer in others if answer not in {pair.output, *pair.references}]
        if not wrong:
            raise DataError(f"{pair.source or repr(pair.input[:30])}: there is no wrong answer to put in its place")
        found[index] = replace(pair, output=random.Random(f"{seed} {index}").choice(wrong), references=())
    return tuple(found)


def ordered(demonstrations: Sequence[Demonstration], order: int, seed: int) -> tuple[Demonstration, ...]:
    """The demonstrations in their own order (0), or in one drawn by its number and the seed."""
    if not order:
        return tuple(demonstrations)
    return tuple(random.Random(f"{seed} order {order}").sample(list(demonstrations), len(demonstrations)))
