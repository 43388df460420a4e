"""What the CUDA C++ kernels execute: the committed table, and a small problem counted again, by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools.gpu.cuda import counters as cuda_counters
from tools.gpu.triton import counters

RESULTS = Path(counters.__file__).parents[1] / "results"
SMALL = cuda_counters.SMALL
PRODUCT = 2 * SMALL.D * SMALL.Hk  # FLOPs per lane and key
LANES = 2 * 32 * 2  # of two rows and two heads, per KV head: full tiles


@pytest.fixture(scope="module")
def table():
    return json.loads((RESULTS / "cuda_counters.json").read_text())


@pytest.fixture(scope="module")
def counted():
    """phase -> kernel -> record."""
    return {p: {r["kernel"]: r for r in records} for p, records in cuda_counters.run(SMALL, 1).items()}


def test_the_prefix_is_multiplied_once_without_padding(counted):
    """Own keys come in blocks of 64 that belong to one row, which the lanes of a tile of both rows meet."""
    forward = counted["forward"]["ctk_forward_bf16_64_plain"]["matrix_flops"]
    assert 2 * PRODUCT * LANES * (128 + 32) <= forward <= 2 * PRODUCT * LANES * (128 + 2 * 64)
    query = counted["backward"]["ctk_query_bf16_64_plain"]["matrix_flops"]
    assert 3 * PRODUCT * LANES * (128 + 32) <= query <= 3 * PRODUCT * LANES * (128 + 2 * 64)
    keys = counted["backward"]["ctk_keys_bf16_64_plain"]["matrix_flops"]
    assert 4 * PRODUCT * LANES * (128 + 16) <= keys <= 4 * PRODUCT * LANES * (128 + 2 * 64)


def test_no_bank_conflicts_and_no_float_atomics(counted):
    for kernels in counted.values():
        for name, record in kernels.items():
            assert record["atomics"] == 0, name
            assert record["shared_wavefronts"] <= 1.05 * record["shared_ideal"], name


def test_results_are_written_once_and_in_whole_pieces(counted):
    out, lse = 64 * 4 * 64 * 2, 64 * 4 * 4
    assert counted["forward"]["ctk_forward_bf16_64_plain"]["bytes_written"] == out + lse
    own, prefix = 64 * 2 * 64 * 2, 128 * 2 * 64 * 2
    assert counted["backward"]["ctk_query_bf16_64_plain"]["bytes_written"] == out
    assert counted["backward"]["ctk_keys_bf16_64_plain"]["bytes_written"] == 2 * own + 2 * prefix
    for phase, kernel in (("forward", "forward"), ("backward", "query"), ("backward", "keys")):
        record = counted[phase][f"ctk_{kernel}_bf16_64_plain"]
        assert record["wide_bytes"] >= 0.9 * record["global_bytes"]


def test_a_pass_moves_little_more_than_it_must():
    """Where the cache keeps what one kernel leaves for the next; the copy of an fp32 prefix is the most of the rest."""
    for prefix_dtype, most in ((torch.float32, 1.25), (torch.bfloat16, 1.2)):
        sizes = replace(counters.PROBLEM, prefix_dtype=prefix_dtype)
        for phase, planned in cuda_counters.plans(sizes, 27).items():
            assert 1 <= planned.footprint / counters.least_bytes(sizes, phase) <= most


def test_nothing_is_worse_than_committed(table, counted):
    worse = []
    for phase, kernels in counted.items():
        now = cuda_counters.ratios(list(kernels.values()), SMALL, phase)
        worse += cuda_counters.regressions(phase, now, table["small"][phase])
    assert not worse, "\n".join(worse)


def test_the_committed_table_is_of_the_present_problem(table):
    assert table["pairs"] == counters.all_pairs(counters.PROBLEM)
    assert table["kept_pairs"] == counters.PROBLEM.H * counters.kept_pairs(counters.PROBLEM)
    (phases,) = table["architectures"].values()
    (ratios,) = table["ratios"].values()
    for phase, kernels in phases.items():
        assert all(kernel["atomics"] == 0 for kernel in kernels)
        assert ratios[phase] == cuda_counters.ratios(kernels, counters.PROBLEM, phase)


@pytest.mark.parametrize(
    "change, worse",
    [
        (dict(), []),
        (dict(traffic=2.01, wide=0.995), []),
        (dict(traffic=2.1), ["forward: traffic was 2.000, is 2.100"]),
        (dict(wide=0.9), ["forward: wide was 1.000, is 0.900"]),
    ],
)
def test_regressions(change, worse):
    committed = dict(tile_waste=1.0, traffic=2.0, wide=1.0)
    assert cuda_counters.regressions("forward", {**committed, **change}, committed) == worse


def test_wide_instructions():
    for opcode in ("cp.async.cg.shared.global", "st.global.v4.u32", "ld.global.nc.v4.f32", "ld.global.v2.b64"):
        assert cuda_counters.WIDE.search(opcode)
    for opcode in ("ld.global.u32", "ld.global.v2.f32", "st.global.u64", "cp.async.ca.shared.global"):
        assert not cuda_counters.WIDE.search(opcode)
