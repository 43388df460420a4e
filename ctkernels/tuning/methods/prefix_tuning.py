"""Prefix tuning: keys and values of a few tokens that stand for no demonstration, trained in every layer.

Li and Liang: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190.
"""

from types import MappingProxyType

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.methods.base import DROPOUT, Method, Run
from ctkernels.tuning.methods.ct_kv import PREFIX_OPTIONS
from ctkernels.tuning.methods.starts import tokens_prefix
from ctkernels.tuning.train.learners import PrefixLearner


def fit(run: Run) -> Adapter:
    PrefixLearner.check(run.model, run.settings)
    prefix = tokens_prefix(run)
    learner = PrefixLearner(run.model, prefix, run.rows, run.settings)
    run.train(learner)
    return Adapter(learner.result())


PREFIX_TUNING = Method(
    name="prefix-tuning",
    summary="keys and values of a few tokens, trained in every layer",
    fit=fit,
    trains="prefix",
    transfers="prefix",
    options=DROPOUT | PREFIX_OPTIONS | {"start", "prompt_tokens"},
    starts=("vocabulary", "first-ids", "normal"),
    defaults=MappingProxyType({"lr": 3e-3, "epochs": 25, "start": "vocabulary"}),
)
