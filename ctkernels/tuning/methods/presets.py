"""The paper's settings by benchmark, for the models it used (Lu, Teehan, Yang, Ren: arXiv 2507.04221).

nlp-lr: GPT-2 Large, 16 demonstrations.  mmlu: Llama-3.2-1B-Instruct, 16.  bbh: the same model, 10.  arc: Llama-3.2-1B
tuned on re-arc, about 3. Other models want other learning rates: tune them on held-out rows.

What the paper calls an iteration is one step of the optimiser. ct-kv and prefix tuning take it on all rows, so that it
is an epoch; ct-prompt and ttt take it on 4 rows, so that `steps` counts it. Its loss is the mean over the tokens of a
step.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any


def _preset(
    ct_kv: tuple[float, int, float],
    ct_prompt: tuple[float, int, float],
    prefix: tuple[float, int],
    ttt: tuple[float, int],
    ct_kv_after_ttt: int,
) -> MappingProxyType[str, dict[str, Any]]:
    """(lr, optimiser steps, token dropout) of each method, and the steps of ct-kv after ttt."""
    kv = {"lr": ct_kv[0], "drop_p": ct_kv[2]}
    dropout = {"lora_dropout": 0.05}
    own = {
        "ct-kv": {**kv, "epochs": ct_kv[1]},
        "ct-prompt": {"lr": ct_prompt[0], "steps": ct_prompt[1], "drop_p": ct_prompt[2]},
        "prefix-tuning": {"lr": prefix[0], "epochs": prefix[1], "prompt_tokens": 32},
        "ttt": {"lr": ttt[0], "steps": ttt[1], **dropout},
        "ttt+ct-kv": {**kv, "epochs": ct_kv_after_ttt, "ttt_lr": ttt[0], "ttt_steps": ttt[1], **dropout},
    }
    return MappingProxyType({method: {**settings, "reduction": "tokens"} for method, settings in own.items()})


PRESETS = MappingProxyType(
    {
        "nlp-lr": _preset((1e-3, 250, 0.05), (1e-3, 250, 0.05), (3e-3, 250), (1e-4, 250), 30),
        "mmlu": _preset((1e-3, 20, 0.1), (3e-4, 20, 0.0), (1e-3, 20), (1e-4, 20), 10),
        "bbh": _preset((1e-3, 16, 0.1), (3e-4, 12, 0.0), (3e-4, 16), (1e-4, 8), 8),
        "arc": _preset((3e-3, 200, 0.1), (1e-3, 150, 0.1), (3e-3, 150), (1e-4, 200), 50),
    }
)
