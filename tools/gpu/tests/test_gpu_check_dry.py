"""The check of a GPU machine, rehearsed on the CPU: real commands, killed, resumed, and stopped by a deadline."""

from __future__ import annotations

import json

from tools.gpu.check import bench, smoke, train
from tools.gpu.check.__main__ import OUT_OF_TIME
from tools.gpu.tests.rehearsal import Rehearsal


def test_killed_in_the_middle_of_a_stage_and_resumed(tmp_path):
    """bench and train, which need the most of what a machine has; all stages: `make gpu-check-dry`."""
    check = Rehearsal(tmp_path)
    before = check.kill_after("bench", 3, "--stages", "bench", "train")
    assert ("bench", "ceilings") in before and not any(stage == "train" for stage, _ in before)
    with check.records.path.open("a") as file:
        file.write('{"stage": "bench", "case": "half a li')  # as a full disk leaves it

    compiled = next(case for case in train.jobs("cpu") if "compiled" in case)  # slow: that one runs in whole_check.py
    check.records.end("train", compiled, 1.0, {"reason": "left out"})

    status, printed = check.run("--resume", "--stages", "bench", "train")
    assert status == 0, printed
    results = check.results()
    assert all(check.times_ended(key) == 1 for key in results)  # what was there was not run again
    assert before.items() <= results.items()
    assert {case for stage, case in results if stage == "bench"} == set(bench.jobs("cpu"))
    steps = {case: result for (stage, case), result in results.items() if stage == "train"}
    assert set(steps) == set(train.jobs("cpu"))
    assert {mode for mode in train.MODES for case in steps if mode in case} == set(train.MODES)
    assert len({round(step["loss"], 4) for case, step in steps.items() if case != compiled}) == 1
    check.check_files()
    summary = json.loads((check.out / "gpu_check.json").read_text())
    assert summary["failures"] == [] and summary["missing"] == {} and summary["dry"]
    report = (check.out / "gpu_check.md").read_text()
    assert "**passed**" in report and "flash-attn is not installed" in report
    for column in ("fwd cold us", "both predicted us", "both host us", "device predicted ms"):
        assert column in report


def test_a_deadline_stops_a_stage(tmp_path):
    check = Rehearsal(tmp_path)
    status, printed = check.run("--stages", "smoke", "train", "--deadline", "0.5")
    assert status == OUT_OF_TIME, printed
    assert "the 0.5 s are over; --resume goes on" in printed and "**not finished**" in printed
    assert len(check.results()) < len(smoke.jobs("cpu"))
    check.check_files()
