"""Regression tracking with pytest-benchmark; not collected by default.

pytest benchmarks/tests/speed.py --benchmark-autosave                 keep the times of this machine
pytest benchmarks/tests/speed.py --benchmark-compare --benchmark-compare-fail=median:10%
"""

import pytest

from benchmarks import peers
from benchmarks.bench_attention import OURS, run_once
from benchmarks.cases import HEADLINE, QUICK, Inputs

CASES = [*HEADLINE, *QUICK]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}: {case.sizes}" for case in CASES])
def test_speed(benchmark, case, backward):
    x = Inputs(case)
    expected = peers.truth(x)
    values, _ = run_once(OURS, x, expected.dout if backward else None)
    benchmark.extra_info["error"] = peers.check(OURS, values, expected, case.dtype)
    benchmark.extra_info["flops"] = case.flops("both" if backward else "forward")
    benchmark.pedantic(run_once, (OURS, x, x.dout if backward else None), rounds=5, warmup_rounds=1)
