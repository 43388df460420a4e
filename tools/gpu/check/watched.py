"""Stages sanitize and profile: calls of the op under compute-sanitizer and ncu."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

from tools.gpu.check.session import Session, how_it_ended, last_lines, python

CALLS = ("-m", "tools.gpu.check.calls")
SANITIZERS = ("memcheck", "synccheck", "racecheck", "initcheck")
# the two that see how threads work together; Triton's own tests cover the rest
TRITON_SANITIZERS = ("memcheck", "racecheck")
COUNT = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
# without torch's own memory pool, an access outside of a tensor is one outside of an allocation
NO_POOL = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
PROFILES = (("cuda", 16, 1024), ("cuda", 64, 4096), ("triton", 16, 1024), ("cuda", 16, 16384))
KERNELS = "regex:ctk_|(forward|dq|own|prefix|words|tile_words|round)_kernel"
LAUNCHES = 24  # profiled at most of a call: each is repeated some forty times
METRICS = (
    "Duration",
    "Registers Per Thread",
    "Theoretical Occupancy",
    "Achieved Occupancy",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "L2 Hit Rate",
    "Executed Ipc Active",
    "No Eligible",
    "Waves Per SM",
    "Local",
)
REPORT = "profile.ncu-rep"  # of the first profile that ran; the text of all is in the records


def sanitize(session: Session) -> None:
    """Every tool on a call of both backends: the number of errors, 0 where all is right."""
    cases = [("cuda", tool) for tool in SANITIZERS] + [("triton", tool) for tool in TRITON_SANITIZERS]
    if session.dry:
        cases = [("cpu", SANITIZERS[0])]
    records = session.records
    records.plan("sanitize", (f"{tool} {backend}" for backend, tool in cases))
    for backend, tool in cases:
        case = f"{tool} {backend}"
        if ("sanitize", case) in records.results():
            continue
        if not session.dry and shutil.which("compute-sanitizer") is None:
            records.end("sanitize", case, 0.0, {"failure": "compute-sanitizer is not on PATH"})
            continue
        with records.case("sanitize", case) as result:
            result |= sanitized(session, backend, tool)


def sanitized(session: Session, backend: str, tool: str) -> dict[str, object]:
    call = python(*CALLS, session.device, backend, "bf16", "2", "320", "1")
    if session.dry:
        status, text = session.run(call)
        return {"errors": 0} if status == 0 else {"failure": f"{how_it_ended(status, session.quiet_limit)}: {text}"}
    options = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--launch-timeout", "120"]
    status, text = session.run([*options, *call], NO_POOL)
    found = COUNT.search(text)
    if found is None:
        return {"failure": f"{how_it_ended(status, session.quiet_limit)} without a summary: {last_lines(text)}"}
    errors = int(found[1] or found[2])
    if errors == 0 and status == 0:
        return {"errors": 0}
    told = " / ".join(line.strip("= ") for line in text.splitlines() if line.startswith("=========") and "at " in line)
    return {"errors": errors, "failure": f"{errors} errors; {how_it_ended(status, session.quiet_limit)}; {told[:1000]}"}


def profile(session: Session) -> None:
    """ncu's metrics of every kernel of a training-shaped call."""
    specs: Sequence[tuple[str, int, int]] = (("cpu", 2, 20),) if session.dry else PROFILES
    records = session.records
    records.plan("profile", map(name_of, specs))
    for spec in specs:
        if ("profile", name_of(spec)) in records.results():
            continue
        if not session.dry and shutil.which("ncu") is None:
            records.end("profile", name_of(spec), 0.0, {"failure": "ncu is not on PATH"})
            continue
        with records.case("profile", name_of(spec)) as result:
            result |= profiled(session, *spec)


def name_of(spec: tuple[str, int, int]) -> str:
    return "{} B={} P={}".format(*spec)


def profiled(session: Session, backend: str, B: int, P: int) -> dict[str, object]:
    call = python(*CALLS, session.device, backend, "bf16", str(B), str(P), "1")
    options = ["ncu", "--clock-control", "none", "--set", "full", "--target-processes", "all", "-k", KERNELS]
    options += ["--launch-count", str(LAUNCHES)]
    if not (session.out / REPORT).exists():
        options += ["-f", "-o", str(session.out / REPORT.removesuffix(".ncu-rep")), "--page", "details"]
    status, text = session.run(call if session.dry else [*options, *call])
    if status == 0 and session.dry:
        return {"kernels": []}
    if status == 0 and "-o" in options:  # with a file, the metrics are printed by a second call
        status, text = session.run(["ncu", "--import", str(session.out / REPORT), "--page", "details"])
    kernels = parse(text)
    if status != 0 or not kernels:
        return {"failure": f"{how_it_ended(status, session.quiet_limit)}: {last_lines(text)}"}
    return {"kernels": kernels}


def parse(text: str) -> list[dict[str, str]]:
    """The metrics of each kernel in ncu's text: a line with name, grid and block, then lines `metric  unit  value`."""
    kernels: list[dict[str, str]] = []
    for line in text.splitlines():
        if found := re.match(r"\s{1,4}(\S.*?) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\)", line):
            kernels.append({"kernel": found[1][:90]})
        elif kernels and (metric := next((m for m in METRICS if line.strip().startswith(m)), None)):
            *_, value = line.split()
            kernels[-1].setdefault(metric, value)
    return kernels
