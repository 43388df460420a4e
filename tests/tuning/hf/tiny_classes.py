"""Tiny models of transformers' classes, by model type, and what several tests do with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ctkernels.testing.classes import Case, build, model_types
from ctkernels.testing.models import tokens
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.tiny import make_tiny, shrink

CONTEXT, SEGMENTS = tokens(12, seed=2), torch.tensor([0, 5, 12])


def class_of(model_type: str, **settings) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    return build(Case(model_type, "", model_types()[model_type], settings))


def tiny(model_type: str, **settings) -> PreTrainedModel:
    model_class, config = class_of(model_type, **settings)
    return make_tiny(model_class, shrink(config))


def check_checkpointing(
    make: Callable[[], PreTrainedModel], reentrant: bool, run: Callable[[PreTrainedModel, KVPrefix], None]
) -> None:
    """With gradient checkpointing `run`, which attaches the prefix and goes backward, gives it the same gradient."""
    gradients = []
    for checkpointing in (False, True):
        model = make()
        prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        run(model, prefix)
        gradients.append([p.grad for p in prefix.parameters()])
    torch.testing.assert_close(*gradients)
