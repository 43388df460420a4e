"""CT-Prompt: the embeddings of the demonstrations as a soft prompt, trained on the demonstrations themselves.

Lu, Teehan, Yang, Ren: "Context Tuning for In-Context Optimization", arXiv 2507.04221. A row is the whole prompt and one
demonstration; the segment of that demonstration is hidden from every query of the row, those of the prompt included.
"""

from dataclasses import dataclass

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.starts import metadata
from ctkernels.tuning.train.learners import PromptLearner
from ctkernels.tuning.train.masks import Dropout, Hide, LeaveOneOut
from ctkernels.tuning.train.options import LoopOptions, Options
from ctkernels.tuning.train.reparametrise import NetworkOptions


@dataclass(frozen=True)
class ContextPromptOptions(LeaveOneOut, Dropout, LoopOptions):
    """What every soft prompt of the demonstrations reads."""

    lr: float = 1e-3
    batch_rows: int | None = 4
    leave_one_out: Hide = "self"
    drop_p: float = 0.05


@dataclass(frozen=True)
class CtPromptOptions(NetworkOptions, ContextPromptOptions):
    """What ct-prompt reads."""


def context_prompt(run: Run[Options]) -> SoftPrompt:
    """The embeddings of the demonstrations, behind another task's prompt if the run starts from one."""
    own = SoftPrompt.from_tokens(run.model, run.context.input_ids, run.context.segments)
    if run.start_from is None:
        return own
    front, bos = run.start_from.prompt.embeddings.detach(), len(run.bos_tokens)
    embeddings = torch.cat((front, own.embeddings.detach()[bos:]))
    return SoftPrompt(embeddings, own.segments + len(front) - bos)


def tuned(run: Run[Dropout], prompt: SoftPrompt, radii: torch.Tensor | None = None) -> Adapter:
    """The adapter of a prompt trained on the demonstrations' rows."""
    check_context_length(run.model, prompt.length)
    run.check_rows(prompt.length, run.rows)
    learner = PromptLearner(run.model, prompt, run.rows, run.settings, radii)

    def result() -> Adapter:
        prompt = learner.result()
        return Adapter(prompt.to_prefix(run.model, metadata(run)), prompt)

    run.train(learner, result=result)
    return result()


def fit(run: Run[CtPromptOptions]) -> Adapter:
    return tuned(run, context_prompt(run))


CT_PROMPT = Method(
    name="ct-prompt",
    summary="the demonstrations' embeddings as a soft prompt, tuned with leave-one-out and token dropout",
    options=CtPromptOptions,
    fit=fit,
    trains="prompt",
    transfers="prompt",
)
