"""Measures both GPU backends on one training-shaped call per type and head dimension, and writes which was faster: the
rows that `ctkernels/dispatch_table.py` puts before its own (CTKERNELS_DISPATCH=FILE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers
from benchmarks.bench_attention import OURS, run_once
from benchmarks.cases import LLAMA, Case, Inputs
from ctkernels import dispatch, dispatch_table
from ctkernels.tuning.storage import atomic_write_json

CASES = tuple(
    replace(LLAMA, name="dispatch", D=D, drop_p=0.05, dtype=dtype)
    for dtype in dispatch_table.DTYPES
    for D in dispatch_table.HEAD_DIMENSIONS
)


def refused(device: str) -> str | None:
    """Why there is nothing to choose on a device, or None."""
    reasons = {name: dispatch.refusal(name, torch.device(device)) for name in dispatch_table.GPU_BACKENDS}
    return "; ".join(f"{name}: {why}" for name, why in reasons.items() if why is not None) or None


def measure(device: str, seconds: float, cases: Sequence[Case] | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a dispatch table (default: of `CASES`), and the failures: a backend that is wrong loses the case."""
    rows, failures = [], []
    architecture = dispatch.architecture(torch.device(device))
    for case in cases or CASES:
        times, failed = times_of(case, device, seconds)
        failures += failed
        for direction in dispatch_table.DIRECTIONS if times else ():
            medians = {name: spreads[direction].median for name, spreads in times.items()}
            rows.append(
                {
                    "architecture": architecture,
                    "dtype": dispatch_table.DTYPES[case.dtype],
                    "head_dim": case.D,
                    "direction": direction,
                    "backend": min(medians, key=medians.__getitem__),
                    "seconds": medians,
                }
            )
    return rows, failures


def times_of(case: Case, device: str, seconds: float) -> tuple[dict[str, dict[str, harness.Spread]], list[str]]:
    """Times by backend and direction, measured in turn, of the backends whose results are right; and the failures."""
    inputs = {name: Inputs(case, device, name) for name in dispatch_table.GPU_BACKENDS}
    expected = peers.truth(next(iter(inputs.values())))
    failures = []
    for name, x in list(inputs.items()):
        try:
            values, _ = run_once(OURS, x, expected.dout)
            peers.check(name, values, expected, case.dtype)
        except Exception as error:  # whatever it is, the other backend serves this case
            failures.append(f"{name}, {case.sizes}: {type(error).__name__}: {error}")
            del inputs[name]
    works = {name: lambda x=x: run_once(OURS, x, x.dout)[1] for name, x in inputs.items()}
    return harness.in_turn(works, seconds) if works else {}, failures


def write(path: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The file that CTKERNELS_DISPATCH names; read back once, so that a file that cannot be used is found here."""
    atomic_write_json(path, {"machine": {name: str(value) for name, value in machine.items()}, "rows": list(rows)})
    dispatch_table.read(path)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per type and head dimension: milliseconds of both backends, the faster one in bold."""
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        cells = lines.setdefault((row["dtype"], row["head_dim"]), [row["dtype"], str(row["head_dim"])])
        for name in dispatch_table.GPU_BACKENDS:
            text = f"{1e3 * row['seconds'][name]:.3f}" if name in row["seconds"] else "failed"
            cells.append(f"**{text}**" if name == row["backend"] else text)
    header = [f"{d} {name} ms" for d in dispatch_table.DIRECTIONS for name in dispatch_table.GPU_BACKENDS]
    return harness.table(["type", "D", *header], lines.values())
