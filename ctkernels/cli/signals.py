"""SIGINT (Ctrl-C) and SIGTERM (what batch systems send): a training ends with its epoch, anything else at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def terminable() -> Iterator[None]:
    """A block that SIGTERM leaves with Terminated, as Ctrl-C does with KeyboardInterrupt."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled({signal.SIGTERM: leave}):
        yield


@contextmanager
def ends_with_epoch() -> Iterator[Callable[[], bool]]:
    """A block in which the first signal is kept for who asks: yields whether one came. The second one leaves at once.

    `Interrupted`, which a training raises that was asked to end, leaves the block as the signal's own exception.
    """
    from ctkernels.tuning.train.trainer import Interrupted

    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise _exception(number)
        came.append(number)
        print("ctkernels: ends with this epoch, and keeps a checkpoint; once more ends at once", file=sys.stderr)

    with _handled({signal.SIGTERM: note, signal.SIGINT: note}):
        try:
            yield lambda: bool(came)
        except Interrupted:
            raise _exception(came[0] if came else signal.SIGTERM) from None  # else it came to another process


def _exception(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """A block with these handlers; Python has them in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
