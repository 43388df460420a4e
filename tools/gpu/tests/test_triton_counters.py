"""The figures of the counters' table, on problems small enough to know them by hand, and the committed table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools.gpu import problems
from tools.gpu.architectures import ARCHITECTURES
from tools.gpu.problems import Sizes
from tools.gpu.triton import counters, plans

RESULTS = Path(counters.__file__).parents[1] / "results"
SMALL = Sizes("small", (32, 32), H=4, Hk=2, P=128, D=64, dtype=torch.bfloat16)


def test_kept_pairs_are_those_of_the_mask():
    assert counters.kept_pairs(SMALL) == 2 * (32 * 128 + 32 * 33 // 2)
    assert counters.all_pairs(SMALL) == 4 * 2 * 32 * (128 + 32)
    half = replace(SMALL, segments=2)
    assert counters.kept_pairs(half) == counters.kept_pairs(SMALL) - 2 * 32 * 64
    assert counters.kept_flops(half, "forward") == 2 * 2 * 64 * 4 * counters.kept_pairs(half)
    decoding = replace(SMALL, lens=(1, 1), past=7)
    assert counters.kept_pairs(decoding) == 2 * (128 + 7 + 1)


def test_least_bytes():
    rows, own, prefix, lse = 64 * 4 * 64 * 2, 64 * 2 * 64 * 2, 2 * 128 * 64 * 2, 64 * 4 * 4
    assert counters.least_bytes(SMALL, "forward") == 2 * rows + 2 * own + 2 * prefix + lse
    assert counters.least_bytes(SMALL, "backward") == 4 * rows + 4 * own + 4 * prefix + lse
    master = replace(SMALL, prefix_dtype=torch.float32)
    assert counters.least_bytes(master, "forward") - counters.least_bytes(SMALL, "forward") == 2 * prefix


@pytest.mark.parametrize("name", counters.COUNTED)
def test_a_forward_pass_by_hand(name):
    """Two rows of 32 queries and two heads are one full tile of 128 lanes per KV head: the prefix is not padded at all,
    each row's own keys are met by the lanes of both."""
    architecture = ARCHITECTURES[name]
    launches = plans.forward(problems.make(SMALL), architecture).launches
    (kernel,) = counters.count(launches, architecture, workers=1)
    sizes = launches[0].constexprs
    assert sizes["BLOCK_M"] == 128 and kernel["kernel"] == "forward_kernel"
    own = 2 * -(-32 // sizes["OWN_N"]) * sizes["OWN_N"]
    assert kernel["matrix_flops"] == 2 * 2 * 64 * 2 * 128 * (128 + own)
    assert kernel["bytes_written"] == 64 * 4 * 64 * 2 + 64 * 4 * 4  # out and lse
    assert kernel["special"] >= 2 * 128 * (128 + own)  # an exp2 for each pair
    assert kernel["atomics"] == 0
    figures = counters.ratios([kernel], SMALL, "forward")
    assert figures["tile_waste"] == pytest.approx(128 * 2 * (128 + own) / (4 * counters.kept_pairs(SMALL)))
    assert figures["traffic"] >= 1 and figures["coalescing"] >= 1 and figures["bank_conflicts"] >= 1


@pytest.mark.parametrize("name", counters.COUNTED)
def test_a_backward_pass_by_hand(name):
    """Every product of every tile once: with more warps than rows of a product to share, warps would repeat it."""
    architecture = ARCHITECTURES[name]
    inputs = problems.make(SMALL)
    forward = plans.forward(inputs, architecture)
    counters.count(forward.launches, architecture, workers=1)
    launches = plans.backward(inputs, *forward.outputs, architecture).launches
    records = counters.count(launches, architecture, workers=1)
    executed = {record["kernel"]: record["matrix_flops"] for record in records}
    sizes = {launch.name: launch.constexprs for launch in launches}
    product = 2 * SMALL.D * SMALL.Hk  # FLOPs per lane and key
    lanes = 2 * 32 * 2
    block_m, block_n = (sizes["own_kernel"][side] for side in ("BLOCK_M", "BLOCK_N"))
    own_tiles = sum(-(-(32 - t) * 2 // block_m) for t in range(0, 32, block_n))  # of one row, lanes from key t on
    assert executed["own_kernel"] == 4 * product * 2 * own_tiles * block_m * block_n
    assert executed["prefix_kernel"] == 4 * product * lanes * 128
    tiles = lanes // sizes["dq_kernel"]["BLOCK_M"]
    own_keys = -(-32 // sizes["dq_kernel"]["OWN_N"]) * sizes["dq_kernel"]["OWN_N"]
    met = 2 if tiles == 1 else 1  # rows that a tile meets
    assert executed["dq_kernel"] == 3 * product * lanes * (128 + met * own_keys)


def test_the_committed_table_is_of_the_present_problem():
    table = json.loads((RESULTS / "triton_counters.json").read_text())
    assert table["pairs"] == counters.all_pairs(counters.PROBLEM)
    assert table["kept_pairs"] == counters.PROBLEM.H * counters.kept_pairs(counters.PROBLEM)
    assert list(table["architectures"]) == list(counters.COUNTED)
    for name, phases in table["architectures"].items():
        for phase, kernels in phases.items():
            assert all(kernel["atomics"] == 0 for kernel in kernels)
            assert table["ratios"][name][phase] == counters.ratios(kernels, counters.PROBLEM, phase)
