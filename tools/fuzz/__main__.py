#!/usr/bin/env python3
"""The op at random, against fp64: `make fuzz N=2000`, or  python -m tools.fuzz [--cases N] [--first K] [--on BACKEND]

A call of the op is drawn from its number: shapes, strides, types, options, mask, and which gradients are asked for
(`cases.py`). Every tensor lies right before, or right behind, a page that cannot be read (`guard.py`). The call runs on
every instruction set of the CPU kernels that this machine has; a case is a call on one of them. What is allowed is
stated in docs/numerics.md. A process that dies is a finding like a wrong number, and the next one goes on behind it.

    python -m tools.fuzz --case 1234            one call again, on every instruction set
    python -m tools.fuzz --on triton            the Triton kernels under Triton's interpreter
    python -m tools.fuzz --on cuda              the CUDA C++ kernels in the PTX emulator; needs nvcc
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ctkernels import dispatch
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
from tools.fuzz.engine import Engine, Tally

NAMES = {"cpu": "the CPU kernels", "triton": "Triton's interpreter", "cuda": "the PTX emulator"}


def report(on: str, first: int, tally: Tally, seconds: float) -> tuple[dict[str, Any], str]:
    """What ran, as a record and as Markdown."""
    builds, types = (list(dict.fromkeys(pair[i] for pair in tally.cases)) for i in (0, 1))
    record = {
        "on": on,
        "first": first,
        "calls": tally.calls,
        "cases": tally.cases.total(),
        "seconds": round(seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": dispatch.cpu_info()["name"],
        "cases_by_build": {build: {kind: tally.cases[build, kind] for kind in types} for build in builds},
        "calls_by_trait": dict(tally.traits.most_common()),
        "largest_error": {
            kind: {name: round(x, 3) for name, x in parts.items()} for kind, parts in tally.judged.items()
        },
        "wrong": tally.wrong,
    }
    results = sorted({name for parts in tally.judged.values() for name in parts})
    judged = [kind for kind in types if kind in tally.judged]
    lines = [
        f"# The op at random: {NAMES[on]}\n",
        f"`python -m tools.fuzz --on {on} --first {first} --cases {tally.cases.total()}`: {tally.cases.total()} cases "
        f"({tally.calls} calls, numbers {first} to {first + tally.calls - 1}, on {len(builds)} builds), "
        f"{len(tally.wrong)} wrong. What is allowed: docs/numerics.md.\n",
        *(f"- {line}" for line in tally.wrong[:50]),
        "\nCases, by build and by the types of rows and prefix:\n",
        *table(["build", *types], [[build, *(tally.cases[build, kind] for kind in types)] for build in builds]),
        "\nThe largest error of each result over all cases, as a part of what is allowed:\n",
        *table(
            ["types", *results],
            [[kind, *(f"{tally.judged[kind].get(name, 0):.2g}" for name in results)] for kind in judged],
        ),
        "\nCalls, by what is on in them:\n",
        *table(["what", "calls"], [list(pair) for pair in tally.traits.most_common()]),
    ]
    return record, "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="calls times builds, at least")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--case", type=int, help="this call alone, without a report")
    parser.add_argument("--on", choices=list(NAMES), default="cpu")
    parser.add_argument("--until", type=float, help="begin nothing new after so many seconds")
    parser.add_argument("--out", type=Path, help="folder of the report (default: none is written)")
    options = parser.parse_args()
    if options.on == "triton" and os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tools.fuzz", *sys.argv[1:]])
    torch.set_num_threads(1)
    engine, tally, started = Engine(options.on), Tally(), time.monotonic()
    if options.case is not None:
        tally = engine.many(options.case, 1)
        print("\n".join(tally.wrong) or f"case {options.case}: right on {len(engine.builds)} builds")
        return int(bool(tally.wrong))
    calls = -(-options.cases // len(engine.builds))
    while tally.calls < calls and not (options.until and time.monotonic() - started > options.until):
        found = engine.many(options.first + tally.calls, min(engine.batch, calls - tally.calls))
        tally.add(found)
        print("\n".join(found.wrong) or f"{tally.cases.total()} cases", flush=True)
        record, text = report(options.on, options.first, tally, time.monotonic() - started)
        if options.out is not None:  # each time: who stops it has the report so far
            atomic_write_json(options.out / f"fuzz_{options.on}.json", record)
            atomic_write_bytes(options.out / f"fuzz_{options.on}.md", text.encode())
    print(text)
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main())
