"""Noticing a training that leaves an attached prefix as it is.

`model.parameters()` of an attached model are the model's own: an optimiser that is made of them, as that of
`transformers.Trainer` is, never changes the prefix, although every backward pass computes its gradient. A hook before
each step of every torch optimiser (one per process, registered with the first attachment) looks for that:

    the prefix has got a gradient since it was attached, and neither this optimiser nor another one has its parameters:
        it is attached now                                                                      an error
        it was, and this optimiser has parameters of the model that it was attached to, or none     a warning

An optimiser that trains another prefix, of another model, is left alone.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

MESSAGE = (
    "this optimiser ({}) has no parameter of the prefix that {} attached to {}, nor has any other optimiser, so the "
    "prefix stays as it is: model.parameters() does not list it. Train PrefixModel(model, prefix), also with "
    "transformers.Trainer, or give prefix.parameters() to the optimiser; if the prefix is not to be trained, call "
    "prefix.requires_grad_(False)"
)
Stamps = dict[int, tuple[int, int]]  # of each parameter with a gradient: which one, and how often it was changed


@dataclass(frozen=True)
class _Watch:
    model: weakref.ref[nn.Module]
    attached: Callable[[], bool]
    stamps: Stamps
    parameters: set[int]  # when it was attached: comparing with them alone is cheap, also where many are watched


_watched: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def watch(prefix: object, model: nn.Module, attached: Callable[[], bool]) -> None:
    """Have optimisers raise ValueError before a step that leaves out `prefix`, which is being attached to `model`.

    attached: whether it still is.  A prefix that is no module is not watched.
    """
    if not isinstance(prefix, nn.Module):
        return
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    _watched[prefix] = _Watch(weakref.ref(model), attached, _stamps(prefix), _ids(prefix))


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    """Runs before each step of any optimiser."""
    held, ids, everything = _parameters(optimizer) if _watched else set(), cache(_ids), list(_watched.items())
    trained = {id(watched.model()) for _, watched in everything if not held.isdisjoint(watched.parameters)}  # models
    for prefix, watched in everything:
        if held.isdisjoint(watched.parameters):
            model, attached = watched.model(), watched.attached()
            if model is None or (trained and id(model) not in trained):
                continue  # a training of a prefix of another model
            if held and not attached and held.isdisjoint(ids(model)):
                continue  # a training of something else
            if not _stamps(prefix).items() - watched.stamps.items():
                continue
            own, others = ids(prefix), (other for other in gc.get_objects() if issubclass(type(other), Optimizer))
            if held.isdisjoint(own) and not any(own & _parameters(other) for other in others):
                names = type(optimizer).__name__, "is" if attached else "was", type(model).__name__
                if attached:
                    raise ValueError(MESSAGE.format(*names))
                warnings.warn(MESSAGE.format(*names), stacklevel=3)
        _watched.pop(prefix)  # until it is attached again


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def _stamps(prefix: nn.Module) -> Stamps:
    trained = (p for p in prefix.parameters() if p.requires_grad and p.numel() and p.grad is not None)
    return {id(p): (id(p.grad), p.grad._version) for p in trained}


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
