"""Context-aware prompt tuning: a soft prompt that stays near the demonstrations it starts from.

Blau and others: "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", arXiv
2410.17222. After every step each token's embedding is brought back onto an L2 ball around its start; outputs (and BOS)
do not move at all. The rest is as in ct-prompt.
"""

from dataclasses import dataclass

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.formats import DELIMITER, INPUT
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.ct_prompt import ContextPromptOptions, context_prompt, tuned

WIDTH = 2048  # of the embeddings for which the radii are given


@dataclass(frozen=True)
class CptOptions(ContextPromptOptions):
    """What cpt reads.

    Args:
        radius: largest L2 distance of a token's embedding from its start, for a width of 2048; it grows with the square
            root of the width.
        format_radius: the same for the embedding of a delimiter.
    """

    radius: float = 0.1
    format_radius: float = 0.1

    def check(self) -> None:
        self.positive("radius", "format_radius")


def fit(run: Run[CptOptions]) -> Adapter:
    prompt = context_prompt(run)
    kinds, width = run.context.kinds, prompt.embeddings.shape[1]
    scale = (width / WIDTH) ** 0.5
    radii = torch.zeros(len(kinds), dtype=prompt.embeddings.dtype)
    radii[kinds == INPUT] = run.settings.radius * scale
    radii[kinds == DELIMITER] = run.settings.format_radius * scale
    return tuned(run, prompt, radii)


CPT = Method(
    name="cpt",
    summary="the demonstrations' embeddings as a soft prompt that stays near its start",
    options=CptOptions,
    fit=fit,
    trains="prompt",
)
