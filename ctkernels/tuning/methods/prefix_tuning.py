"""Prefix tuning: keys and values of a few tokens that stand for no demonstration, trained in every layer.

Li and Liang: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.
"""

from dataclasses import dataclass

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.starts import PrefixStart, tokens_prefix
from ctkernels.tuning.train.learners import PrefixLearner, PrefixOptions
from ctkernels.tuning.train.masks import Dropout
from ctkernels.tuning.train.options import LoopOptions


@dataclass(frozen=True)
class PrefixTuningOptions(PrefixOptions, PrefixStart, Dropout, LoopOptions):
    """What prefix tuning reads."""


def fit(run: Run[PrefixTuningOptions]) -> Adapter:
    PrefixLearner.check(run.model, run.settings)
    prefix = tokens_prefix(run)
    learner = PrefixLearner(run.model, prefix, run.rows, run.settings)
    run.train(learner, result=lambda: Adapter(learner.current()))
    return Adapter(learner.result())


PREFIX_TUNING = Method(
    name="prefix-tuning",
    summary="keys and values of a few tokens, trained in every layer",
    options=PrefixTuningOptions,
    fit=fit,
    trains="prefix",
    transfers="prefix",
)
