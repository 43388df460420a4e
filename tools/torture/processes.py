"""Processes that save and load."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctkernels.tuning import storage
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.evaluation.sweep.cells import SweepError
from ctkernels.tuning.storage import OutputError

FINE, SENTENCE, OTHER = 0, 3, 4  # how a child ends


class Child:
    """A process at work, and the pipe in which it says what is saved."""

    def __init__(self, process: int, pipe: int) -> None:
        self.process, self.pipe = process, pipe
        self._status: int | None = None

    def status(self) -> int:
        """Waits for its end: FINE, SENTENCE (an error in one sentence that names the folder), OTHER, minus a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self._status

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal, if it was not waited for."""
        if self._status is None:
            os.kill(self.process, how)

    def saved(self) -> int:
        """The last number that it said to be saved, once it has ended; 1 is what lay there before."""
        data = b""
        while part := os.read(self.pipe, 1 << 16):
            data += part
        data = data[: len(data) // 4 * 4]
        return int.from_bytes(data[-4:], "little") if data else 1


@contextmanager
def child(work: Callable[[Callable[[int], object]], object], folder: Path) -> Iterator[Child]:
    """A process that runs `work(say)`, where say(number) tells the parent what is saved; killed at the end of the
    block. What it raises must name `folder`."""
    from_child, to_parent = os.pipe()
    process = os.fork()
    if process == 0:
        status = OTHER
        try:
            os.close(from_child)
            storage._looked.clear()  # as a process of its own
            work(lambda number: os.write(to_parent, number.to_bytes(4, "little")))
            status = FINE
        except (OSError, PrefixFileError, SweepError, OutputError) as error:
            status = SENTENCE if is_sentence(error, folder) else OTHER
            if status == OTHER:
                traceback.print_exc(limit=-3)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(to_parent)
    found = Child(process, from_child)
    try:
        yield found
    finally:
        found.stop()
        found.status()
        os.close(from_child)


def is_sentence(error: Exception, folder: Path) -> bool:
    """Whether an error is one line that names a file in `folder`, and no other exception's name."""
    return str(folder) in str(error) and "\n" not in str(error) and "Error(" not in str(error)
