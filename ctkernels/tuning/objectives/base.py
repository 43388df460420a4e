"""What an objective is: a name, and a function from a batch of rows to the loss of each of them.

Forward     a batch of training rows with all that is trained attached to the model, ready to run (`hf/forward.py`)
Objective   a row of the objective table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ctkernels.tuning.data.formats import Choices, Score
from ctkernels.tuning.hf.forward import Forward


@dataclass(frozen=True)
class Weights:
    """What a loss is put together with.

    score: how the log-likelihoods of an option's tokens are added up.  mixed: share of the options' loss in a mixture.
    answers: factor of the answers' loss of each row, `[B]`; 1 for the mean over rows.
    """

    score: Score
    mixed: float
    answers: Tensor


@dataclass(frozen=True)
class Objective:
    """A row of the objective table.

    Args:
        name: as users write it.
        summary: one line for help texts.
        losses: the loss of each row in nats, fp32 (or fp64) `[B]`, whose mean over the rows of a step is trained.
        choices: whether rows have to hold the options of their demonstrations.
    """

    name: str
    summary: str
    losses: Callable[[Forward, Weights], Tensor]
    choices: Choices = "none"
