"""Prompt tuning: embeddings of a few tokens in front of every row.

Lester, Al-Rfou, Constant: "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.starts import PromptStart, metadata, prompt_embeddings
from ctkernels.tuning.train.learners import PromptLearner
from ctkernels.tuning.train.masks import Dropout
from ctkernels.tuning.train.options import LoopOptions
from ctkernels.tuning.train.reparametrise import NetworkOptions


@dataclass(frozen=True)
class PromptTuningOptions(NetworkOptions, PromptStart, Dropout, LoopOptions):
    """What prompt tuning reads."""

    batch_rows: int | None = 4


def fit_prompt(run: Run[PromptTuningOptions], rows: Sequence[Row], in_words: tuple[Demonstration, ...] = ()) -> Adapter:
    """A soft prompt without demonstrations of its own, trained on `rows`."""
    embeddings = prompt_embeddings(run) if run.start_from is None else run.start_from.prompt.embeddings
    check_context_length(run.model, len(embeddings))
    run.check_rows(len(embeddings), rows)
    prompt = SoftPrompt(embeddings, torch.tensor([len(embeddings)]))
    learner = PromptLearner(run.model, prompt, rows, run.settings)

    def result() -> Adapter:
        prompt = learner.result()
        return Adapter(prompt.to_prefix(run.model, metadata(run)), prompt, demonstrations=in_words)

    run.train(learner, result=result)
    return result()


def fit(run: Run[PromptTuningOptions]) -> Adapter:
    return fit_prompt(run, run.rows)


PROMPT_TUNING = Method(
    name="prompt-tuning",
    summary="embeddings of a few tokens in front of every row",
    options=PromptTuningOptions,
    fit=fit,
    trains="prompt",
    transfers="prompt",
)
