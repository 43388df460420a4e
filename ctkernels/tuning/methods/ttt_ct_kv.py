"""Test-time training, merged into the weights, then CT-KV under them (arXiv 2507.04221).

Both stages take the settings of the run, but for the first one's learning rate and epochs (`ttt_lr`, `ttt_epochs`) and
the rows of its steps, which are always 4.
"""

from dataclasses import replace
from types import MappingProxyType

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.methods import ct_kv, ttt
from ctkernels.tuning.methods.base import Method, Run


def fit(run: Run) -> Adapter:
    settings = run.settings
    first = replace(settings, lr=settings.ttt_lr, epochs=settings.ttt_epochs, batch_rows=ttt.TTT.defaults["batch_rows"])
    second = replace(run, start_from=None)
    ct_kv.check(second)
    lora = ttt.trained_lora(run, first, stage="ttt")
    with lora.merged(run.model):
        return Adapter(ct_kv.tuned_prefix(second), lora=lora)


TTT_CT_KV = Method(
    name="ttt+ct-kv",
    summary="ttt, merged into the weights, then ct-kv under them",
    fit=fit,
    trains="lora and prefix",
    transfers="lora",
    options=ct_kv.CT_KV.options | ttt.OPTIONS | {"ttt_epochs", "ttt_lr"},
    starts=ct_kv.STARTS,
    defaults=MappingProxyType({**ct_kv.DEFAULTS, "epochs": 8}),
)
