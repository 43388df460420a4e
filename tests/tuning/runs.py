"""Short runs of any method on the tests' task."""

from __future__ import annotations

import torch

from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.methods import METHODS, get_method
from ctkernels.tuning.methods.tune import TuneResult, tune
from ctkernels.tuning.train.options import Options, layered

NAMES = tuple(METHODS)
TRAINING = tuple(name for name, method in METHODS.items() if method.trains != "nothing")
TOKENIZER = char_tokenizer(adds_bos=True)
ITEMS = [Demonstration("warm rain", "warm", ("warm", "cold", "ok")), Demonstration("ink", "ok", ("warm", "cold", "ok"))]


def settings(name: str, **options) -> Options:
    """The loss of the answers, three epochs at a high rate, a small update where there is one."""
    small = {
        "objective": "answers",
        "lora_rank": 2,
        "ttt_epochs": 2,
        "ttt_lr": 1e-2,
        "prompt_tokens": 5,
        "epochs": 3,
        "lr": 1e-2,
        "seed": 2,
    }
    method = get_method(name)
    return method.settings(**layered(method.pick(small), options))


def run(name: str, model, demonstrations=DEMONSTRATIONS, options=None, **arguments) -> TuneResult:
    """The method `name`, with further settings in `options` and further arguments of `tune`."""
    return tune(model, TOKENIZER, demonstrations, name, settings(name, **(options or {})), **arguments)


def tensors(adapter: Adapter) -> list[torch.Tensor]:
    lora = {} if adapter.lora is None else adapter.lora.tensors
    prompt = [] if adapter.prompt is None else [adapter.prompt.embeddings]
    return [x.detach() for x in (*adapter.prefix.parameters(), *prompt, *(lora[key] for key in sorted(lora)))]


def assert_same_bits(a: Adapter, b: Adapter) -> None:
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
