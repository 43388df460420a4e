"""The report of a check from its records: Markdown for people, JSON for programs, and the dispatch file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import table
from tools.gpu.check import build
from tools.gpu.check.records import Key, replace_file
from tools.gpu.check.session import LOG, RECORDS, Session
from tools.gpu.check.watched import METRICS, REPORT

MARKDOWN, DISPATCH = "gpu_check.md", "dispatch.json"
FILES = (RECORDS, build.SUMMARY, MARKDOWN, LOG, DISPATCH, REPORT)  # and the two extensions
MOST_BYTES = build.MOST_BYTES
LOG_BYTES = 4 << 20
AGREEMENT = {"cuda": 5e-2, "cpu": 1e-3}  # largest relative difference of first losses and gradient norms of a step
Results = Mapping[Key, dict[str, Any]]
AUTHORS = "authors' loop"


def write(session: Session, stages: Sequence[str]) -> dict[str, Any]:
    """Write all files; returns what gpu_check.json holds: failures, what is missing, results by stage and case."""
    results = session.records.results()
    lines = session.records.lines()
    plans = session.records.plans()
    known = list(dict.fromkeys((*plans, *stages)))
    missing = {stage: session.records.missing(stage) for stage in known}
    missing = {stage: cases for stage, cases in missing.items() if cases != []}
    machine = results.get((build.STAGE, "machine"), {}).get("machine")
    summary = {
        "machine": machine,
        "dry": session.dry,
        "sources": build.digest(),
        "failures": failures(results, session.device),
        "missing": missing,
        "stages": {
            stage: {"seconds": sum(of("seconds")), "cpu_seconds": sum(of("cpu_seconds"))}
            for stage, of in ((stage, _runs(lines, stage)) for stage in dict.fromkeys(_ran(lines)))
        },
        "results": _nested(results),
    }
    replace_file(session.out / build.SUMMARY, json.dumps(summary, indent=1, default=str) + "\n")
    replace_file(session.out / MARKDOWN, markdown(summary, results) + "\n")
    rows = _dispatch_rows(results)
    if rows:
        told = {name: str(value) for name, value in (machine or {}).items()}
        replace_file(session.out / DISPATCH, json.dumps({"machine": told, "rows": rows}, indent=1) + "\n")
    limit_files(session.out)
    return summary


def _ran(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return [", ".join(line["ran"]) for line in lines if "ran" in line]


def _runs(lines: Sequence[Mapping[str, Any]], stage: str) -> Callable[[str], list[float]]:
    return lambda field: [line[field] for line in lines if "ran" in line and ", ".join(line["ran"]) == stage]


def _nested(results: Results) -> dict[str, dict[str, Any]]:
    """Results by stage and case. Of tests, those that failed, and counts."""
    found: dict[str, dict[str, Any]] = {}
    for (stage, case), result in results.items():
        if stage != "test" or result.get("outcome") in (None, "failed"):
            found.setdefault(stage, {})[case] = result
    return found


def failures(results: Results, device: str) -> list[str]:
    """All that is wrong, a line each."""
    found = [f"{stage}: {case}: {r['failure']}" for (stage, case), r in results.items() if "failure" in r]
    return found + disagreements(results, AGREEMENT[device])


def disagreements(results: Results, most: float) -> list[str]:
    """Ways to run a training step whose first loss or gradient norm is another one than that of the first way."""
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    found = []
    for (stage, case), result in results.items():
        if stage != "train" or "loss" not in result:
            continue
        other, expected = first.setdefault(case.split()[0], (case, result))
        for name in ("loss", "grad_norm"):
            difference = abs(result[name] - expected[name]) / abs(expected[name])
            if not difference <= most:
                found.append(f"train: {case}: {name} {result[name]:.6g} is not that of {other}, {expected[name]:.6g}")
    return found


def limit_files(folder: Path) -> None:
    """Shorten the log, and remove what is too large to carry away."""
    log = folder / LOG
    if log.exists() and log.stat().st_size > LOG_BYTES:
        replace_file(log, "...\n" + log.read_bytes()[-LOG_BYTES:].decode(errors="replace"))
    for path in [folder / name for name in FILES] + list(build.extensions(folder).values()):
        if path.exists() and path.stat().st_size > MOST_BYTES:
            print(f"{path} has {path.stat().st_size >> 20} MiB, more than {MOST_BYTES >> 20}, and is removed")
            path.unlink()


def markdown(summary: Mapping[str, Any], results: Results) -> str:
    """The report for people."""
    wrong, missing = summary["failures"], summary["missing"]
    state = "FAILED" if wrong else "not finished" if missing else "passed"
    parts = [f"**{state}**" + (" (rehearsal on the CPU, toy sizes: no time means anything)" if summary["dry"] else "")]
    parts += ["\n".join(f"- {line}" for line in wrong)] if wrong else []
    if missing:
        left = (f"{stage}: {'all' if cases is None else ', '.join(cases)}" for stage, cases in missing.items())
        parts.append("not done: " + "; ".join(left))
    parts += _machine(summary, results)
    for title, make in (
        ("smoke", _smoke),
        ("test", _tests),
        ("bench", _bench),
        ("cuda against triton", _dispatch),
        ("train", _train),
        ("sanitize", _sanitize),
        ("profile", _profile),
    ):
        if text := make(results):
            parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts)


def of_stage(results: Results, stage: str) -> dict[str, dict[str, Any]]:
    return {case: result for (name, case), result in results.items() if name == stage}


def _machine(summary: Mapping[str, Any], results: Results) -> list[str]:
    machine, lines = summary["machine"], []
    if machine is not None:
        where = machine.get("gpu", "no GPU")
        versions = (f"{name} {value}" for name, value in machine["versions"].items() if value)
        lines.append(
            f"{where}; {machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}; {machine['date']}"
        )
        lines.append(f"versions: Python {machine['python']}, {', '.join(versions)}")
        lines.append("backends: " + "; ".join(f"{k}: {why or 'available'}" for k, why in machine["backends"].items()))
    if machine is not None and "capability" in machine:
        lines.append(
            f"capability {machine['capability']}, {machine['multiprocessors']} multiprocessors, "
            f"{machine['memory_bytes'] / 1e9:.0f} GB, nvidia-smi: {machine['driver']}"
        )
    devices = sorted({result["on"] for result in results.values() if "on" in result})
    if len(devices) > 1:
        lines.append(f"**Results of different devices: {', '.join(devices)}**")
    built = results.get((build.STAGE, "extensions"), {})
    if "how" in built:
        unknown = built["sources"] == "unknown"
        note = "; **built by something else: whether from these sources is not known**" if unknown else ""
        lines.append(f"extensions: {built['how']}, sources {built['sources']}{note}")
    rows = [[name, f"{s['seconds']:.0f}", f"{s['cpu_seconds']:.0f}"] for name, s in summary["stages"].items()]
    return [*lines, table(["stages", "seconds", "CPU seconds"], rows)] if rows else lines


def _smoke(results: Results) -> str:
    rows = [[case, f"{r['error']:.1e}"] for case, r in of_stage(results, "smoke").items() if "error" in r]
    return table(["case", "largest relative error"], rows) if rows else ""


def _tests(results: Results) -> str:
    tests = of_stage(results, "test")
    rows = []
    for part, result in tests.items():
        if "outcome" not in result:
            rows.append([part, *(str(result.get(name, 0)) for name in ("passed", "failed", "skipped"))])
    skipped = Counter(r["why"] for r in tests.values() if r.get("outcome") == "skipped")
    why = "\n".join(f"- {count} skipped: {reason}" for reason, count in skipped.most_common())
    return "\n\n".join(filter(None, (table(["part", "passed", "failed", "skipped"], rows) if rows else "", why)))


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _bench(results: Results) -> str:
    cases = of_stage(results, "bench")
    ceilings = cases.get("ceilings", {})
    parts = []
    if "matmul" in ceilings:
        products = ", ".join(f"{k} {r['mean'] / 1e12:.1f} TFLOP/s" for k, r in ceilings["matmul"].items())
        parts.append(
            f"Measured ceilings, on random numbers: matrix product {products}; copy {ceilings['copy'] / 1e9:.0f} GB/s; "
            f"a launch takes the host {ceilings['launch_us']:.1f} us."
        )
    rows = []
    for case, result in cases.items():
        if case == "ceilings" or case.startswith("dispatch"):
            continue
        name, _, problem = case.partition(": ")
        if "forward" not in result:
            rows.append([problem, name, result.get("reason") or result.get("failure", "")] + [""] * 14)
            continue
        rows.append([problem, name, f"{result['error']:.0e}", *_bench_cells(result, cases, problem, ceilings)])
    rows.sort(key=lambda row: row[0])
    header = ["case", "who", "error"]
    for phase in ("fwd", "both"):
        header += [
            f"{phase} warm us",
            f"{phase} cold us",
            f"{phase} predicted us",
            f"{phase} host us",
            f"{phase} launches",
        ]
    header += ["both eager us", "/ ours", "TFLOP/s kept", "of matmul"]
    about = (
        "Device time is that of a CUDA graph, replayed warm and with a cold L2 cache; host time is that until the call "
        "returns. `both` is forward and backward; launches are those of a call / of its graph; `/ ours` is the warm "
        "time of both (or of forward) divided by that of our first backend."
    )
    return "\n\n".join([*parts, about, table(header, rows)] if rows else parts)


def _bench_cells(
    result: Mapping[str, Any], cases: Mapping[str, Any], problem: str, ceilings: Mapping[str, Any]
) -> list[str]:
    cells = []
    for phase in ("forward", "both"):
        times = result.get(phase)
        if times is None:
            cells += [result.get("reason_backward", "")[:60], "", "", "", ""]
            continue
        error = times.get("graph_error")
        cells += [error[:60], ""] if error else [_us(times["warm_us"]), _us(times["cold_us"])]
        cells += [_us(result.get("predicted_us", {}).get(phase)), _us(times["host_us"])]
        cells.append("/".join(str(times[name]) for name in ("launches", "graph_launches") if name in times))
    phase = "both" if "both" in result else "forward"
    own = next((r for c, r in cases.items() if c.partition(": ")[2] == problem and "flops" in r), {})
    mine, theirs = own.get(phase, {}).get("warm_us"), result[phase].get("warm_us")
    cells.append(_us(result[phase]["eager_us"]))
    cells.append(f"{theirs / mine:.2f}" if mine and theirs else "")
    rate = own["flops"][phase] / theirs * 1e6 if theirs and "flops" in own else None
    kind = "fp32" if "float32" in problem else "bf16"
    top = ceilings.get("matmul", {}).get(kind, {}).get("mean")
    return [*cells, "" if rate is None else f"{rate / 1e12:.2f}", f"{rate / top:.0%}" if rate and top else ""]


def _dispatch_rows(results: Results) -> list[dict[str, Any]]:
    cases = of_stage(results, "bench")
    return [row for case, result in cases.items() if case.startswith("dispatch") for row in result.get("rows", ())]


def _dispatch(results: Results) -> str:
    lines: dict[tuple[str, int], list[str]] = {}
    for row in _dispatch_rows(results):
        cells = lines.setdefault((row["dtype"], row["head_dim"]), [row["dtype"], str(row["head_dim"])])
        for name in ("cuda", "triton"):
            text = f"{1e3 * row['seconds'][name]:.3f}" if name in row["seconds"] else "failed"
            cells.append(f"**{text}**" if name == row["backend"] else text)
    header = [f"{d} {name} ms" for d in ("forward", "backward") for name in ("cuda", "triton")]
    return table(["type", "D", *header], lines.values()) if lines else ""


def _train(results: Results) -> str:
    cases = of_stage(results, "train")
    rows = []
    for case, r in cases.items():
        if "step_ms" not in r:
            rows.append([case, r.get("reason") or r.get("failure", "")] + [""] * 9)
            continue
        base = cases.get(f"{case.split()[0]} {AUTHORS}", {}).get("step_ms")
        predicted = r.get("predicted_ms") or {}
        rows.append(
            [
                case,
                f"{r['step_ms']:.2f}",
                f"{r['host_ms']:.2f}" if "host_ms" in r else "",
                f"{r['device_us'] / 1e3:.2f}" if "device_us" in r else "",
                f"{predicted['step']:.2f}" if predicted else "",
                ", ".join(f"{name} {ms:.2f}" for name, ms in predicted.items() if name != "step"),
                f"{base / r['step_ms']:.1f}x" if base else "",
                str(r.get("launches", "")),
                f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else "",
                f"{r['loss']:.4f}",
                f"{r['grad_norm']:.4g}" + (f" ({r['note']})" if "note" in r else ""),
            ]
        )
    header = [
        "case",
        "step ms",
        "host ms",
        "device busy ms",
        "device predicted ms",
        "of which",
        "against the authors' loop",
    ]
    header += ["launches", "peak GB", "first loss", "gradient norm"]
    return table(header, rows) if rows else ""


def _sanitize(results: Results) -> str:
    rows = [[case, str(r.get("errors", r.get("failure", "")))] for case, r in of_stage(results, "sanitize").items()]
    return table(["tool", "errors"], rows) if rows else ""


def _profile(results: Results) -> str:
    parts = []
    for case, result in of_stage(results, "profile").items():
        rows = [[k["kernel"], *(k.get(metric, "") for metric in METRICS)] for k in result.get("kernels", ())]
        if rows:
            parts.append(f"{case}\n\n" + table(["kernel", *METRICS], rows))
    return "\n\n".join(parts)
