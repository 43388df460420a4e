"""What transformers itself would run in place of `attn_implementation="ctkernels"`: the way out for every call that the
op does not compute exactly.

    stock_of(config class)  -> "sdpa" or "eager", as transformers would choose for its models, and whether no call of
                               them may be served at all
    stock_function(module)  -> the attention function behind that name, as the module's own file has it
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Configurations of classes that refuse SDPA for its lack of a softcap alone, which the op has
SOFTCAP_ALONE = ("Gemma2Config", "VaultGemmaConfig")


class Stock(NamedTuple):
    """name: "sdpa" or "eager".  why: if no call of these models may be served, the reason; else None."""

    name: str
    why: str | None = None


@torch.compiler.assume_constant_result
def stock_of(config_class: type) -> Stock:
    """What transformers would run for the models of a configuration class."""
    return _stock_of(config_class)


@cache
def _stock_of(config_class: type) -> Stock:
    models = _models_of(config_class)
    refusing = next((model for model in models if not model._supports_sdpa), None)
    if refusing is not None and config_class.__name__ not in SOFTCAP_ALONE:
        return Stock("eager", f"transformers has no SDPA for {refusing.__name__}")
    name = "sdpa" if refusing is None else "eager"
    if any(decides_by_name(model) for model in models):
        return Stock(name, f"{models[0].__name__} computes something else under other names than sdpa")
    return Stock(name)


def _models_of(config_class: type) -> list[type[PreTrainedModel]]:
    """The model classes that a configuration class belongs to: those of its own package that declare it; if there is
    none, all of the package (it is part of another configuration); else those elsewhere that declare it."""
    package = config_class.__module__.rpartition(".")[0]
    with contextlib.suppress(ImportError):
        importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    models = sorted(_subclasses(PreTrainedModel), key=lambda model: (model.__module__, model.__qualname__))
    neighbours = [model for model in models if model.__module__.rpartition(".")[0] == package]
    declaring = [model for model in models if model.config_class is config_class]
    return [model for model in declaring if model in neighbours] or neighbours or declaring


def _subclasses(kind: type[PreTrainedModel]) -> Iterator[type[PreTrainedModel]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


@torch.compiler.assume_constant_result
def decides_by_name(kind: type) -> bool:
    """Whether a file that a module class is written in compares something with the name "sdpa", or stores a function
    under it.

    Such a class takes another way under a name that it does not know: it hands the choice of keys to the attention
    function instead of masking them, for one. A file that cannot be read is taken to do so.
    """
    files = {base.__module__ for base in kind.__mro__ if issubclass(base, nn.Module)}
    general = ("torch.", "transformers.modeling_", "transformers.utils.", "transformers.generation.")
    return any(_names_sdpa(file) for file in files if not file.startswith(general))


@cache
def _names_sdpa(file: str) -> bool:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[file]))
    except (KeyError, OSError, TypeError):
        return True
    places = (
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Compare, ast.MatchValue))
        or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store))
    )
    return any(isinstance(x, ast.Constant) and x.value == "sdpa" for node in places for x in ast.walk(node))


def stock_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that `module` would look up under "sdpa" or "eager".

    Raises:
        ValueError: it has no eager attention function that could be found.
    """
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    if not has_eager(type(module)):
        raise ValueError(
            f"{type(module).__name__}: this call needs eager attention, which was not found; load the model with "
            'attn_implementation="eager"'
        )
    return _EAGER[type(module)]


_EAGER: dict[type, Callable[..., Any]] = {}


@torch.compiler.assume_constant_result
def has_eager(kind: type[nn.Module]) -> bool:
    """Whether the code of a module class names a function for eager attention; it is kept in `_EAGER`."""
    if kind not in _EAGER:
        for function in _eager_functions(kind):
            _EAGER[kind] = function  # the last one is that of the class itself
    return kind in _EAGER


def _eager_functions(kind: type[nn.Module]) -> Iterator[Callable[..., Any]]:
    for base in reversed(kind.__mro__):
        for function in vars(base).values():
            function = inspect.unwrap(function) if callable(function) else None
            code = getattr(function, "__code__", None)
            for name in () if code is None else code.co_names:
                if "eager" in name and callable(function.__globals__.get(name)):
                    yield function.__globals__[name]


@torch.compiler.assume_constant_result
def warn_once(name: str, served_by: str, why: str) -> None:
    """Say that calls of a class go to transformers' own attention; once for each class."""
    if name not in _WARNED:
        _WARNED.add(name)
        warnings.warn(
            f'attn_implementation="ctkernels": {name} is served by transformers\' own {served_by} attention where the '
            f"op does not compute what it asks for ({why})",
            stacklevel=4,
        )


_WARNED: set[str] = set()
