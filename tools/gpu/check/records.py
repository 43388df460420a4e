"""What a check has found so far: a line of JSON for each case when it begins, and one when it ends.

    {"device": "cuda"}                                             what a command runs on
    {"stage": "bench", "plan": ["ceilings", ...]}                  all cases of a stage, in order
    {"stage": "bench", "case": "ceilings", "begun": true}
    {"stage": "bench", "case": "ceilings", "seconds": 3.1, "result": {...}}
    {"ran": ["bench", "train"], "seconds": 190.2, "cpu_seconds": 171.9}      the processes of these stages

A result may hold "failure" (something is wrong) or "reason" (why it did not run, which is no failure). Lines are only
appended, each with one call of the system, so that a process may be killed at any time: what has ended is in the file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Key = tuple[str, str]  # stage, case


class Records:
    """The file of a check. Several processes may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All lines that are whole."""
        return parse(self.path.read_text() if self.path.exists() else "")

    def append(self, **line: Any) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, (("\n" if torn else "") + json.dumps(line, default=str) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def plan(self, stage: str, cases: Iterable[str]) -> None:
        self.append(stage=stage, plan=list(cases))

    def begin(self, stage: str, case: str) -> None:
        self.append(stage=stage, case=case, begun=True)

    def end(self, stage: str, case: str, seconds: float, result: dict[str, Any]) -> None:
        self.append(stage=stage, case=case, seconds=round(seconds, 3), result=result)

    @contextmanager
    def case(self, stage: str, case: str) -> Iterator[dict[str, Any]]:
        """Begins a case; what the block writes into the dict it yields is the result. Nothing ends if it raises."""
        self.begin(stage, case)
        started, result = time.perf_counter(), {}
        yield result
        self.end(stage, case, time.perf_counter() - started, result)

    def results(self) -> dict[Key, dict[str, Any]]:
        """Results by stage and case, in the order in which they came, each with its "seconds"; the last one counts."""
        return {
            (line["stage"], line["case"]): {"seconds": line["seconds"], **line["result"]}
            for line in self.lines()
            if "result" in line
        }

    def unfinished(self, first: int = 0) -> list[Key]:
        """Cases that began in the lines from number `first` on and have not ended."""
        open_cases: dict[Key, None] = {}
        for line in self.lines()[first:]:
            if "case" in line:
                key = (line["stage"], line["case"])
                open_cases.pop(key, None)
                if "begun" in line:
                    open_cases[key] = None
        return list(open_cases)

    def plans(self) -> dict[str, list[str]]:
        """The last plan of each stage."""
        return {line["stage"]: line["plan"] for line in self.lines() if "plan" in line}

    def missing(self, stage: str) -> list[str] | None:
        """Planned cases without a result, or None if the stage was not begun."""
        plan, results = self.plans().get(stage), self.results()
        return None if plan is None else [case for case in plan if (stage, case) not in results]

    def forget(self, stages: Iterable[str], failed_only: bool = False) -> None:
        """Remove what is known of some stages, or of their cases that failed."""
        names, results = set(stages), self.results()

        def goes(line: dict[str, Any]) -> bool:
            if "ran" in line and not failed_only:
                return names.issuperset(line["ran"])
            if line.get("stage") not in names:
                return False
            return not failed_only or "failure" in results.get((line["stage"], line.get("case", "")), {})

        kept = [line for line in self.lines() if not goes(line)]
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def parse(text: str) -> list[dict[str, Any]]:
    """The lines of a file of records, without those whose writer was killed."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def replace_file(path: Path, text: str) -> None:
    """Write a file in one step. (`ctkernels.tuning.storage` would import torch, which may be what does not load.)"""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
