"""Runs calls of the op by number, in processes that may die."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from random import Random

from ctkernels import dispatch
from ctkernels.testing.backends import Backend, builds
from ctkernels.testing.calls import TYPES
from tools.fuzz.cases import INTERPRETED, SIZES, Case, check
from tools.fuzz.guard import Guard

BATCH, SLOW_BATCH = 250, 50  # calls per process


@dataclass
class Tally:
    """What ran: calls by what was on in them, cases by build and types, the largest errors, and what was wrong."""

    calls: int = 0
    traits: Counter[str] = field(default_factory=Counter)
    cases: Counter[tuple[str, str]] = field(default_factory=Counter)
    judged: dict[str, dict[str, float]] = field(default_factory=dict)  # types -> result -> part of what is allowed
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.calls += other.calls
        self.traits += other.traits
        self.cases += other.cases
        self.wrong += other.wrong
        for types, parts in other.judged.items():
            mine = self.judged.setdefault(types, {})
            for name, part in parts.items():
                mine[name] = max(mine.get(name, 0.0), part)


class Engine:
    """Runs the calls of one backend: "cpu", "triton" (in its interpreter) or "cuda" (in the PTX emulator)."""

    def __init__(self, on: str) -> None:
        self.types, self.sizes = [types for types in TYPES if types != "fp64"], INTERPRETED
        self.batch = BATCH if on == "cpu" else SLOW_BATCH
        self._running: Callable[[int], AbstractContextManager] = lambda number: nullcontext()
        if on == "cpu":
            self.builds, self.types, self.sizes = [b for b in builds() if b.isa], list(TYPES), SIZES
        elif on == "triton":
            self.builds = [Backend("triton")]
        else:
            from tools.gpu.cuda.emulated import BACKEND, Emulator, running_on

            def running(number: int) -> AbstractContextManager:
                chance = Random(number)
                return running_on(
                    Emulator(chance.choice(["eager", "lazy"]), chance.randrange(4), chance.choice([4, 40]))
                )

            self.builds, self._running = [BACKEND], running

    def one(self, number: int, guard: Guard) -> Tally:
        """The call of a number on all builds."""
        case = Case.draw(number, self.types, self.sizes)
        cases = Counter((str(build), case.types) for build in self.builds)
        parts: dict[str, float] = {}
        with self._running(number):
            wrong = check(case, self.builds, guard, _select, parts)
        return Tally(1, Counter(case.traits()), cases, {case.types: parts}, wrong)

    def many(self, first: int, count: int) -> Tally:
        """Calls first ... first + count - 1 in a process of their own; where it dies, the rest in another one."""
        tally, end = Tally(), first + count
        while first < end:
            found, reached = self._process(first, end)
            tally.add(found)
            first = reached
        return tally

    def _process(self, first: int, end: int) -> tuple[Tally, int]:
        """What a process found, and the number behind the last one that it began."""
        shared = mmap.mmap(-1, mmap.PAGESIZE)
        current = ctypes.c_int64.from_buffer(shared)
        current.value = first
        with tempfile.TemporaryFile() as answers:
            process = os.fork()
            if process == 0:
                try:
                    guard = Guard()
                    for number in range(first, end):
                        current.value = number
                        pickle.dump(self.one(number, guard), answers)
                        answers.flush()
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            answers.seek(0)
            tally = Tally()
            for _ in range(first, current.value + (status == 0)):
                tally.add(pickle.load(answers))
        if status:
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            tally.wrong.append(f"case {current.value}: the process ended with {how}")
        return tally, current.value + 1


def _select(build: Backend) -> None:
    if build.isa is not None:
        dispatch.set_cpu_isa(build.isa)
