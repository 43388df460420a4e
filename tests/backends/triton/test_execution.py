"""The PTX that Triton emits for sm_80 and sm_90, executed: complete problems, forward and backward, against fp64.

Every run has all of the emulator's checks on (bounds, alignment, uninitialised shared memory, races in shared and
global memory, barriers), and outputs start as NaN. `cp.async` data arrives at once or as late as allowed, threads run
in order or in random ones; none of that may change a bit.

By default each kind of problem runs on one architecture or both, on a few schedules; `make test-gpu-full` sweeps.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import ptxemu
import pytest
import torch

from ctkernels.testing.calls import Call, cotangents_for, make_call, run
from ctkernels.testing.compare import assert_matches
from tools.gpu import problems
from tools.gpu.architectures import ARCHITECTURES
from tools.gpu.triton import plans
from tools.gpu.triton.emulate import Emulator

from .emulated import BACKEND, running_on

THOROUGH = os.environ.get("CTKERNELS_TEST_PROFILE") == "thorough"
SCHEDULES = [("eager", 0), ("lazy", 2), ("eager", 1), *[("lazy", 0), ("lazy", 3)] * THOROUGH]
EXECUTED = ["sm_80", "sm_90"]
TRAINING = [("sm_80", "bf16+fp32"), ("sm_90", "bf16+fp32"), ("sm_80", "fp32"), *[("sm_90", "fp32")] * THOROUGH]
KERNELS = ["forward_kernel", "dq_kernel", "own_kernel", "prefix_kernel"]


def training_call(types: str, **more: object) -> Call:
    """Ragged packed rows of grouped heads, each of which leaves out its demonstration, with token dropout."""
    hidden = torch.tensor([[0, 25], [25, 50], [50, 75], [75, 100], [0, 0]])
    mask = dict(hidden=hidden, drop_p=0.2, seed=2**40 + 7, row_ids=torch.tensor([3, 1, 4, 1, 2**32 - 1]))
    return make_call(H=4, Hk=2, P=100, D=64, types=types, lens=[5, 17, 1, 0, 30], mask=mask, **more)


def options_call(D: int = 40, types: str = "bf16", **more: object) -> Call:
    """Two prefixes, padded decoding rows, a window, softcap, ALiBi, a bias per head, an explicit pattern."""
    keep = torch.rand(4, 90, generator=torch.Generator().manual_seed(1)) < 0.7
    return make_call(
        B=4, H=6, Hk=2, S=7, T=20, P=90, D=D, G=2, types=types, bias=(2, 6, 90), mask=dict(keep=keep),
        prefix_index=torch.tensor([1, 0, 1, 1]), prefix_lens=torch.tensor([90, 61]),
        seq_lens=torch.tensor([20, 9, 7, 15]), window=60, softcap=15.0, alibi_slopes=torch.linspace(0.01, 0.3, 6),
        **more,
    )  # fmt: skip


def split_call(D: int = 64, lens: Sequence[int] = (40, 33, 29, 50, 21, 35, 42, 30), **more: object) -> Call:
    """So long a prefix and so many queries that both are cut into ranges, whose results further kernels add up."""
    hidden = torch.arange(0, 8)[:, None] * 64 + torch.tensor([0, 64])
    return make_call(H=8, Hk=2, P=530, D=D, types="bf16+fp32", lens=list(lens), mask=dict(hidden=hidden), **more)


def execute(call: Call, architecture: str, schedules: list[tuple[str, int]]) -> tuple[dict, list[str]]:
    """Results, the same for all schedules to the bit and right, and the kernels that ran."""
    cotangents = cotangents_for(call)
    first = None
    for mode, seed in schedules:
        with running_on(Emulator(ARCHITECTURES[architecture], mode=mode, schedule_seed=seed)) as emulator:
            got = run(call, BACKEND, cotangents)
        if first is None:
            first = got
            assert_matches(call, got, cotangents)
        for name, x in got.items():
            assert torch.equal(x, first[name]), f"{name} depends on the schedule ({mode}, {seed})"
    return first, emulator.launched


@pytest.mark.parametrize("architecture, types", TRAINING)
def test_training(architecture, types):
    _, launched = execute(training_call(types), architecture, SCHEDULES)
    assert [name for name in launched if name in KERNELS] == KERNELS
    assert launched.count("round_kernel") == (2 if types == "bf16+fp32" else 0)  # forward and backward
    assert launched.count("words_kernel") == 2 <= launched.count("tile_words_kernel")


@pytest.mark.parametrize("architecture", EXECUTED if THOROUGH else ["sm_90"])
def test_every_option(architecture):
    _, launched = execute(options_call(), architecture, SCHEDULES[:2])
    assert set(KERNELS) <= set(launched)


@pytest.mark.parametrize("architecture", EXECUTED if THOROUGH else ["sm_80"])
def test_work_cut_into_ranges(architecture):
    _, launched = execute(split_call(), architecture, SCHEDULES[:2])
    assert {"merge_kernel", "sum_kernel"} < set(launched)


def test_without_dropout_whole_blocks_are_skipped_or_unmasked():
    """The other code path of the mask: spans alone, with blocks that all rows of a tile hide."""
    hidden = torch.tensor([[0, 130], [0, 128], [0, 140]])
    call = make_call(H=4, Hk=1, P=200, D=64, types="fp16", lens=[9, 20, 3], mask=dict(hidden=hidden))
    execute(call, "sm_80", SCHEDULES[:2])


def test_hidden_and_dropped_tokens_get_exactly_no_gradient():
    call = training_call("bf16+fp32")
    call.mask["hidden"] = torch.tensor([[10, 30]] * 5)
    got, _ = execute(call, "sm_80", SCHEDULES[:1])
    for name in ("dprefix_k", "dprefix_v"):
        assert got[name][:, 10:30].eq(0).all() and got[name][:, 30:].ne(0).any()


def test_the_checks_see_a_kernel_that_leaves_its_memory():
    """One row of the output is missing: the emulator names the argument, so a wrong offset could not pass above."""
    sizes = problems.Sizes("small", (5, 17), H=2, Hk=1, P=40, D=64, dtype=torch.bfloat16, segments=2)
    inputs = problems.make(sizes)
    plan = plans.forward(inputs, ARCHITECTURES["sm_80"])
    *before, launch = plan.launches
    for earlier in before:
        Emulator(ARCHITECTURES["sm_80"])(earlier)
    short = torch.empty(launch.args["LSE"].numel() - 1)
    with pytest.raises(ptxemu.KernelFault) as caught:
        Emulator(ARCHITECTURES["sm_80"])(replace(launch, args={**launch.args, "LSE": short}))
    assert caught.value.kind == "out_of_bounds"


if THOROUGH:  # a minute, for the compiler; the interpreter shows the same in tests/op/test_properties.py

    def test_a_seed_in_memory_has_the_bits_of_its_number():
        def call(seed: int | torch.Tensor) -> Call:
            mask = dict(drop_p=0.3, seed=seed)
            return make_call(H=2, Hk=1, P=70, D=16, types="bf16", lens=[5, 9], mask=mask)

        cotangents = cotangents_for(call(0))
        with running_on(Emulator(ARCHITECTURES["sm_80"])):
            kept, number, other = (run(call(x), BACKEND, cotangents) for x in (torch.tensor(2**40 + 7), 2**40 + 7, 5))
        assert all(torch.equal(kept[name], x) for name, x in number.items())
        assert not torch.equal(number["out"], other["out"])
