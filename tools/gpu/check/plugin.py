"""A pytest plugin: a record for every test that ends, and no test that has one already.

    CTKERNELS_CHECK_RECORDS   the file of records
    CTKERNELS_CHECK_PART      which run of pytest this is; it stands before a test's name
    CTKERNELS_CHECK_DONE      the names of the tests that have a result, a line each

Where a failure has cost the process its CUDA context, all later tests would fail for that reason. So the process ends
before the next test: pytest-xdist starts another worker, and the tests without a record run in another process.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from tools.gpu.check.records import Records
from tools.gpu.check.session import LOST
from tools.gpu.check.worker import lost

STAGE = "test"
CRASHED = "crashed while running"  # how pytest-xdist reports a test whose process is gone

_records = Records(Path(os.environ["CTKERNELS_CHECK_RECORDS"]))
_part = os.environ["CTKERNELS_CHECK_PART"]
_reports: dict[str, list[pytest.TestReport]] = {}
_context_is_lost = False


def name_of(nodeid: str) -> str:
    return f"{_part}: {nodeid}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All workers read the same list, however many records came since it was written."""
    done = set(Path(os.environ["CTKERNELS_CHECK_DONE"]).read_text().splitlines())
    kept = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    global _context_is_lost
    report = yield
    if report.failed and torch.cuda.is_initialized():
        _context_is_lost = lost("cuda")
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    if _context_is_lost:
        os._exit(LOST)


def pytest_runtest_logstart(nodeid: str) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _records.begin(STAGE, name_of(nodeid))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the process that started the workers gets their reports, too
    if CRASHED in str(report.longrepr):
        return  # it has no result and runs again, in a process without others
    reports = _reports.setdefault(report.nodeid, [])
    reports.append(report)
    if report.when != "teardown":
        return
    del _reports[report.nodeid]
    result: dict[str, str] = {"outcome": "passed"}
    for one in reports:
        if one.failed:
            crash = getattr(one.longrepr, "reprcrash", None)
            result = {"outcome": "failed", "failure": str(crash.message if crash else one.longrepr)[:600]}
            break
        if one.skipped:
            result = {"outcome": "skipped", "why": str(one.longrepr[-1] if one.longrepr else "")[:200]}
    _records.end(STAGE, name_of(report.nodeid), sum(one.duration for one in reports), result)
