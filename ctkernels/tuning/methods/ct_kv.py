"""CT-KV: the demonstrations' KV cache, trained on the demonstrations themselves.

Lu, Teehan, Yang, Ren: "Context Tuning for In-Context Optimization", arXiv 2507.04221. Each demonstration is a row that
reads the prefix minus its own segment (leave-one-out) and minus a random set of tokens (token dropout).
"""

from dataclasses import dataclass

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.both_ways import check_both_ways
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.rotary import check_fixed_rotation
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.starts import ContextStart, demonstrations_prefix
from ctkernels.tuning.train.learners import PrefixLearner, PrefixOptions
from ctkernels.tuning.train.masks import Dropout, Hide, LeaveOneOut
from ctkernels.tuning.train.options import LoopOptions


@dataclass(frozen=True)
class CtKvOptions(PrefixOptions, ContextStart, LeaveOneOut, Dropout, LoopOptions):
    """What ct-kv reads."""

    leave_one_out: Hide = "self"
    drop_p: float = 0.05


def check(run: Run[CtKvOptions]) -> None:
    """Refuse what `tuned_prefix` would (but for `frozen_tokens` of a compressed start) before the model runs."""
    length = len(run.context.input_ids) + run.settings.front_tokens
    PrefixLearner.check(run.model, run.settings, length)
    check_context_length(run.model, length)
    run.check_rows(length, run.rows)
    if run.settings.start in ("permuted", "pooled"):
        check_fixed_rotation(find_decoder(run.model), f"start={run.settings.start!r}")
    if run.settings.start == "prefix-lm":
        check_both_ways(run.model, length)


def tuned_prefix(run: Run[CtKvOptions]) -> KVPrefix:
    """The demonstrations' prefix, trained under the model's weights as they are now."""
    PrefixLearner.check(run.model, run.settings)
    prefix = demonstrations_prefix(run)
    learner = PrefixLearner(run.model, prefix, run.rows, run.settings)
    run.train(learner, result=lambda: Adapter(learner.current()))
    return learner.result()


def fit(run: Run[CtKvOptions]) -> Adapter:
    return Adapter(tuned_prefix(run))


CT_KV = Method(
    name="ct-kv",
    summary="the demonstrations' KV cache, tuned with leave-one-out and token dropout",
    options=CtKvOptions,
    fit=fit,
    trains="prefix",
    transfers="prefix",
)
