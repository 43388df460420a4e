"""Context Tuning of transformers models: data, prefixes, methods, the trainer and the evaluation.

Names are imported when they are first used, so that `import ctkernels` needs neither transformers nor safetensors.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "adapters.adapter": ("Adapter",),
    "adapters.compose": ("concatenate", "moved"),
    "data": (
        "DataError",
        "Demonstration",
        "TextFormat",
        "encode_context",
        "encode_prompt",
        "encode_rows",
        "load_jsonl",
        "load_metaicl",
    ),
    "train.distributed": ("PeerError",),
    "evaluation.calibration": ("Offsets",),
    "evaluation.evaluate": ("EvalResult", "evaluate_prefix"),
    "methods": ("METHODS", "PRESETS", "Method", "get_method"),
    "adapters.peft_export": ("export_peft",),
    "adapters.peft_import": ("import_peft",),
    "adapters.prefix": ("KVPrefix",),
    "adapters.prefix_model": ("PrefixModel",),
    "adapters.prefix_set": ("PrefixSet", "left_padded"),
    "adapters.prompt": ("SoftPrompt",),
    "adapters.store": ("PrefixStore",),
    "methods.auto": ("AutoResult", "autotune"),
    "methods.settings": ("TrainSettings",),
    "methods.tune": ("TuneResult", "tune"),
    "train.trainer": ("EpochRecord", "TrainingError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
