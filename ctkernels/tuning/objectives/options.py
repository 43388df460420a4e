"""The cross-entropy of the choice among options: -log of the right options' share of exp(score).

score(option)   mean or sum of its tokens' log-likelihoods, or that of its first token, as in evaluation
loss            logsumexp over all options - logsumexp over the right ones, of the scores; mean over a row's choices
"""

import torch
from torch import Tensor

from ctkernels.tuning.data.demonstrations import DataError
from ctkernels.tuning.data.metrics import choice_losses
from ctkernels.tuning.hf.continuations import Scored, score_options
from ctkernels.tuning.objectives.base import Forward, Objective, Weights


def losses_of_rows(scored: Scored) -> list[Tensor]:
    """The loss of each choice of each row, `[number of choices]` per row."""
    return list(choice_losses(scored.scores, scored.right).split(scored.choices_of_rows))


def losses(forward: Forward, weights: Weights) -> Tensor:
    if not all(forward.batch.choices):
        raise DataError("the objective options needs rows with options to choose from, and one has none")
    return torch.stack([row.mean() for row in losses_of_rows(score_options(forward, weights.score))])


OPTIONS = Objective("options", "the cross-entropy of the choice among options", losses, choices="required")
