#!/usr/bin/env python3
"""Where the op's CPU kernels spend their time: a sampled profile of forward and backward, by what the functions do.

    python benchmarks/profile_attention.py                 the cases that are slowest beside torch.mm
    python benchmarks/profile_attention.py --only Gemma    cases whose name or sizes contain this

Needs Linux's `perf` and the right to sample one's own processes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

from benchmarks import harness
from benchmarks.bench_attention import OURS, run_once
from benchmarks.cases import GPT2_LARGE, HEADLINE, QUICK, SMOLLM2, Case, Inputs

DROPOUT = replace(SMOLLM2, name="SmolLM2, heavy dropout", B=64, drop_p=0.9)
SLOWEST = (replace(SMOLLM2, B=64, P=256, S=8), HEADLINE[1], DROPOUT, GPT2_LARGE)
REST = "Python, the system, the rest"
# what a function does, by the first pattern that its name or library contains
PARTS = {
    "matrix products": r"rows_panel|rows_tail|cols_panel|cols_tail|narrow_",
    "threads waiting": r"libgomp",
    "copies, clearing": r"mem(move|set|cpy)|clear_page",
    "rows into operands": r"::pack|transpose|load_row|load_lanes|key_columns",
    "which keys are seen": r"prefix_block|own_block|context_bits",
    "softmax, conversions": r"::attend|::step|softmax|Logits|forward_as",
    "sums, results": r"reduce|finish|store_row|add_prefix|differentiate|merge",
}


def shares(report: str) -> dict[str, float]:
    """Share of the samples by part, from lines `overhead% library symbol` of perf's report."""
    sums = dict.fromkeys((*PARTS, REST), 0.0)
    for line in report.splitlines():
        if found := re.match(r"\s*([\d.]+)%\s+(.*)", line):
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, found[2])), REST)
            sums[part] += float(found[1]) / 100
    return sums


def sample(case: Case, seconds: float) -> dict[str, float]:
    """Run a case while perf samples this process."""
    x = Inputs(case)
    for _ in range(3):
        run_once(OURS, x, x.dout)
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/perf.data"
        record = ["perf", "record", "-q", "-p", str(os.getpid()), "-o", data, "--", "sleep", str(seconds)]
        with subprocess.Popen(record) as perf:
            while perf.poll() is None:
                run_once(OURS, x, x.dout)
        report = ["perf", "report", "-i", data, "--stdio", "-F", "overhead,dso,symbol"]
        return shares(subprocess.run(report, check=True, capture_output=True, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--only", help="of all cases, those whose name or sizes contain this")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to sample a case")
    args = parser.parse_args(argv)
    if shutil.which("perf") is None:
        parser.error("perf is not installed (Debian: linux-perf)")
    harness.prepare(args)
    machine = harness.describe_machine("cpu")
    every = [case for case in (*HEADLINE, *QUICK, DROPOUT) if args.only and args.only in f"{case.name} {case.sizes}"]
    results = [{"case": case.name, "sizes": case.sizes, **sample(case, args.seconds)} for case in every or SLOWEST]
    rows = [[f"{r['case']} ({r['sizes']})", *(f"{r[part]:.0%}" for part in (*PARTS, REST))] for r in results]
    text = "Share of samples, forward and backward.\n\n" + harness.table(["case", *PARTS, REST], rows)
    harness.write_report("profile_attention", args, machine, results, text)


if __name__ == "__main__":
    main()
