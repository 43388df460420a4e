"""Set-ups of the last few calls, for layers whose mask is not prepared (`ctkernels.prepare`)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from threading import Lock

from torch import Tensor

from ctkernels.problem import PROBLEM_TENSORS, Problem

MOST = 8  # of both directions

_recent: list[tuple[Hashable, list[weakref.ref | None], Tensor]] = []
_lock = Lock()


def recall(key: Hashable, problem: Problem, make: Callable[[], Tensor]) -> Tensor:
    """What an earlier call with the same key has made, if its index tensors were the very same objects and were not
    written to since (as torch counts: writes past it, through `.data`, are not seen)."""
    sources: tuple[Tensor | None, ...] = problem[:PROBLEM_TENSORS]
    if any(x is not None and x.is_inference() for x in sources):  # such a tensor does not count writes
        return make()
    key = key, problem.seed, tuple(None if x is None else x._version for x in sources)
    with _lock:
        for entry in _recent:
            if entry[0] == key and all(_is(ref, x) for ref, x in zip(entry[1], sources, strict=True)):
                return entry[2]
    made = make()
    with _lock:
        _recent.insert(0, (key, [None if x is None else weakref.ref(x) for x in sources], made))
        del _recent[MOST:]
    return made


def _is(ref: weakref.ref | None, x: Tensor | None) -> bool:
    return x is None if ref is None else ref() is x
