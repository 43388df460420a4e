"""Instruction prompt tuning: a soft prompt, then demonstrations in words, then the input.

Sun, Liu, Iter, Zhu, Iyyer: "How Does In-Context Learning Help Prompt Tuning?", arXiv 2302.11521.
"""

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.formats import encode_rows
from ctkernels.tuning.data.retrieval import InWordsEncoder
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.prompt_tuning import DEFAULTS, OPTIONS, STARTS, fit_prompt


def fit(run: Run) -> Adapter:
    settings = run.settings
    encoder = InWordsEncoder(
        run.tokenizer, run.text_format, run.demonstrations, settings.ipt_shots, settings.demonstrate, settings.seed
    )
    rows = encode_rows(run.tokenizer, run.demonstrations, learn_stop=settings.learn_stop, encoder=encoder)
    return fit_prompt(run, rows, run.demonstrations)


IPT = Method(
    name="ipt",
    summary="a soft prompt, then demonstrations in words, retrieved for each input",
    fit=fit,
    trains="prompt",
    transfers="prompt",
    needs_demonstrations=2,
    options=OPTIONS | {"ipt_shots", "demonstrate"},
    starts=STARTS,
    defaults=DEFAULTS,
)
