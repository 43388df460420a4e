"""Instruction prompt tuning: a soft prompt, then demonstrations in words, then the input.

Sun, Liu, Iter, Zhu, Iyyer: "How Does In-Context Learning Help Prompt Tuning?", arXiv 2302.11521.
"""

from dataclasses import dataclass

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.icl_words import InWords, in_words
from ctkernels.tuning.methods.prompt_tuning import PromptTuningOptions, fit_prompt


@dataclass(frozen=True)
class IptOptions(InWords, PromptTuningOptions):
    """What ipt reads."""


def fit(run: Run[IptOptions]) -> Adapter:
    return fit_prompt(run, run.encode_rows(in_words(run)), run.demonstrations)


IPT = Method(
    name="ipt",
    summary="a soft prompt, then demonstrations in words, retrieved for each input",
    options=IptOptions,
    fit=fit,
    trains="prompt",
    transfers="prompt",
    needs_demonstrations=2,
)
