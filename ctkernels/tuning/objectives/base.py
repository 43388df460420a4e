"""What an objective is: a name, and a function from a batch of rows to the loss of each of them.

Forward     a batch of training rows with all that is trained attached to the model, ready to run
Objective   a row of the objective table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.data.formats import Choices, Score
from ctkernels.tuning.hf.attach import Attachment

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Forward:
    """A batch of rows, and how the model runs on them.

    attachment: of what is trained, or of an empty prefix; its mask is that of the batch.
    prompt: embeddings `[batch.lead, E]` of a soft prompt at the start of each row, or None.
    """

    model: PreTrainedModel
    attachment: Attachment
    batch: Batch
    prompt: Tensor | None = None


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
