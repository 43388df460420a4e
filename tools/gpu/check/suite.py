"""Stage test: the op's tests on each backend, a record for each test."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from tools.gpu.check.session import HUNG, LOST, Session, how_it_ended, last_lines, python

STAGE = "test"
SELECTIONS = {  # part -> what pytest runs
    "cuda": ("tests/op", "-k", "cuda"),
    "triton": ("tests/op", "-k", "triton"),
}
TOY_SELECTIONS = {"cpu": ("tests/op/test_errors.py", "-k", "refused and cpu and not (avx or portable)")}
MOST_WORKERS = 12
TEST_SECONDS = 170  # of one test, where pytest-timeout is installed; less than a session's `quiet_limit`
NO_TESTS = 5  # pytest's exit status


def test(session: Session) -> None:
    """Run what is missing of each part."""
    selections = TOY_SELECTIONS if session.dry else SELECTIONS
    session.records.plan(STAGE, selections)
    for part, words in selections.items():
        if (STAGE, part) not in session.records.results():
            started = time.perf_counter()
            problem = run_part(session, part, words)
            counts = Counter(result["outcome"] for result in tests_of(session, part).values())
            if problem is None and counts["failed"]:
                problem = f"{counts['failed']} of {counts.total()} tests failed"
            elif problem is None and not counts:
                problem = f"no test was selected by {' '.join(words)}"
            failed = {"failure": problem} if problem else {}
            session.records.end(STAGE, part, time.perf_counter() - started, {**counts, **failed})


def tests_of(session: Session, part: str) -> dict[str, dict]:
    """Results of the tests of a part, by pytest's name."""
    start = f"{part}: "
    found = session.records.results().items()
    return {case[len(start) :]: result for (stage, case), result in found if stage == STAGE and case.startswith(start)}


def run_part(session: Session, part: str, words: tuple[str, ...]) -> str | None:
    """Run the tests without a record, first in parallel; None, or what went wrong besides failed tests.

    A test that ended its process runs again with the others that are missing, in one process. There it is known which
    one it was, which counts as failed.
    """
    parallel = not session.dry and importlib.util.find_spec("xdist") is not None
    while True:
        before, lines = len(tests_of(session, part)), len(session.records.lines())
        status, text = run_pytest(session, part, words, parallel)
        if status == HUNG:
            return how_it_ended(status, session.quiet_limit)
        if not parallel and status in (0, 1, NO_TESTS):
            return None
        if not parallel and status != LOST:
            for stage, case in session.records.unfinished(lines)[-1:]:
                ended = how_it_ended(status, session.quiet_limit)
                session.records.end(stage, case, 0.0, {"outcome": "failed", "failure": f"{ended} in this test"})
        if not parallel and len(tests_of(session, part)) == before:
            return f"pytest: {how_it_ended(status, session.quiet_limit)}: {last_lines(text)}"
        parallel = False  # a last look, at what a lost process left


def run_pytest(session: Session, part: str, words: tuple[str, ...], parallel: bool) -> tuple[int | str, str]:
    command = ["-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "tools.gpu.check.plugin", *words]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += [f"--timeout={TEST_SECONDS}"]
    if parallel:
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done.txt"
        done.write_text("\n".join(tests_of(session, part)))
        env = {"CTKERNELS_CHECK_RECORDS": str(session.records.path.resolve()), "CTKERNELS_CHECK_PART": part}
        return session.run(python(*command), {**env, "CTKERNELS_CHECK_DONE": str(done), "OMP_NUM_THREADS": "1"})
