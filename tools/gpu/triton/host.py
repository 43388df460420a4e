#!/usr/bin/env python3
"""Host time of planning a layer's calls on the Triton backend:

    python -m tools.gpu.triton.host [PAGE]        PAGE: also replace the table between its markers, docs/gpu.md

Nothing is launched: what is timed is all that happens before, on CPU tensors of a small layer, for an H100. The best of
many, as other work can only add to it, in microseconds of CPU time; then the Python functions that a call runs, and the
kernels that it would launch.

    first      a call of new sizes, without what earlier calls have made
    plain      a later layer, whose tables are recalled
    prepared   a later layer under `ctkernels.prepare`
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from benchmarks import harness
from ctkernels.backends.triton import backend, call, launch, table_cache
from ctkernels.backends.triton.config import Target
from ctkernels.problem import Prepared
from tools.gpu import problems
from tools.gpu.problems import Sizes

LAYER = Sizes("layer", (4,) * 16, 8, 2, 64, 64, torch.bfloat16, torch.float32, segments=16, drop_p=0.05)
H100 = Target("sm_90", 132)
REPEATS, LEAST = 1000, 20


def best_us(run: Callable[[], object], repeats: int) -> float:
    """CPU microseconds of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time_ns()
        run()
        best = min(best, time.process_time_ns() - start)
    return best / 1000


def python_calls(run: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls


def passes(prepared: bool) -> dict[str, Callable[[], object]]:
    """The forward and the backward pass of a layer, as `ops.py` calls them."""
    x = problems.make(LAYER)
    tensors, problem = x.forward[:-1], x.problem
    made = Prepared()
    if prepared:
        tables = [backend.tables(*x.forward, backward) for backward in (False, True)]
        made = Prepared(*tables, x.prefix_k.bfloat16(), x.prefix_v.bfloat16())
    out, lse = backend.forward(*x.forward, made)
    needs = [True] * 5 + [False]
    return {
        "forward": lambda: backend.forward(*x.forward, made),
        "backward": lambda: backend.backward(x.dout, None, *tensors, out, lse, needs, problem, made),
    }


def forget() -> None:
    call._known.clear()
    table_cache._recent.clear()


def main() -> None:
    names: list[str] = []
    rows = []
    with (
        mock.patch.object(launch, "run", lambda launches: names.extend(x.name for x in launches)),
        mock.patch.object(backend, "current", lambda device: nullcontext()),
        mock.patch.object(backend, "target", lambda device: H100),
        mock.patch.object(backend, "check_values", lambda *args: None),  # CPU tensors alone are looked at
    ):
        for kind in ("first", "plain", "prepared"):
            for phase, run in passes(kind == "prepared").items():
                again = (lambda run=run: (forget(), run())) if kind == "first" else run
                again()
                names.clear()
                calls = python_calls(again)
                kernels = len(names)
                us = best_us(again, LEAST if kind == "first" else REPEATS)
                rows.append([kind, phase, f"{us:.0f}", str(calls), str(kernels)])
    table = harness.table(["call", "phase", "CPU us", "Python calls", "kernels"], rows)
    print(table)
    for page in sys.argv[1:]:
        harness.replace_between_markers(Path(page), "host", table)


if __name__ == "__main__":
    main()
