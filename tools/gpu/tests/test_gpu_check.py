"""`make gpu-check` end to end, with the device faked: what a machine with a GPU will run first must not fail there."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import harness, peers
from benchmarks.cases import Case, Inputs
from tools.gpu import check

ROOT = Path(__file__).resolve().parents[3]
CASE = Case("small", B=2, H=2, Hk=1, S=4, P=16, D=16, segments=2)
TEST = """
import torch

def test_passes():
    assert torch.ones(1).item() == 1

def test_other():
    assert {answer} == 42
"""


INTERPRETED = """
import sys
from tools.gpu import check
sys.exit(check.main())
"""


@pytest.fixture(autouse=True)
def restored_ceiling(monkeypatch):
    """--toy makes the ceilings small for the whole process."""
    monkeypatch.setattr(harness.MatrixProduct, "SIZES", harness.MatrixProduct.SIZES)
    monkeypatch.setattr(harness.MatrixProduct, "LAP", harness.MatrixProduct.LAP)


def read(out):
    return json.loads((out / "gpu_check.json").read_text())["results"], (out / "gpu_check.md").read_text()


def small_run(tmp_path, *more, answer=42):
    """main() on one toy case, with a test file of its own."""
    (tmp_path / "test_one.py").write_text(TEST.format(answer=answer))
    arguments = ["--device", "cpu", "--toy", "--seconds", "0", "--out", str(tmp_path / "out"), "--workers", "1"]
    arguments += ["--tests", str(tmp_path / "test_one.py"), "--only", "toy decoding", "--peers", "sdpa", *more]
    return check.main(arguments), *read(tmp_path / "out")


def test_the_whole_run_under_the_interpreter(tmp_path):
    """The Triton kernels in Triton's interpreter stand in for a GPU: tests, ceilings, cases, peers, report."""
    command = [sys.executable, "-c", INTERPRETED, "--device", "cpu", "--backend", "triton", "--toy"]
    command += ["--seconds", "0", "--workers", "1", "--out", str(tmp_path), "--peers", "eager", "sdpa", "flash"]
    command += ["--tests", "tools/gpu/tests/test_architectures.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record, markdown = read(tmp_path)
    assert record["failures"] == [] and "**passed**" in markdown
    assert record["tests"]["tests"] > 0 and record["tests"]["failed"] == []
    assert record["machine"]["versions"]["triton"] and record["machine"]["backends"]["triton"] is None
    assert record["ceilings"]["copy"] > 0 and record["ceilings"]["matmul"]["torch.float32"] > 0
    assert [result["name"] for result in record["results"]] == ["toy", "toy, bf16", "toy decoding"]
    for result in record["results"]:
        assert result["same_bits"] is True
        assert result["entries"]["flash"] == {"reason": "flash-attn is not installed"}
        for name in ("ctkernels", "eager", "sdpa"):
            assert result["entries"][name]["error"] > 0
        for phase, rates in result["phases"].items():
            seconds = result["entries"]["ctkernels"]["times"][phase]["median"]
            assert rates["flops_per_second"] == pytest.approx(result["flops"][phase] / seconds)
            assert 0 < rates["share_of_copy"] == pytest.approx(rates["bytes_per_second"] / record["ceilings"]["copy"])
    assert record["results"][0]["phases"].keys() == {"forward", "backward", "both"}
    assert record["results"][2]["phases"].keys() == {"forward"}  # decoding
    for phase in ("both", "forward", "backward"):
        assert f"**{phase}**" in markdown
    assert "flash-attn is not installed" in markdown


def test_a_run_that_passes(tmp_path):
    status, record, markdown = small_run(tmp_path)
    assert status == 0 and "**passed**" in markdown
    assert record["tests"]["tests"] == 2 and record["tests"]["exit"] == 0


def test_a_failing_test_fails_the_run_and_the_rest_is_still_measured(tmp_path):
    status, record, markdown = small_run(tmp_path, answer=41)
    assert status == 1 and "**FAILED**" in markdown
    assert record["tests"]["failures"] == 1 and record["tests"]["failed"][0].endswith("test_one::test_other")
    assert "test_other" in record["failures"][0] and "test_other" in markdown
    assert record["results"][0]["phases"]["forward"]["flops_per_second"] > 0


def test_a_wrong_result_fails_the_run(tmp_path, monkeypatch):
    right = peers.ours
    monkeypatch.setattr(peers, "ours", lambda x: 1.1 * right(x))
    status, record, markdown = small_run(tmp_path)
    assert status == 1 and "differs from the fp64 reference" in record["failures"][0]
    assert "phases" not in record["results"][0] and "differs from the fp64 reference" in markdown


def test_bits_that_differ_fail_the_run(tmp_path, monkeypatch):
    right, calls = peers.ours, []

    def unsteady(x):
        calls.append(x)
        return right(x) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(peers, "ours", unsteady)
    status, record, _ = small_run(tmp_path)
    assert status == 1 and record["failures"][0].endswith("two runs gave different bits")
    assert record["results"][0]["same_bits"] is False


def test_without_a_gpu_the_reason_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check.main([])
    assert "--device=cuda needs a GPU and a torch with CUDA" in capsys.readouterr().err


def test_the_time_of_the_device_alone_is_that_of_a_replayed_graph(monkeypatch):
    """The CUDA calls in order, on stand-ins: warm up on a side stream, capture once, replay between two events."""
    log = []
    stream = types.SimpleNamespace(wait_stream=lambda other: log.append("wait"))

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        log.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(harness, "timed", lambda work, device: (work(), 4.0))
    right = peers.ours
    monkeypatch.setattr(peers, "ours", lambda x: (log.append("call"), right(x))[1])
    x = Inputs(CASE)
    x.device = "cuda"
    assert check.graph_seconds(x, True) == 4.0 / check.REPLAYS
    assert log == ["wait", *["call"] * 3, "wait", "capture", "call", "replay", *["replay"] * check.REPLAYS]


def test_least_bytes_count_every_tensor_once():
    x = Inputs(CASE)
    out = peers.ours(x)
    sizes = {name: t.numel() * 4 for name, t in {**x.leaves, "out": out}.items()}
    lse = CASE.B * CASE.H * CASE.S * 4
    forward = sum(sizes.values()) + lse
    backward = sum(sizes.values()) + lse + sizes["out"] + sum(n for name, n in sizes.items() if name != "out")
    assert check.least_bytes(CASE, "forward") == forward
    # read: inputs, out, lse and dout; written: gradients of the inputs
    assert check.least_bytes(CASE, "backward") == backward
    assert check.least_bytes(CASE, "both") == forward + backward
