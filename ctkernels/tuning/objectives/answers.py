"""The cross-entropy of the answers: mean over the tokens of each row's answer."""

from torch import Tensor

from ctkernels.tuning.hf.forward import row_losses
from ctkernels.tuning.objectives.base import Forward, Objective, Weights


def losses(forward: Forward, weights: Weights) -> Tensor:
    answers = row_losses(forward.model, forward.attachment, forward.batch, forward.prompt)
    return weights.answers.to(answers.dtype) * answers


ANSWERS = Objective("answers", "the cross-entropy of the answers' tokens", losses)
