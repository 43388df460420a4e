"""In-context learning with demonstrations chosen for each input and put in words before it, untrained.

The choice is by BM25, as in Liu and others, "What Makes Good In-Context Examples for GPT-3?" (arXiv 2101.06804) and the
baselines of Sun and others (arXiv 2302.11521), by the model's own embeddings, at random, or the same for all inputs.
"""

from dataclasses import dataclass
from functools import partial

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.retrieval import Demonstrate, InWordsEncoder
from ctkernels.tuning.hf.embeddings import mean_states
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.zero_shot import start_prefix
from ctkernels.tuning.train.options import Options


@dataclass(frozen=True)
class InWords(Options):
    """Demonstrations in words before an input.

    Args:
        demonstrate: which demonstrations are put in words before an input: the most "similar" ones by BM25, those with
            the nearest "embedding" in the model, "random" ones of its own, or "fixed" ones for all inputs.
        shown: how many demonstrations are put in words before an input.
    """

    demonstrate: Demonstrate = "similar"
    shown: int = 4

    def check(self) -> None:
        self.at_least(1, "shown")


def in_words(run: Run[InWords]) -> InWordsEncoder:
    """Turns items into tokens, with demonstrations of the run before them."""
    embed = partial(mean_states, run.model)
    s = run.settings
    return InWordsEncoder(run.tokenizer, run.text_format, run.demonstrations, s.shown, s.demonstrate, s.seed, embed)


def fit(run: Run[InWords]) -> Adapter:
    run.check_rows(len(run.start_tokens), run.encode_rows(in_words(run)))
    return Adapter(start_prefix(run), demonstrations=run.demonstrations)


ICL_WORDS = Method(
    name="icl-words",
    summary="demonstrations in words before each input, retrieved for it, untrained",
    options=InWords,
    fit=fit,
)
