"""Test-time training, merged into the weights, then CT-KV under them (arXiv 2507.04221).

Both stages take the settings of the run, but for the first one's learning rate and length (`ttt_lr`, `ttt_epochs` or
`ttt_steps`) and the rows of its steps, which are always 4.
"""

from dataclasses import dataclass, replace

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.methods import ct_kv, ttt
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.train.learners import LoraOptions


@dataclass(frozen=True)
class TttCtKvOptions(ct_kv.CtKvOptions, LoraOptions):
    """What ttt+ct-kv reads.

    Args:
        ttt_epochs: epochs of the LoRA stage, whose steps take 4 rows whatever `batch_rows` is.
        ttt_steps: optimiser steps of the LoRA stage, counted instead of `ttt_epochs`.
        ttt_lr: learning rate of the LoRA stage.
    """

    epochs: int = 8
    ttt_epochs: int = 8
    ttt_steps: int | None = None
    ttt_lr: float = 1e-4

    def check(self) -> None:
        self.at_least(0, "ttt_epochs")
        self.at_least(1, "ttt_steps", or_none=True)
        self.positive("ttt_lr")


def fit(run: Run[TttCtKvOptions]) -> Adapter:
    settings = run.settings
    batch_rows = ttt.TttOptions.batch_rows
    first = replace(
        settings, lr=settings.ttt_lr, epochs=settings.ttt_epochs, steps=settings.ttt_steps, batch_rows=batch_rows
    )
    second = replace(run, start_from=None)
    ct_kv.check(second)
    lora = ttt.trained_lora(run, first, stage="ttt")
    with lora.merged(run.model):
        return replace(ct_kv.fit(second), lora=lora)


TTT_CT_KV = Method(
    name="ttt+ct-kv",
    summary="ttt, merged into the weights, then ct-kv under them",
    options=TttCtKvOptions,
    fit=fit,
    trains="lora and prefix",
    transfers="lora",
)
