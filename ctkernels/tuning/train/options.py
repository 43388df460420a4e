"""Options of a run: small frozen dataclasses, each beside the code that reads it, put together by inheritance.

    class CtKvOptions(PrefixOptions, ContextStart, LeaveOneOut, Dropout, LoopOptions):     what the method reads
        drop_p: float = 0.05                                                               its own default

A setting that a method does not read is no field of its class. What a setting means stands once: in the entry under
`Args:` of the class that declares it, from where the command line and the documents take it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ctkernels.tuning.data.batches import Layout
from ctkernels.tuning.data.formats import Score
from ctkernels.tuning.objectives import OBJECTIVES, Objective, ObjectiveName

MAX_SEED = 2**31 - 1  # the seed and the epoch share the 64-bit seed of token dropout
ENTRY = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)  # of a docstring's `Args:`
# settings that had another name in an earlier version: for hints, and for files that it wrote
RENAMED = {"hidden": "mlp_width", "pool": "pooled_tokens", "ipt_shots": "shown"}
# settings that an earlier version did not have, and what it did, for files that it wrote
ADDED = {
    "score": "mean",
    "objective": "answers",
    "mixed": 0.5,
    "reduction": "rows",
    "steps": None,
    "ttt_steps": None,
    "lora_dropout": 0.0,
    "ema": 0.0,
    "graph": "auto",  # which on a CPU is what it did
}
# settings of which a value given later replaces the other one, too: both say how long a loop is
LENGTHS = (("epochs", "steps"), ("ttt_epochs", "ttt_steps"))


@dataclass(frozen=True)
class Options:
    """What every run is told, whatever its method.

    A class of options declares settings and refuses bad values in `check`, which looks at its own settings alone: the
    checks of all bases run. Choices (`Literal`) need no check.

    Args:
        seed: seed of everything that is drawn, 0 to 2^31 - 1; the same seed gives the same bits.
        max_tokens: most tokens of one micro-batch; gradients of all of them are accumulated before the step.
        backend: backend of the attention op; None takes the best available one.
        score: how the log-likelihoods of an option's tokens become its score, in evaluation and in the objectives that
            read options: "mean" or "sum" over its tokens, or that of its "first-token" alone.

    Raises:
        ValueError: a value out of its range.
    """

    seed: int = 0
    max_tokens: int = 4096
    backend: str | None = None
    score: Score = "mean"

    def __post_init__(self) -> None:
        for name, kind in type_hints(type(self)).items():
            if choices(kind):
                self.require(getattr(self, name) in choices(kind), name, either(choices(kind)))
        for part in self.parts():
            part.check(self)

    @classmethod
    def parts(cls) -> tuple[type[Options], ...]:
        """The classes of options it is made of that check something, from the ground up."""
        return tuple(part for part in reversed(cls.__mro__) if "check" in vars(part))

    def check(self) -> None:
        """Refuse values out of their range. Raises ValueError."""
        self.at_least(1, "max_tokens")
        self.require(0 <= self.seed <= MAX_SEED, "seed", f"in [0, {MAX_SEED}]")

    def require(self, holds: bool, name: str, expected: str) -> None:
        """Refuse the value of a setting if `holds` is False. Raises ValueError."""
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def at_least(self, least: int, *names: str, or_none: bool = False) -> None:
        """Refuse smaller values, and None unless it is allowed. Raises ValueError."""
        for name in names:
            value = getattr(self, name)
            holds = or_none if value is None else value >= least
            self.require(holds, name, f"at least {least}{', or None' if or_none else ''}")

    def positive(self, *names: str) -> None:
        """Refuse values that are not positive and finite. Raises ValueError."""
        for name in names:
            self.require(0 < getattr(self, name) < float("inf"), name, "positive")

    def dropout_seed(self, epoch: int) -> int:
        """64-bit seed of what is drawn in an epoch: the run's seed above, the epoch below."""
        return (self.seed << 32) | epoch


@dataclass(frozen=True)
class LoopOptions(Options):
    """What the training loop reads.

    Args:
        epochs: passes over all rows; 0 trains nothing, so that what a run starts from is its result.
        steps: optimiser steps, counted instead of `epochs`; the last pass over the rows may end early.
        lr: peak learning rate of AdamW (betas 0.9/0.999, no weight decay); it falls to 0 along a cosine.
        batch_rows: rows of one optimiser step, drawn anew each epoch; None takes one step per epoch on all rows.
        clip_norm: largest gradient norm; None does not clip.
        learn_stop: also train the delimiter after the answer, so that generation learns where to stop.
        layout: "packed" runs rows back to back without padding, "padded" as a right-padded batch; same gradients.
            Objectives that read options are always padded.
        objective: what is minimised: "answers" (cross-entropy of the answers), "options" (of the choice among the
            options of each demonstration), or "mixed" (a weighted mean of both; demonstrations without options have the
            first alone). None takes "options" where all demonstrations have some, else "answers".
        mixed: weight of the options in the objective "mixed", in [0, 1].
        reduction: what the answers' loss is a mean over: "rows" (each row's mean over its tokens counts alike) or
            "tokens" (all tokens of a step count alike, as in the authors' code).
        graph: whether an optimiser step runs as one CUDA graph: "auto" where that is possible, "on" (an error where it
            is not) or "off".
    """

    epochs: int = 25
    steps: int | None = None
    lr: float = 3e-3
    batch_rows: int | None = None
    clip_norm: float | None = 1.0
    learn_stop: bool = False
    layout: Layout = "packed"
    objective: ObjectiveName | None = None
    mixed: float = 0.5
    reduction: Literal["rows", "tokens"] = "rows"
    graph: Literal["auto", "on", "off"] = "auto"

    @property
    def minimised(self) -> Objective:
        """The objective. What None takes is decided by `methods.tune`, which sees the demonstrations; until then it is
        that of the answers."""
        return OBJECTIVES[self.objective or "answers"]

    def check(self) -> None:
        self.at_least(0, "epochs")
        self.at_least(1, "steps", or_none=True)
        self.positive("lr")
        self.at_least(1, "batch_rows", or_none=True)
        self.require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or None")
        self.require(0 <= self.mixed <= 1, "mixed", "in [0, 1]")


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of several layers, the later ones above: `epochs` also replaces `steps` of a layer below, and the other
    way round.

    Raises:
        ValueError: one layer has both.
    """
    found: dict[str, Any] = {}
    for layer in layers:
        for pair in LENGTHS:
            given = [name for name in pair if layer.get(name) is not None]
            if len(given) == 2:
                raise ValueError(f"{pair[0]} and {pair[1]} exclude each other: both say how long training is")
            if given:
                found = {name: value for name, value in found.items() if name not in pair}
        found |= layer
    return found


@cache
def type_hints(kind: type[Options]) -> dict[str, Any]:
    """The type of each setting of a class, by name."""
    return get_type_hints(kind)


def choices(kind: Any) -> tuple[Any, ...]:
    """The values of a setting that takes one of a few (a `Literal`, several, or None beside), else none."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if kind is type(None):
        return (None,)
    parts = [choices(part) for part in get_args(kind)]
    return tuple(dict.fromkeys(value for part in parts for value in part)) if all(parts) else ()


def either(names: Sequence[Any]) -> str:
    """`a, b or c`"""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def declarer(kind: type[Options], name: str) -> type[Options]:
    """The class that declares a setting of `kind`; classes above it may narrow its type and set another default."""
    return next(part for part in reversed(kind.__mro__) if name in inspect.get_annotations(part))


def neutral(kind: type[Options], name: str) -> Any:
    """The default of a setting where it is declared: what it is before a method has a say."""
    return getattr(declarer(kind, name), name)


def meanings(kind: type[Options]) -> dict[str, str]:
    """What the settings mean that a class declares, by name: the entries under `Args:` in its docstring."""
    arguments = inspect.cleandoc(vars(kind)["__doc__"] or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in ENTRY.findall(arguments)}
