"""The same inputs give the same bits: run after run, and for any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ctkernels import dispatch
from ctkernels.testing.calls import cotangents_for, make_call, run
from ctkernels.testing.compare import assert_matches

HIDDEN = torch.tensor([[20 * (b % 10), 20 * (b % 10) + 20] for b in range(40)])
LENS = [1 + 7 * b % 23 for b in range(40)]
LARGE = dict(lens=[100, 90, 1, 120, 99], H=10, Hk=5, P=1500, D=128)  # as the test of bounded scratch memory has it
PROBLEMS = {
    "packed": dict(
        lens=LENS, P=200, H=6, Hk=2, D=64, bias=(6, 200), sinks=True, mask=dict(hidden=HIDDEN, drop_p=0.1, seed=1)
    ),
    "padded": dict(B=40, S=23, P=200, H=2, Hk=1, D=17, seq_lens=torch.tensor(LENS), mask=dict(hidden=HIDDEN)),
    "one long row": dict(B=1, S=400, P=300, H=1, Hk=1, D=64),
    "one query": dict(B=1, S=1, T=500, P=3000, H=8, Hk=2, D=64, mask=dict(drop_p=0.5, seed=2)),
    "several prefixes": dict(
        lens=LENS, G=3, P=90, prefix_index=torch.arange(40) % 3, prefix_lens=torch.tensor([90, 0, 33])
    ),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("types", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("problem", [*PROBLEMS, "large"])
def test_same_bits_for_any_thread_count(cpu_build, threads, problem, types):
    call = make_call(types=types, **{**PROBLEMS, "large": LARGE}[problem])
    cotangents = cotangents_for(call)
    threads(1)
    expected = run(call, cpu_build, cotangents)
    for count in (2, 3, 1):
        threads(count)
        for name, x in run(call, cpu_build, cotangents).items():
            assert torch.equal(x, expected[name]), f"{name} with {count} threads"


@pytest.mark.parametrize(("count", "types"), [(1, "bf16+fp32"), (3, "fp32"), (3, "bf16+fp32")])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_right_for_any_thread_count(cpu_build, threads, problem, count, types):
    """Work split over threads is neither lost nor done twice."""
    call = make_call(types=types, **PROBLEMS[problem])
    cotangents = cotangents_for(call)
    threads(count)
    assert_matches(call, run(call, cpu_build, cotangents), cotangents)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_same_bits_run_after_run(build, problem):
    call = make_call(types="bf16+fp32" if problem == "several prefixes" else "fp32", **PROBLEMS[problem])
    cotangents = cotangents_for(call)
    expected = run(call, build, cotangents)
    torch.empty(1 << 20).fill_(float("nan"))  # freed memory that a kernel might take for zeros
    for name, x in run(call, build, cotangents).items():
        assert torch.equal(x, expected[name]), name


def test_concurrent_calls(build):
    """Calls from several Python threads at once do not share scratch memory."""
    calls = [make_call(types="fp32", seed=i, **PROBLEMS["packed"]) for i in range(4)]
    expected = [run(call, build, cotangents_for(call)) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: run(call, build, cotangents_for(call)), calls))
    for a, b in zip(expected, got, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_kernels_run_on_torchs_threads(threads):
    """Equal bits prove nothing about threads if all workers share one."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert dispatch.cpu_info()["workers"] == threads
    finally:
        torch.set_num_threads(before)
