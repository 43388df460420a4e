"""Context-aware prompt tuning: a soft prompt that stays near the demonstrations it starts from.

Blau and others: "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", arXiv
2410.17222. After every step each token's embedding is brought back onto an L2 ball around its start; outputs (and BOS)
do not move at all. The rest is as in ct-prompt.
"""

from types import MappingProxyType

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.formats import DELIMITER, INPUT
from ctkernels.tuning.methods.base import DROPOUT, LEAVE_ONE_OUT, Method, Run
from ctkernels.tuning.methods.ct_prompt import context_prompt, tuned

WIDTH = 2048  # of the embeddings for which the radii are given


def fit(run: Run) -> Adapter:
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
    fit=fit,
    trains="prompt",
    options=DROPOUT | LEAVE_ONE_OUT | {"radius", "format_radius"},
    defaults=MappingProxyType({"lr": 1e-3, "epochs": 25, "batch_rows": 4, "drop_p": 0.05, "leave_one_out": "self"}),
)
