"""Both at once: (1 - mixed) * answers + mixed * options; the answers alone for a row without options."""

import torch
from torch import Tensor

from ctkernels.tuning.hf.continuations import score_options
from ctkernels.tuning.objectives.base import Forward, Objective, Weights
from ctkernels.tuning.objectives.options import losses_of_rows


def losses(forward: Forward, weights: Weights) -> Tensor:
    scored = score_options(forward, weights.score)
    answers = torch.stack([row.mean() for row in scored.labels.split(forward.batch.answer_sizes)])
    answers = weights.answers.to(answers.dtype) * answers
    rows = [
        (1 - weights.mixed) * answer + weights.mixed * choices.mean() if len(choices) else answer
        for answer, choices in zip(answers, losses_of_rows(scored), strict=True)
    ]
    return torch.stack(rows)


MIXED = Objective("mixed", "a weighted mean of both, the answers alone where there are no options", losses, "optional")
