"""Parts of `tools.gpu.check`, with stand-ins for the GPU and its tools: what a machine with a GPU runs first must not
fail there. The whole of it runs in `test_gpu_check_dry.py` and `whole_check.py`."""

import contextlib
import itertools
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import harness, peers
from benchmarks.cases import Case, Inputs
from tools.gpu.check import __main__ as command
from tools.gpu.check import bench, build, probe, report, smoke, timing, watched
from tools.gpu.check.records import Records
from tools.gpu.check.session import Ended, Session

ROOT = Path(__file__).resolve().parents[3]
CASE = Case("small", B=2, H=2, Hk=1, S=4, P=16, D=16, segments=2)
# a worker without torch: its cases end well, end the process, hang, and end well
WORKER = """
import os, sys, time
from pathlib import Path
from tools.gpu.check.records import Records

records, done = Records(Path(sys.argv[1])), None
records.plan("smoke", ["right", "wrong", "crash", "hang", "last"])
for case in ["right", "wrong", "crash", "hang", "last"]:
    if ("smoke", case) in records.results():
        continue
    records.begin("smoke", case)
    if case == "crash":
        print("about to go")
        os.abort()
    if case == "hang":
        time.sleep(1000)
    records.end("smoke", case, 0.1, {"failure": "not equal"} if case == "wrong" else {"error": 1e-3})
"""


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "records.jsonl")


def test_records_outlive_their_writer(records):
    records.plan("bench", ["a", "b", "c"])
    with records.case("bench", "a") as result:
        result["x"] = 1
    with pytest.raises(ZeroDivisionError), records.case("bench", "b"):
        raise ZeroDivisionError
    with records.path.open("a") as file:
        file.write('{"stage": "bench", "case": "c", "se')  # killed
    records.begin("bench", "c")  # on a line of its own
    assert [key for key, result in records.results().items()] == [("bench", "a")]
    assert records.results()["bench", "a"]["x"] == 1
    assert records.unfinished() == [("bench", "b"), ("bench", "c")] and records.missing("bench") == ["b", "c"]
    assert records.missing("train") is None
    records.end("bench", "b", 1.0, {"failure": "wrong"})
    records.append(ran=["bench"], seconds=1.0, cpu_seconds=1.0)
    records.forget(["bench"], failed_only=True)
    assert records.missing("bench") == ["b", "c"] and ("bench", "a") in records.results()
    records.end("smoke", "s", 1.0, {})
    records.forget(["bench"])
    assert list(records.results()) == [("smoke", "s")] and records.plans() == {}
    assert not any("ran" in line for line in records.lines())


@pytest.fixture
def fake_worker(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(command, "WORKER", (str(script),))


def run_smoke(tmp_path, *words: str) -> int:
    return command.main(["--dry", "--stages", "smoke", "--out", str(tmp_path / "out"), *words])


def test_a_case_that_ends_or_hangs_its_process_fails_alone(fake_worker, tmp_path, capsys):
    assert run_smoke(tmp_path, "--quiet-limit", "6") == command.FAILED
    results = Records(tmp_path / "out" / "gpu_check.jsonl").results()
    assert [case for _, case in results] == ["right", "wrong", "crash", "hang", "last"]
    failed = {case: result["failure"] for (_, case), result in results.items() if "failure" in result}
    assert failed.keys() == {"wrong", "crash", "hang"}
    assert failed["crash"].startswith("the process was ended by SIGABRT: about to go")
    assert failed["hang"].startswith("no result within 6 s")
    printed = capsys.readouterr().out
    assert "[smoke] right: done (0.1 s)" in printed and "**FAILED**\n" not in printed.splitlines()
    assert "- smoke: wrong: not equal" in printed


def test_a_deadline_ends_the_case_that_runs(fake_worker, tmp_path):
    out = Records(tmp_path / "out" / "gpu_check.jsonl")
    out.path.parent.mkdir()
    for case in ("right", "wrong", "crash"):
        out.end("smoke", case, 0.1, {})
    assert run_smoke(tmp_path, "--resume", "--deadline", "4") == command.OUT_OF_TIME
    assert ("smoke", "hang") in out.unfinished()  # which is no failure
    summary = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert summary["failures"] == [] and summary["missing"] == {"smoke": ["hang", "last"]}


def test_a_worker_that_does_not_start_fails_the_stage(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "WORKER", ("-c", "raise ImportError('no such torch')"))
    assert run_smoke(tmp_path) == command.FAILED
    (failure,) = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["failures"]
    assert failure.startswith("smoke: start: the process ended with status 1") and "no such torch" in failure


def test_without_a_gpu_the_reason_is_told(monkeypatch, tmp_path, capsys):
    assert not torch.cuda.is_available()
    monkeypatch.setattr(command, "WORKER", ("-c", "import sys; print('torch 1 finds no GPU'); sys.exit(71)"))
    assert command.main(["--stages", "smoke", "--out", str(tmp_path)]) == command.USAGE
    assert "error: torch 1 finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [(["--deadline", "0"], "--deadline must be positive"), (["x"], "unrecognized")])
def test_wrong_usage(words, told, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--dry", "--out", str(tmp_path), *words])
    assert told in capsys.readouterr().err


def test_results_of_two_devices_are_not_mixed(fake_worker, tmp_path, capsys):
    run_smoke(tmp_path, "--deadline", "0.2")
    Records(tmp_path / "out" / "gpu_check.jsonl").plan("bench", ["a"])
    with pytest.raises(SystemExit):
        command.main(["--resume", "--out", str(tmp_path / "out")])
    assert "holds results of cpu, this is cuda" in capsys.readouterr().err


def test_one_check_at_a_time(tmp_path, capsys):
    with command.locked(tmp_path) as free:
        assert free
        with pytest.raises(SystemExit):
            command.main(["--dry", "--out", str(tmp_path)])
    assert "another check is writing" in capsys.readouterr().err


def test_children_have_no_network_and_no_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = Session(tmp_path).environment({"X": "1"})
    assert "TRITON_INTERPRET" not in found and found["X"] == found["HF_HUB_OFFLINE"] == "1"
    assert found["PYTHONPATH"].split(":")[0] == str(ROOT)


@pytest.mark.parametrize("words", [["PYTHON=python3"], []])
def test_make_takes_the_python_that_is_given(words, monkeypatch):
    monkeypatch.delenv("PYTHON", raising=False)
    options = ["STAGES=build smoke", "DEADLINE=540", "RESUME=1"]
    told = subprocess.run(["make", "-n", "gpu-check", *words, *options], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    line = " ".join(told.stdout.replace("\\\n", " ").split("-m tools.gpu.check")[-1].split())
    assert line.startswith("--out runs/gpu-check --stages build smoke --deadline 540 --resume")
    assert (".venv" in told.stdout) == (not words) and ("python3 -m tools.gpu.check" in told.stdout) == bool(words)


# The stage build, on a folder in the place of the package


@pytest.fixture
def package(monkeypatch, tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(build, "PACKAGE", folder)
    monkeypatch.setattr(build, "STAMP", tmp_path / "stamp.json")
    return folder


MACHINE = {"cpu": "x", "cores": 2, "load": 0.5, "date": "today", "python": "3.12", "versions": {}, "backends": {}}


@pytest.fixture
def builder(monkeypatch, package):
    """What loads are files that say "good"; compiling writes one."""
    calls = []

    def loads(session):
        found = {name: path.read_text() for name, path in build.extensions(package).items()}
        works = found.get("_C") == "good"
        return {"works": works, "why": "" if works else f"{found or 'nothing'} does not load", "machine": MACHINE}

    def run(session, words, env=None, hangs=True, folder=None):
        assert (folder / words[1]).exists() and not (folder / "pyproject.toml").exists()
        calls.append((words[1:], env))
        (package / f"_C{build.EXTENSION_SUFFIXES[0]}").write_text("good")
        return 0, ""

    monkeypatch.setattr(build, "probe", loads)
    monkeypatch.setattr(Session, "run", run)
    return calls


def extension(folder: Path, text: str) -> Path:
    path = folder / f"_C{build.EXTENSION_SUFFIXES[0]}"
    path.write_text(text)
    return path


def built(tmp_path, **options) -> dict:
    session = Session(tmp_path / "out", dry=True, **options)
    build.build(session)
    return session.records.results()["build", "extensions"]


def test_extensions_that_load_are_used(tmp_path, package, builder):
    extension(package, "good")
    result = built(tmp_path)
    assert result == {"how": "in place", "sources": "unknown", "seconds": result["seconds"]} and builder == []
    report.write(Session(tmp_path / "out", dry=True), [])
    assert "whether from these sources is not known" in (tmp_path / "out" / report.MARKDOWN).read_text()


@pytest.mark.parametrize("there", [None, "of another torch"])
def test_else_they_are_compiled_and_kept(tmp_path, package, builder, there):
    if there is not None:
        extension(package, there)
    result = built(tmp_path)
    assert result["how"] == "compiled" and result["sources"] == build.digest()
    assert builder[0][0] == ["setup.py", "--quiet", "build_ext", "--inplace"]
    assert builder[0][1]["CTKERNELS_CUDA"] == "0" and int(builder[0][1]["MAX_JOBS"]) >= 1
    (kept,) = build.extensions(tmp_path / "out").values()
    assert kept.read_text() == "good"
    assert built(tmp_path / "again")["how"] == "in place" and len(builder) == 1  # known to be of these sources


def test_extensions_of_other_sources_are_not_used(tmp_path, package, builder, monkeypatch):
    extension(package, "good")
    build.write_stamp("other")
    result = built(tmp_path)
    assert result["how"] == "compiled" and "built from other sources (other" in result["refused"][0]


def test_prebuilt_extensions_are_used_if_they_load(tmp_path, package, builder):
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    extension(folder, "good")
    assert built(tmp_path, prebuilt=folder)["how"].startswith("prebuilt in") and builder == []
    extension(folder, "bad")
    extension(package, "bad")
    result = built(tmp_path / "again", prebuilt=folder)
    assert result["how"] == "compiled" and "does not load" in result["refused"][1]
    (folder / build.SUMMARY).write_text('{"sources": "other"}')
    extension(folder, "good")
    extension(package, "bad")
    result = built(tmp_path / "third", prebuilt=folder)
    assert result["how"] == "compiled" and "built from other sources" in result["refused"][1]


def test_extensions_that_load_must_compute(monkeypatch):
    """Those of older sources load, and their operators take other arguments."""
    assert probe.describe("cpu")["extensions"] == {"_C": None}
    monkeypatch.setattr(peers, "ours", lambda x: torch.ones(()).view(2))
    assert probe.describe("cpu")["extensions"]["_C"].startswith("RuntimeError: shape '[2]' is invalid")


def test_a_build_that_fails_is_told(tmp_path, package, builder, monkeypatch):
    monkeypatch.setattr(Session, "run", lambda *_, **__: (1, "mma.cuh(7): error: no\nninja: build stopped"))
    assert built(tmp_path)["failure"] == "the build failed: status 1: mma.cuh(7): error: no / ninja: build stopped"


def test_nothing_runs_behind_a_build_that_failed(tmp_path, package, builder, monkeypatch):
    monkeypatch.setattr(Session, "run", lambda *_, **__: (1, "no"))
    assert command.main(["--dry", "--out", str(tmp_path / "out"), "--stages", "build", "smoke"]) == command.FAILED
    summary = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert list(summary["results"]) == ["build"] and summary["missing"] == {"smoke": None}
    assert summary["machine"] == MACHINE  # which is known all the same


def test_a_build_that_is_stopped_leaves_no_result(tmp_path, package, builder, monkeypatch):
    def ended(*_, **__):
        raise Ended

    monkeypatch.setattr(Session, "run", ended)
    session = Session(tmp_path / "out", dry=True)
    with pytest.raises(Ended):
        build.build(session)
    assert session.records.missing("build") == ["extensions", "machine"]


# The stages in the worker


def test_a_wrong_result_and_other_bits_are_failures(monkeypatch):
    right, calls = peers.ours, []
    monkeypatch.setattr(peers, "ours", lambda x: 1.1 * right(x))
    for run in (smoke.check, lambda case, device, name: bench.ours(case, name, device)):
        with pytest.raises(ArithmeticError, match="differs from the fp64 reference"):
            run(CASE, "cpu", "cpu")

    def unsteady(x):
        calls.append(x)
        return right(x) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(peers, "ours", unsteady)
    for run in (smoke.check, lambda case, device, name: bench.ours(case, name, device)):
        with pytest.raises(ArithmeticError, match="two runs gave different bits"):
            run(CASE, "cpu", "cpu")


def test_a_backend_that_is_not_there_is_a_failure():
    assert smoke.check(CASE, "cpu", "cuda")["failure"].startswith("cuda is not available: it computes on cuda tensors")
    assert bench.ours(CASE, "triton", "cpu")["failure"].startswith("triton is not available")
    assert "no choice between the GPU backends" in bench.choose(CASE, "cpu")["reason"]


def test_flex_is_compiled_once_for_problems_of_one_shape(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(peers, "COMPILER", counter)
    peers.compile_once.cache_clear()
    compiled = []
    forward = replace(CASE, past=2)  # the only pass that it has on the CPU
    for case in (forward, replace(forward, name="other mask", drop_p=0.4), replace(forward, S=5)):
        assert bench.peer(case, "flex", "cpu")["error"] < 1e-5
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 2]
    peers.compile_once.cache_clear()
    torch._dynamo.reset()


def test_cases_of_one_shape_follow_one_another():
    jobs = [case for case in bench.jobs("cuda") if case.startswith("flex: ")]
    cases = {bench.key(case, "flex"): bench.shape(case) for case in bench.CASES}
    shapes = [cases[job] for job in jobs]
    assert len(jobs) == len(bench.CASES)
    assert sum(a != b for a, b in itertools.pairwise(shapes)) == len(set(shapes)) - 1


@pytest.fixture
def fake_gpu(monkeypatch):
    """The calls of torch.cuda that a capture needs, on stand-ins that note what happens."""
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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return log


def test_a_capture_warms_up_on_a_side_stream(fake_gpu):
    timing.capture(lambda: fake_gpu.append("call"))
    assert fake_gpu == ["wait", *["call"] * 3, "wait", "capture", "call", "replay"]


def test_device_time_warm_and_cold(monkeypatch):
    """Warm: many replays between two events. Cold: one, and before each the L2 cache is overwritten."""
    log = []
    monkeypatch.setattr(
        harness, "timed", lambda work, device: (log.append("begin"), work(), log.append("end"), 2e-3)[2:]
    )
    empty = torch.empty
    flush = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: flush if kw.get("dtype") == torch.uint8 else empty(*size))
    found = timing.replayed(lambda: log.append("replay"), "cuda")
    assert found == {"warm_us": pytest.approx(2e3 / timing.WARM_REPLAYS), "cold_us": pytest.approx(2e3)}
    rounds = timing.ROUNDS + 1  # the first does not count
    warm = ["begin", *["replay"] * timing.WARM_REPLAYS, "end"] * rounds
    assert log == warm + ["flush", "begin", "replay", "end"] * rounds


def test_what_cannot_be_captured_is_timed_eagerly(fake_gpu, monkeypatch):
    def broken(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "capture", broken)
    monkeypatch.setattr(timing, "profiled", lambda call: {"launches": 7})
    monkeypatch.setattr(timing, "spread", lambda work, device, rounds, before=None: 1.0)
    found = timing.measure(lambda: None, "cuda")
    assert "not permitted" in found["graph_error"] and found["eager_us"] == 1.0 and found["launches"] == 7
    assert "warm_us" not in found


def test_least_bytes_count_every_tensor_once():
    x = Inputs(CASE)
    out = peers.ours(x)
    sizes = {name: t.numel() * 4 for name, t in {**x.leaves, "out": out}.items()}
    lse = CASE.B * CASE.H * CASE.S * 4
    forward = sum(sizes.values()) + lse
    backward = sum(sizes.values()) + lse + sizes["out"] + sum(n for name, n in sizes.items() if name != "out")
    assert bench.least_bytes(CASE, "forward") == forward
    # read: inputs, out, lse and dout; written: gradients of the inputs
    assert bench.least_bytes(CASE, "backward") == backward
    assert bench.least_bytes(CASE, "both") == forward + backward


def test_both_flash_attentions_get_packed_keys(monkeypatch):
    """Stand-ins that compute by SDPA, row after row: one that wants to know the longest rows, and one that returns a
    tuple."""

    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, causal):
        outs = []
        for b in range(CASE.B):
            rows, keys = slice(*cu_seqlens_q[b : b + 2].tolist()), slice(*cu_seqlens_k[b : b + 2].tolist())
            length, size = rows.stop - rows.start, keys.stop - keys.start
            seen = torch.ones(length, size, dtype=torch.bool).tril(size - length)
            heads = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
            out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def second(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert max_seqlen_q == CASE.S and max_seqlen_k == int(cu_seqlens_k.diff().max())
        return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, causal)

    def fourth(q, k, v, cu_seqlens_q, cu_seqlens_k, causal):
        return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, causal), None

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    package.flash_attn_varlen_func, cute.flash_attn_varlen_func = second, fourth
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    for name in ("flash", "flash4"):
        assert bench.peer(CASE, name, "cpu")["error"] < 1e-5


# What other programs print

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void ctk_forward<64>(Params)+0x1230
========= ERROR SUMMARY: {} error{}
"""
RACECHECK = "========= RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)\n"
NCU = """==PROF== Connected to process 1
[1] python3.12@127.0.0.1
  void ctk_forward<(int)64, float>(Params) (256, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    DRAM Throughput                   %         3.21
    Duration                         us        41.50
    Section: Occupancy
    Achieved Occupancy                %        24.8
  dq_kernel (384, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us        60.00
"""


def watch(monkeypatch, tmp_path, run) -> Session:
    monkeypatch.setattr(watched.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(Session, "run", lambda self, words, env=None, hangs=True: run(words))
    return Session(tmp_path / "out")


def test_sanitizers_are_counted(monkeypatch, tmp_path):
    asked = []

    def run(words):
        asked.append(words)
        tool = words[words.index("--tool") + 1]
        return {
            "memcheck": (0, MEMCHECK.format(0, "s")),
            "synccheck": (1, MEMCHECK.format(3, "s")),
            "racecheck": (0, RACECHECK.format(0)),
            "initcheck": (127, "unknown option"),
        }[tool]

    session = watch(monkeypatch, tmp_path, run)
    watched.sanitize(session)
    results = {case: result for (_, case), result in session.records.results().items()}
    assert results["memcheck cuda"]["errors"] == results["racecheck triton"]["errors"] == 0
    assert "3 errors" in results["synccheck cuda"]["failure"] and "ctk_forward" in results["synccheck cuda"]["failure"]
    assert "without a summary: unknown option" in results["initcheck cuda"]["failure"]
    assert len(asked) == 6 and asked[0][-6:] == ["cuda", "cuda", "bf16", "2", "320", "1"]
    watched.sanitize(session)
    assert len(asked) == 6  # all have a result


def test_profiles_are_read(monkeypatch, tmp_path):
    def run(words):
        if "-o" in words:
            Path(words[words.index("-o") + 1] + ".ncu-rep").write_bytes(b"0")
            return 0, "==PROF== done"
        return (0, NCU) if "triton" not in words else (1, "ERR_NVGPUCTRPERM: no permission")

    session = watch(monkeypatch, tmp_path, run)
    watched.profile(session)
    results = {case: result for (_, case), result in session.records.results().items()}
    first, second = results["cuda B=16 P=1024"]["kernels"]
    assert first["kernel"].startswith("void ctk_forward<") and first["Duration"] == "41.50"
    assert first["Achieved Occupancy"] == "24.8" and first["DRAM Throughput"] == "3.21"
    assert second == {"kernel": "dq_kernel", "Duration": "60.00"}
    assert "ERR_NVGPUCTRPERM" in results["triton B=16 P=1024"]["failure"]
    summary = report.write(session, ["profile"])
    assert len(summary["failures"]) == 1 and "41.50" in (session.out / report.MARKDOWN).read_text()


def test_missing_tools_are_failures(monkeypatch, tmp_path):
    monkeypatch.setattr(watched.shutil, "which", lambda name: None)
    session = Session(tmp_path / "out")
    watched.sanitize(session)
    watched.profile(session)
    told = {result["failure"] for result in session.records.results().values()}
    assert told == {"compute-sanitizer is not on PATH", "ncu is not on PATH"}


# The report


def test_steps_must_agree(tmp_path):
    session = Session(tmp_path, dry=True)
    for case, loss, norm in (
        ("P=24 authors' loop", 3.5, 0.1),
        ("P=24 eager (cpu)", 3.5, 0.1),
        ("P=24 graph (cpu)", 3.5, 0.2),
    ):
        session.records.end("train", case, 1.0, {"loss": loss, "grad_norm": norm, "step_ms": 1.0})
    (failure,) = report.write(session, [])["failures"]
    assert failure == "train: P=24 graph (cpu): grad_norm 0.2 is not that of P=24 authors' loop, 0.1"


def test_predictions_stand_beside_measurements(tmp_path):
    session = Session(tmp_path)
    times = {
        "warm_us": 120.0,
        "cold_us": 150.0,
        "host_us": 300.0,
        "eager_us": 310.0,
        "launches": 9,
        "graph_launches": 7,
    }
    result = {"error": 1e-3, "forward": times, "both": {**times, "warm_us": 240.0}, "predicted_us": {"both": 101.0}}
    flops = {"flops": {"forward": 1e9, "both": 2.4e9}}
    session.records.end("bench", "cuda: x (D=64, bfloat16)", 1.0, {**result, **flops, "on": "NVIDIA H100"})
    session.records.end("bench", "sdpa: x (D=64, bfloat16)", 1.0, {**result, "both": times, "on": "NVIDIA H200"})
    predicted = {"attention": 1.6, "step": 8.2}
    step = {"loss": 1.0, "grad_norm": 1.0, "step_ms": 9.1, "predicted_ms": predicted, "device_us": 8000.0}
    session.records.end("train", "P=1024 graph (cuda)", 1.0, step)
    report.write(session, [])
    text = (session.out / report.MARKDOWN).read_text()
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| x")}
    assert "| 240.0 | 150.0 | 101.0 | 300.0 | 9/7 | 310.0 | 1.00 | 10.00 |" in lines["cuda"]
    assert "| 0.50 | 20.00 |" in lines["sdpa"]
    assert "| P=1024 graph (cuda) | 9.10 |  | 8.00 | 8.20 | attention 1.60 |" in text
    assert "**Results of different devices: NVIDIA H100, NVIDIA H200**" in text


def test_files_stay_few_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_BYTES", 1000)
    monkeypatch.setattr(report, "LOG_BYTES", 100)
    session = Session(tmp_path)
    (tmp_path / report.LOG).write_text("x" * 5000 + "the end")
    (tmp_path / report.REPORT).write_bytes(b"0" * 2000)
    rows = [{"dtype": "bf16", "head_dim": 64, "direction": "forward", "backend": "cuda", "seconds": {"cuda": 1.0}}]
    session.records.end("bench", "dispatch: D=64", 1.0, {"rows": rows})
    report.write(session, [])
    left = {path.name: path for path in tmp_path.iterdir()}
    assert left.keys() == {"gpu_check.jsonl", "gpu_check.json", "gpu_check.md", "log.txt", "dispatch.json"}
    assert left["log.txt"].stat().st_size < 200 and left["log.txt"].read_text().endswith("the end")
    assert json.loads(left["dispatch.json"].read_text())["rows"] == rows
    assert len(report.FILES) + len(("_C", "_cuda")) <= 8
