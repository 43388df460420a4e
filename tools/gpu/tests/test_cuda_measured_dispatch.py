"""The measured dispatch file: the faster of two backends in every case, with fakes in the place of both."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import peers
from benchmarks.cases import Case
from ctkernels import dispatch, dispatch_table
from tools.gpu import check
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


def run_gpu_check(tmp_path) -> tuple[int, dict, str]:
    arguments = ["--device", "cpu", "--toy", "--seconds", "0", "--out", str(tmp_path), "--tests", "--peers"]
    status = check.main([*arguments, "--only", "toy decoding"])
    record = json.loads((tmp_path / "gpu_check.json").read_text())["results"]
    return status, record, (tmp_path / "gpu_check.md").read_text()


@pytest.fixture
def small_ceiling(monkeypatch):
    monkeypatch.setattr(check.harness.MatrixProduct, "SIZES", (64,))
    monkeypatch.setattr(check.harness.MatrixProduct, "LAP", 1e-4)


def test_gpu_check_writes_the_file(monkeypatch, tmp_path, small_ceiling):
    monkeypatch.setattr(cuda_dispatch, "refused", lambda device: None)
    status, record, markdown = run_gpu_check(tmp_path)
    assert status == 0 and len(record["dispatch"]) == 4
    assert "**cuda against triton**" in markdown
    assert len(dispatch_table.read(tmp_path / "dispatch.json")) == 4
    assert json.loads((tmp_path / "dispatch.json").read_text())["machine"]["torch"] == torch.__version__


def test_gpu_check_without_a_choice_writes_none(tmp_path, small_ceiling, capsys):
    status, record, markdown = run_gpu_check(tmp_path)
    assert status == 0 and record["dispatch"] == [] and "cuda against triton" not in markdown
    assert not (tmp_path / "dispatch.json").exists()
    assert "no choice between the GPU backends (cuda: it computes on cuda tensors, got cpu" in capsys.readouterr().out


def test_a_failure_while_choosing_fails_the_check_and_the_rest_is_reported(monkeypatch, tmp_path, small_ceiling):
    monkeypatch.setattr(cuda_dispatch, "refused", lambda device: None)

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_dispatch, "measure", broken)
    status, record, _ = run_gpu_check(tmp_path)
    assert status == 1 and any("out of memory" in failure for failure in record["failures"])
    assert record["results"]


def test_a_measurement_covers_every_type_and_head_dimension():
    assert {(case.dtype, case.D) for case in ALL} == {
        (dtype, D) for dtype in dispatch_table.DTYPES for D in dispatch_table.HEAD_DIMENSIONS
    }
