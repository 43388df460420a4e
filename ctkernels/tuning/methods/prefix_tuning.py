"""Prefix tuning: keys and values of a few tokens that stand for no demonstration, trained in every layer.

Li and Liang: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.
"""

from dataclasses import dataclass

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.methods.base import Method, Run, trained_prefix
from ctkernels.tuning.methods.starts import PrefixStart, tokens_prefix
from ctkernels.tuning.train.learners import PrefixLearner, PrefixOptions
from ctkernels.tuning.train.masks import Dropout
from ctkernels.tuning.train.options import LoopOptions


@dataclass(frozen=True)
class PrefixTuningOptions(PrefixOptions, PrefixStart, Dropout, LoopOptions):
    """What prefix tuning reads."""


def learner(run: Run[PrefixTuningOptions]) -> PrefixLearner:
    PrefixLearner.check(run.model, run.settings)
    return PrefixLearner(run.model, tokens_prefix(run), run.rows, run.settings)


def fit(run: Run[PrefixTuningOptions]) -> Adapter:
    return trained_prefix(run, learner(run))


PREFIX_TUNING = Method(
    name="prefix-tuning",
    summary="keys and values of a few tokens, trained in every layer",
    options=PrefixTuningOptions,
    fit=fit,
    trains="prefix",
    transfers="prefix",
    learner=learner,
)
