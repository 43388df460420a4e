"""Short runs of any method on the tests' task."""

from __future__ import annotations

import torch

from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.train.settings import TrainSettings
from ctkernels.tuning.train.trainer import TuneResult, tune

NAMES = (
    "zero-shot",
    "icl",
    "prompt-tuning",
    "prefix-tuning",
    "ipt",
    "ct-prompt",
    "ct-kv",
    "ttt",
    "ttt+ct-kv",
    "deep-thinking",
    "cpt",
)
TRAINING = tuple(name for name in NAMES if name not in ("zero-shot", "icl", "deep-thinking"))
TOKENIZER = char_tokenizer(adds_bos=True)
ITEMS = [Demonstration("warm rain", "warm", ("warm", "cold", "ok")), Demonstration("ink", "ok", ("warm", "cold", "ok"))]


def settings(name: str, **options) -> TrainSettings:
    """Three epochs at a high rate, a small update where there is one."""
    small = {"lora_rank": 2, "ttt_epochs": 2, "ttt_lr": 1e-2, "prompt_tokens": 5}
    reads = get_method(name).reads
    common = {key: value for key, value in small.items() if key in reads}
    return get_method(name).settings(**{**common, "epochs": 3, "lr": 1e-2, "seed": 2, **options})


def run(name: str, model, demonstrations=DEMONSTRATIONS, options=None, **arguments) -> TuneResult:
    """The method `name`, with further settings in `options` and further arguments of `tune`."""
    return tune(model, TOKENIZER, demonstrations, name, settings(name, **(options or {})), **arguments)


def tensors(adapter: Adapter) -> list[torch.Tensor]:
    lora = {} if adapter.lora is None else adapter.lora.tensors
    prompt = [] if adapter.prompt is None else [adapter.prompt.embeddings]
    return [x.detach() for x in (*adapter.prefix.parameters(), *prompt, *(lora[key] for key in sorted(lora)))]


def assert_same_bits(a: Adapter, b: Adapter) -> None:
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
