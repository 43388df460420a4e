"""The measured dispatch file: the faster of two backends in every case, with fakes in the place of both."""

from dataclasses import replace

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import Case
from ctkernels import dispatch, dispatch_table
from tools.gpu.check import bench, report
from tools.gpu.check.session import Session
from tools.gpu.cuda import dispatch as cuda_dispatch

ALL = cuda_dispatch.CASES
CASE = Case("toy", B=3, H=4, Hk=2, S=3, P=40, D=64, segments=3)
SECONDS = {  # backend -> forward, backward
    "cuda": {64: (1.0, 4.0), 128: (2.0, 2.0)},
    "triton": {64: (2.0, 3.0), 128: (1.0, 3.0)},
}


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """Both backends available on the CPU, computed by the CPU kernels, with times of their own."""
    measured = cuda_dispatch.run_once

    def run_once(name, x, dout):
        backend, x.backend = x.backend, "cpu"
        try:
            values, _ = measured(name, x, dout)
        finally:
            x.backend = backend
        forward, backward = SECONDS[backend][x.case.D]
        return values, {"forward": forward, "backward": backward, "both": forward + backward}

    monkeypatch.setattr(cuda_dispatch, "run_once", run_once)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(cuda_dispatch, "CASES", (CASE, replace(CASE, D=128)))
    yield
    dispatch_table._rows = None
    dispatch_table.pick.cache_clear()


def test_the_faster_one_by_direction_and_what_the_dispatcher_makes_of_it(tmp_path):
    rows, failures = cuda_dispatch.measure("cpu", 0.0, cuda_dispatch.CASES)
    assert failures == []
    expected = {
        (64, "forward"): "cuda",
        (64, "backward"): "triton",
        (128, "forward"): "triton",
        (128, "backward"): "cuda",
    }
    assert {(row["head_dim"], row["direction"]): row["backend"] for row in rows} == expected
    assert rows[0]["seconds"] == {"cuda": 1.0, "triton": 2.0} and rows[0]["dtype"] == "fp32"
    cuda_dispatch.write(tmp_path / "dispatch.json", {"gpu": "H100"}, rows)
    dispatch_table.use(tmp_path / "dispatch.json")
    for (head_dim, direction), name in expected.items():
        assert dispatch_table.pick("sm_90", torch.float32, head_dim, direction) == name
    text = cuda_dispatch.markdown(rows)
    assert "| fp32 | 64 | **1000.000** | 2000.000 | 4000.000 | **3000.000** |" in text


@pytest.mark.parametrize("wrong", ["cuda", "triton"])
def test_a_backend_whose_results_are_wrong_loses(monkeypatch, wrong):
    asked, right = [], peers.check

    def check(name, values, expected, dtype):
        asked.append(name)
        if len(asked) % 2 == (1 if wrong == "cuda" else 0):
            raise ArithmeticError("dq differs")
        return right(name, values, expected, dtype)

    monkeypatch.setattr(peers, "check", check)
    rows, failures = cuda_dispatch.measure("cpu", 0.0, (CASE,))
    assert {row["backend"] for row in rows} == {"triton" if wrong == "cuda" else "cuda"}
    (failure,) = failures
    assert failure.startswith(f"{wrong}, ") and "dq differs" in failure
    assert "| failed |" in cuda_dispatch.markdown(rows)


def test_nothing_is_written_where_both_are_wrong(monkeypatch):
    def check(*_):
        raise ArithmeticError("dq differs")

    monkeypatch.setattr(peers, "check", check)
    rows, failures = cuda_dispatch.measure("cpu", 0.0, (CASE,))
    assert rows == [] and len(failures) == 2


def test_gpu_check_writes_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_dispatch, "refused", lambda device: None)
    session = Session(tmp_path)
    for case in cuda_dispatch.CASES:
        session.records.end("bench", f"dispatch: {case.sizes}", 1.0, bench.choose(case, "cpu"))
    assert report.write(session, [])["failures"] == []
    assert "## cuda against triton" in (tmp_path / report.MARKDOWN).read_text()
    assert len(dispatch_table.read(tmp_path / "dispatch.json")) == 4


def test_a_wrong_backend_is_a_failure_of_its_case(monkeypatch):
    monkeypatch.setattr(cuda_dispatch, "refused", lambda device: None)
    asked, right = [], peers.check

    def check(name, *more):
        asked.append(name)
        if name == "cuda":
            raise ArithmeticError("dq differs")
        return right(name, *more)

    monkeypatch.setattr(peers, "check", check)
    found = bench.choose(CASE, "cpu")
    assert asked == ["cuda", "triton"] and "dq differs" in found["failure"]
    assert {row["backend"] for row in found["rows"]} == {"triton"}


def test_a_measurement_covers_every_type_and_head_dimension():
    assert {(case.dtype, case.D) for case in ALL} == {
        (dtype, D) for dtype in dispatch_table.DTYPES for D in dispatch_table.HEAD_DIMENSIONS
    }
