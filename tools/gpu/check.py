#!/usr/bin/env python3
"""Everything that there is to know about the op on a GPU, in one run: is it right, and how fast is it.

    python tools/gpu/check.py                          on the CUDA device, about half an hour
    python tools/gpu/check.py --tests tests/op         with fewer tests
    python tools/gpu/check.py --device cpu --toy       the same steps at toy sizes, on any machine

1. The test-suite runs on the device.
2. The device's ceilings are measured: PyTorch's matrix product in each type, and a copy.
3. Each case is checked against the reference in fp64, twice for the same bits, and timed in turn with eager PyTorch,
   SDPA with a mask, FlexAttention with a block mask (compiled) and flash-attn (on gathered keys), as far as they run.
4. Where both GPU backends run, they are timed in turn for every type and head dimension; `dispatch.json` names the
   faster ones, for "auto" to take them: CTKERNELS_DISPATCH=runs/gpu-check/dispatch.json.
5. `gpu_check.json` and `gpu_check.md` tell device, versions, failures, errors, times, and rates as shares of the
   ceilings. Where docs/gpu.md predicts a time for this device, the prediction stands beside.

What fails is reported and the rest still runs. Exit status 1: a test failed, a result was wrong, or a case did not run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for benchmarks/ and tools/, which are not installed

import torch

from benchmarks import harness, peers
from benchmarks.bench_attention import OURS, first_line, measure, ratio
from benchmarks.cases import GEMMA, GPT2_LARGE, HEADLINE, LLAMA, QWEN, SMOLLM2, Case, Inputs
from ctkernels import dispatch
from tools.gpu import model
from tools.gpu.cuda import dispatch as cuda_dispatch

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("eager", "sdpa", "flex", "flash")
PACKAGES = ("torch", "triton", "flash-attn", "numpy", "pytest")
COPY_BYTES = 1 << 30
REPLAYS = 20
BF16 = torch.bfloat16
TRAINING = (
    GPT2_LARGE,
    replace(GPT2_LARGE, name="GPT-2 Large, bf16", dtype=BF16),
    replace(SMOLLM2, dtype=BF16),
    replace(LLAMA, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, token dropout", drop_p=0.05, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, many rows", B=64, dtype=BF16),
    replace(LLAMA, name="Llama-3.2-1B, long prefix", P=16384, dtype=BF16),
    replace(HEADLINE[2], dtype=BF16),
    replace(QWEN, dtype=BF16),
    replace(GEMMA, dtype=BF16),
)
DECODING = (
    replace(LLAMA, name="decoding", B=64, S=1, past=63, P=16384, segments=0, dtype=BF16),
    replace(LLAMA, name="decoding, one row", B=1, S=1, past=63, P=65536, segments=0, dtype=BF16),
)
TOY = Case("toy", B=3, H=4, Hk=2, S=3, P=40, D=16, segments=3)
TOYS = (
    (TOY, replace(TOY, name="toy, bf16", drop_p=0.2, dtype=BF16)),
    (replace(TOY, name="toy decoding", S=1, past=5),),
)


def least_bytes(case: Case, phase: str) -> int:
    """Bytes that a phase reads and writes at least: every tensor once, nothing twice."""
    rows = case.B * case.H * case.S * case.D * case.dtype.itemsize  # q, out and their gradients
    own = 2 * case.B * case.Hk * case.T * case.D * case.dtype.itemsize
    prefix = 2 * case.G * case.Hk * case.P * case.D * case.dtype.itemsize
    lse = 4 * case.B * case.H * case.S
    forward = 2 * rows + own + prefix + lse
    backward = 4 * rows + 2 * own + 2 * prefix + lse
    return {"forward": forward, "backward": backward, "both": forward + backward}[phase]


def describe_device(device: str) -> dict[str, Any]:
    """`harness.describe_machine`, the versions of all packages that matter, and the GPU's own data."""
    info = harness.describe_machine(device)
    info["versions"] = {name: installed(name) for name in PACKAGES}
    info["backends"] = dispatch.availability()
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "capability": torch.cuda.get_device_capability(device),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": query_driver(),
        }
    return info


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def query_driver() -> str | None:
    """Driver version, power limit and clocks, as nvidia-smi tells them."""
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_tests(selection: Sequence[str], workers: int, out: Path) -> dict[str, Any]:
    """Run pytest in processes of its own: what it counted, which tests failed, its exit status and seconds."""
    out.mkdir(parents=True, exist_ok=True)
    report = out.resolve() / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *selection]
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = {"command": command[1:], "exit": done.returncode, "seconds": time.perf_counter() - started}
    (out / "tests.log").write_text(done.stdout + done.stderr)
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed = []
    if report.exists():
        root = ElementTree.parse(report).getroot()
        for suite in root.iter("testsuite"):
            counts = {name: n + int(suite.get(name, 0)) for name, n in counts.items()}
        for test in root.iter("testcase"):
            if test.find("failure") is not None or test.find("error") is not None:
                failed.append(f"{test.get('classname')}::{test.get('name')}")
    return result | counts | {"failed": failed, "tail": (done.stdout + done.stderr).strip().splitlines()[-5:]}


def copy_rate(device: str, size: int) -> float:
    """Bytes per second that a copy reads and writes together, the best of ten."""
    source = torch.ones(max(1, size // 4), device=device)
    target = torch.empty_like(source)
    seconds = min(harness.timed(lambda: target.copy_(source), device)[1] for _ in range(10))
    return 2 * source.numel() * source.element_size() / seconds


def same_bits(x: Inputs, backward: bool) -> bool:
    """Whether two calls of ours give the same bits, gradients included."""
    x.require_grad(backward)
    first, second = (peers.results(peers.ours(x), x, x.dout if backward else None) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def graph_seconds(x: Inputs, backward: bool) -> float | None:
    """Seconds of the device alone: our call, replayed from a CUDA graph, without Python between the kernels."""
    if torch.device(x.device).type != "cuda":
        return None
    x.require_grad(backward)

    def call() -> None:
        peers.results(peers.ours(x), x, x.dout if backward else None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up where nothing is captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return harness.timed(lambda: [graph.replay() for _ in range(REPLAYS)], x.device)[1] / REPLAYS


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns and None, or None and what went wrong: one failure must not hide the rest of the report."""
    try:
        return work(), None
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {first_line(error) if str(error) else 'no message'}"


def check_case(
    case: Case, backward: bool, args: Any, ceilings: dict[torch.dtype, harness.MatrixProduct], copy: float
) -> dict[str, Any]:
    """Measure a case beside its peers: rates as shares of the ceilings, same bits, the predicted time; or the error."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.empty_cache()
    torch._dynamo.reset()  # peers compile for each case; past a limit of recompilations they would run uncompiled
    if case.dtype not in ceilings:
        ceilings[case.dtype] = harness.MatrixProduct(case.dtype, args.device)
    result, error = attempt(
        lambda: measure(
            case,
            args.peers,
            backward=backward,
            device=args.device,
            backend=args.backend,
            seconds=args.seconds,
            ceiling=ceilings[case.dtype],
        )
    )
    if error is not None:
        return {"name": case.name, "sizes": case.sizes, "failure": error}
    x = Inputs(case, args.device, args.backend)
    own = result["entries"][OURS]
    phases = {}
    for phase, spread in own["times"].items():
        flops, size = case.flops(phase) / spread.median, least_bytes(case, phase) / spread.median
        phases[phase] = {
            "flops_per_second": flops,
            "share_of_matmul": flops / result["ceiling"]["median"],
            "bytes_per_second": size,
            "share_of_copy": size / copy,
        }
    same, same_error = attempt(lambda: same_bits(x, backward))
    graph, graph_error = attempt(lambda: graph_seconds(x, backward))
    failure = same_error or graph_error or (None if same else "two runs gave different bits")
    name = torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda" else ""
    return {
        **result,
        "phases": phases,
        "same_bits": same,
        "graph_seconds": graph,
        "predicted_seconds": model.predict_for_device(case, backward, name),
        **({"failure": failure} if failure else {}),
    }


def cell(entry: dict[str, Any], own: dict[str, Any], phase: str) -> str:
    """A peer's time and how many times ours that is, or why there is none."""
    if phase in entry.get("times", {}):
        return f"{harness.milliseconds(entry['times'][phase])}, {ratio(entry, own, phase)}"
    return entry.get("reason", entry.get("reason_backward", "did not run"))


def markdown(record: dict[str, Any]) -> str:
    """The report for people."""
    machine, tests = record["machine"], record["tests"]
    lines = [f"**{'FAILED' if record['failures'] else 'passed'}**"]
    lines += [f"- {failure}" for failure in record["failures"]]
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    lines.append("backends: " + "; ".join(f"{name}: {why or 'available'}" for name, why in machine["backends"].items()))
    if "capability" in machine:
        lines.append(
            f"capability {machine['capability']}, {machine['multiprocessors']} multiprocessors, "
            f"{machine['memory_bytes'] / 1e9:.0f} GB, nvidia-smi: {machine['driver']}"
        )
    if tests is not None:
        lines.append(
            f"tests: {tests['tests']} run, {tests['failures'] + tests['errors']} failed, {tests['skipped']} skipped "
            f"in {tests['seconds']:.0f} s ({' '.join(tests['command'])})"
        )
    products = ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in record["ceilings"]["matmul"].items())
    lines.append(f"measured ceilings: matrix product {products}; copy {record['ceilings']['copy'] / 1e9:.0f} GB/s")
    ran = [result for result in record["results"] if "entries" in result]
    for phase in ("both", "forward", "backward"):
        rows = [case_row(result, phase, record["peers"]) for result in ran if phase in result["phases"]]
        if rows:
            header = ["case", "error", "ms", "TFLOP/s", "of matmul", "GB/s", "of copy"]
            header += ["graph ms", "predicted ms"] if phase in ("both", "forward") else []
            lines.append(f"**{phase}**\n\n" + harness.table([*header, *record["peers"]], rows))
    if record["dispatch"]:
        lines.append("**cuda against triton**\n\n" + cuda_dispatch.markdown(record["dispatch"]))
    return "\n\n".join(lines)


def measure_dispatch(args: Any, machine: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The faster GPU backends, also written to OUT/dispatch.json, and what failed."""
    reason = cuda_dispatch.refused(args.device)
    if reason is not None:
        print(f"no choice between the GPU backends ({reason})", flush=True)
        return [], []
    measured, error = attempt(lambda: cuda_dispatch.measure(args.device, args.seconds))
    if error is not None:
        return [], [f"cuda against triton: {error}"]
    rows, failures = measured
    cuda_dispatch.write(args.out / "dispatch.json", machine, rows)
    return rows, failures


def case_row(result: dict[str, Any], phase: str, names: Sequence[str]) -> list[str]:
    own, rates = result["entries"][OURS], result["phases"][phase]
    row = [
        f"{result['name']} ({result['sizes']})",
        f"{own['error']:.1e}",
        harness.milliseconds(own["times"][phase]),
        f"{rates['flops_per_second'] / 1e12:.2f}",
        f"{rates['share_of_matmul']:.0%}",
        f"{rates['bytes_per_second'] / 1e9:.0f}",
        f"{rates['share_of_copy']:.0%}",
    ]
    if phase in ("both", "forward"):
        whole = phase == ("both" if own["backward"] else "forward")  # what the graph and the model are of
        for value in (result["graph_seconds"], result["predicted_seconds"]):
            row.append(f"{1e3 * value:.3f}" if whole and value is not None else "")
    return [*row, *(cell(result["entries"][name], own, phase) for name in names)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.set_defaults(out=Path("runs/gpu-check"))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:0 ..., or cpu to try the script")
    parser.add_argument("--backend", help="backend of ours (default: what the dispatcher takes)")
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long to measure a case")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what pytest runs; nothing: no tests")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes of pytest")
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(PEERS))
    parser.add_argument("--only", default="", help="cases whose name or sizes contain this")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device={args.device} needs a GPU and a torch with CUDA (torch {torch.__version__} finds none)")
    harness.prepare(args)
    if args.toy:
        harness.MatrixProduct.SIZES, harness.MatrixProduct.LAP = (64,), 1e-4
    training, decoding = TOYS if args.toy else (TRAINING, DECODING)
    chosen = [(c, c in training) for c in (*training, *decoding) if args.only in f"{c.name} {c.sizes}"]
    if not chosen:
        parser.error(f"no case contains {args.only!r}")
    machine = describe_device(args.device)
    print(harness.machine_line(machine), flush=True)
    tests = run_tests(args.tests, args.workers, args.out) if args.tests else None
    if tests is not None:
        print(*tests["tail"], sep="\n", flush=True)
    copy = copy_rate(args.device, COPY_BYTES >> 10 if args.toy else COPY_BYTES)
    ceilings: dict[torch.dtype, harness.MatrixProduct] = {}
    results = []
    for case, backward in chosen:
        results.append(check_case(case, backward, args, ceilings, copy))
        state = results[-1].get("failure", "done")
        print(f"{case.name} ({case.sizes}): {state}", flush=True)
    rows, lost = measure_dispatch(args, machine)
    failures = [f"{r['name']} ({r['sizes']}): {r['failure']}" for r in results if "failure" in r] + lost
    if tests is not None and tests["exit"] != 0:
        failures.insert(0, f"pytest exited with {tests['exit']}: {', '.join(tests['failed'][:20]) or tests['tail']}")
    matmul = {str(r["ceiling"]["dtype"]): r["ceiling"]["best"] for r in results if "ceiling" in r}
    record = {
        "machine": machine,
        "tests": tests,
        "peers": args.peers,
        "ceilings": {"matmul": matmul, "copy": copy},
        "failures": failures,
        "results": results,
        "dispatch": rows,
    }
    harness.write_report("gpu_check", args, machine, record, markdown(record))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
