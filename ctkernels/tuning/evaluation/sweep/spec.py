"""A method with some of its settings, as one word: `ct-kv`, or `ct-kv:lr=1e-3:leave_one_out=none`; also with what is
done to its demonstrations: `ct-kv:noise=0.2` (`protocols.py`)."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from ctkernels.tuning.evaluation.sweep.protocols import NAMES, Protocol
from ctkernels.tuning.methods import Method, get_method
from ctkernels.tuning.methods.settings import SETTINGS, TrainSettings
from ctkernels.tuning.train.options import Options, layered


@dataclass(frozen=True)
class MethodSpec:
    """A method to compare.

    name: the method's.  overrides: settings that differ from the method's defaults.  protocol: what is done to its
    demonstrations.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)
    protocol: Protocol = field(default_factory=Protocol)

    def __str__(self) -> str:
        values = {**self.overrides, **self.protocol.changed()}
        return ":".join([self.name, *(f"{name}={_write(value)}" for name, value in values.items())])

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """The method and settings of a word.

        Raises:
            ValueError: an unknown method or setting, or a value of the wrong type or out of its range.
        """
        name, *assignments = text.split(":")
        get_method(name)  # first, so that an unknown method is the error
        overrides: dict[str, Any] = {}
        protocol: dict[str, Any] = {}
        for assignment in assignments:
            key, equals, value = assignment.partition("=")
            if not equals or not key:
                raise ValueError(f"settings of a method are written {name}:setting=value, got {text!r}")
            if key not in SETTINGS and key not in NAMES:
                raise ValueError(f"{text}: there is no setting {key!r}; there are {', '.join((*SETTINGS, *NAMES))}")
            try:
                if key in NAMES:
                    protocol[key] = _read(type(getattr(Protocol(), key)), value)
                else:
                    overrides[key] = _read(SETTINGS[key].kind, value)
            except ValueError as error:
                raise ValueError(f"{text}: {key} must be {error}, got {value!r}") from None
        spec = cls(name, overrides, Protocol(**protocol))
        spec.settings()  # checks the values' ranges
        if spec.protocol.changed() and not spec.method.needs_demonstrations:
            raise ValueError(f"{text}: {name} sees no demonstrations, to which {', '.join(protocol)} could be done")
        if spec.protocol.transferred and spec.method.transfers == "nothing":
            raise ValueError(f"{text}: {name} starts from nothing but its own task, so that nothing can be transferred")
        if spec.protocol.auto and spec.method.trains == "nothing":
            raise ValueError(f"{text}: {name} trains nothing, so that there is nothing to search for")
        return spec

    def variants(self, noises: Sequence[float], orders: int) -> list[MethodSpec]:
        """The method with each share of wrong answers and in each of some orders, where it does not say so itself.

        Raises:
            ValueError: a share outside [0, 1], or orders of an ensemble.
        """
        if not self.method.needs_demonstrations:
            return [self]
        own = self.protocol.changed()
        numbers = (0,) if "ensemble" in own else range(orders)
        found = [
            MethodSpec(self.name, self.overrides, Protocol(**{"noise": noise, "order": order, **own}))
            for noise in noises
            for order in numbers
        ]
        return list(dict.fromkeys(found))

    @property
    def method(self) -> Method:
        """The row of the method table."""
        return get_method(self.name)

    def settings(self, preset: str | None = None, **others: Any) -> Options:
        """The method's settings. Over them come those of a preset, of `others` that it reads, and the overrides.

        Raises:
            ValueError: a value out of its range, an override that the method does not read, or a name that no method
                reads.
        """
        for name in others:
            if name not in SETTINGS:
                raise ValueError(f"there is no setting {name!r}; there are {', '.join(SETTINGS)}")
        TrainSettings(**others)  # refuses values out of their range also where the method does not read them
        return self.method.settings(preset, **layered(self.method.pick(others), self.overrides))


def split_words(words: tuple[str, ...]) -> list[str]:
    """Words given separately or joined by commas: each once, in order."""
    parts = [part.strip() for word in words for part in word.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def _read(kind: Any, text: str) -> Any:
    """A value of a setting's type. Raises ValueError, whose message says what was expected."""
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text
    if get_origin(kind) in (Union, types.UnionType):
        if text == "none":
            return None
        (inner,) = (choice for choice in choices if choice is not types.NoneType)
        return _read(inner, text)
    if get_origin(kind) is tuple:
        return tuple(text.split("+"))
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError({int: "a whole number", float: "a number"}[kind]) from None


def _write(value: Any) -> str:
    """A value in the form that `_read` reads."""
    if isinstance(value, tuple):
        return "+".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
