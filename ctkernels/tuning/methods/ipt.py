"""Instruction prompt tuning: a soft prompt, then demonstrations in words, then the input.

Sun, Liu, Iter, Zhu, Iyyer: "How Does In-Context Learning Help Prompt Tuning?", arXiv 2302.11521.
"""

from dataclasses import dataclass

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.retrieval import Demonstrate, InWordsEncoder
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.prompt_tuning import PromptTuningOptions, fit_prompt


@dataclass(frozen=True)
class IptOptions(PromptTuningOptions):
    """What ipt reads.

    Args:
        demonstrate: which demonstrations ipt puts in words before an input: the most "similar" ones, or "fixed" ones.
        ipt_shots: how many demonstrations ipt puts in words before an input.
    """

    demonstrate: Demonstrate = "similar"
    ipt_shots: int = 4

    def check(self) -> None:
        self.at_least(1, "ipt_shots")


def fit(run: Run[IptOptions]) -> Adapter:
    settings = run.settings
    encoder = InWordsEncoder(
        run.tokenizer, run.text_format, run.demonstrations, settings.ipt_shots, settings.demonstrate, settings.seed
    )
    return fit_prompt(run, run.encode_rows(encoder), run.demonstrations)


IPT = Method(
    name="ipt",
    summary="a soft prompt, then demonstrations in words, retrieved for each input",
    options=IptOptions,
    fit=fit,
    trains="prompt",
    transfers="prompt",
    needs_demonstrations=2,
)
