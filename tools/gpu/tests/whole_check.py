"""All stages of the check of a GPU machine, rehearsed on the CPU: `make gpu-check-dry`. A minute or two."""

from __future__ import annotations

import json

import pytest

from tools.gpu.check import bench, smoke, suite, train
from tools.gpu.check.__main__ import FAILED, OUT_OF_TIME, STAGES
from tools.gpu.check.session import Session
from tools.gpu.tests.rehearsal import Rehearsal

CRASHES = """
import os
import pytest

def test_before():
    pass

def test_that_ends_the_process():
    os._exit(3)

def test_after():
    pass

def test_wrong():
    assert 1 == 2

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""
LOSES_THE_GPU = """
import torch
from tools.gpu.check import plugin

torch.cuda.is_initialized = lambda: True
plugin.lost = lambda device: True

def test_wrong():
    assert 1 == 2

def test_after():
    pass
"""


def test_all_stages(tmp_path):
    """Stopped by a deadline, killed while the op's tests run, and resumed to the end."""
    check = Rehearsal(tmp_path)
    status, printed = check.run("--deadline", "2")
    assert status == OUT_OF_TIME and "**not finished**" in printed
    before = check.kill_after("test", 5, "--resume")
    assert {stage for stage, _ in before} == {"build", "smoke", "test"}
    status, printed = check.run("--resume")
    assert status == 0, printed
    assert all(check.times_ended(key) == 1 for key in check.results())
    plans = check.records.plans()
    assert set(plans) == set(STAGES) and all(check.records.missing(stage) == [] for stage in STAGES)
    assert plans["smoke"] == list(smoke.jobs("cpu"))
    assert plans["bench"] == list(bench.jobs("cpu")) and plans["train"] == list(train.jobs("cpu"))
    counts = check.results()["test", "cpu"]
    assert counts["passed"] > 50 and "failed" not in counts
    check.check_files()
    summary = json.loads((check.out / "gpu_check.json").read_text())
    assert summary["machine"]["versions"]["torch"] and summary["failures"] == []


def run_tests(tmp_path, monkeypatch, text: str) -> tuple[dict, list[dict]]:
    """Results of the stage test on a file of tests, and the lines of its records."""
    (tmp_path / "test_it.py").write_text(text)
    monkeypatch.setattr(suite, "TOY_SELECTIONS", {"cpu": (str(tmp_path / "test_it.py"), "-p", "no:randomly")})
    session = Session(tmp_path / "out", dry=True)
    session.records.append(device="cpu")
    suite.test(session)
    results = session.records.results()
    return {case.rpartition(":")[2]: result for (_, case), result in results.items()}, session.records.lines()


def test_a_test_that_ends_its_process(tmp_path, monkeypatch):
    """It fails, and the tests behind it run in a process of their own."""
    results, _ = run_tests(tmp_path, monkeypatch, CRASHES)
    outcomes = {name: result.get("outcome") for name, result in results.items()}
    assert outcomes.pop("cpu") is None
    assert outcomes == {
        "test_before": "passed",
        "test_that_ends_the_process": "failed",
        "test_after": "passed",
        "test_wrong": "failed",
        "test_skipped": "skipped",
    }
    assert results["test_that_ends_the_process"]["failure"] == "the process ended with status 3 in this test"
    assert "1 == 2" in results["test_wrong"]["failure"] and "not here" in results["test_skipped"]["why"]
    counts = results["cpu"]
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 2, 1)
    assert counts["failure"] == "2 of 5 tests failed"


def test_tests_behind_a_lost_gpu_run_in_another_process(tmp_path, monkeypatch):
    results, lines = run_tests(tmp_path, monkeypatch, LOSES_THE_GPU)
    assert results["test_wrong"]["outcome"] == "failed" and results["test_after"]["outcome"] == "passed"
    assert sum(line.get("begun", False) and "test_after" in line["case"] for line in lines) == 1


@pytest.mark.parametrize("stage", ["smoke", "bench"])
def test_what_fails_runs_again_when_asked(tmp_path, stage):
    check = Rehearsal(tmp_path)
    check.records.path.parent.mkdir()
    case = next(iter({"smoke": smoke, "bench": bench}[stage].jobs("cpu")))
    check.records.end(stage, case, 1.0, {"failure": "was broken"})
    status, _ = check.run("--resume", "--stages", stage)
    assert status == FAILED and check.times_ended((stage, case)) == 1
    status, printed = check.run("--retry", "--stages", stage)
    assert status == 0, printed
    assert "failure" not in check.results()[stage, case]
