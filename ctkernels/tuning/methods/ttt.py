"""Test-time training: a LoRA update of the weights, trained on the demonstrations in random orders.

Akyürek and others: "The Surprising Effectiveness of Test-Time Training for Few-Shot Learning", arXiv 2411.07279. A row
is all demonstrations as one in-context sequence; every answer is a label, or the last one alone. Test items then follow
the demonstrations under the updated weights.
"""

from dataclasses import dataclass, replace

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.lora import Lora, lora_targets
from ctkernels.tuning.data.formats import PairEncoder
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.icl import context_prefix
from ctkernels.tuning.train.learners import LoraLearner, LoraOptions


@dataclass(frozen=True)
class TttOptions(LoraOptions):
    """What ttt reads."""

    epochs: int = 8
    lr: float = 1e-4
    batch_rows: int | None = 4


def trained_lora(run: Run[LoraOptions], settings: LoraOptions, stage: str = "") -> Lora:
    """The update, trained with `settings`."""
    other = None if run.start_from is None else run.start_from.lora
    if other is not None:
        lora = replace(other, tensors=dict(other.tensors))
    else:
        targets = lora_targets(run.model, settings.lora_targets)
        lora = Lora(settings.lora_rank, settings.lora_alpha, targets, settings.seed)
    encoder = PairEncoder(run.tokenizer, run.text_format)
    with lora.injected(run.model, settings.lora_dropout) as wrapped:
        learner = LoraLearner(run.model, wrapped, encoder, run.demonstrations, settings)
        run.check_rows(0, learner.rows(0))
        run.train(learner, settings, stage, lambda: Adapter(context_prefix(run)))
        lora.capture(wrapped)
    return lora


def fit(run: Run[TttOptions]) -> Adapter:
    lora = trained_lora(run, run.settings)
    with lora.merged(run.model):
        return Adapter(context_prefix(run), lora=lora)


TTT = Method(
    name="ttt",
    summary="a LoRA update of the weights, trained on the demonstrations in random orders",
    options=TttOptions,
    fit=fit,
    trains="lora",
    transfers="lora",
)
