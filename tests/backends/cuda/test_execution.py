"""The PTX that nvcc makes of the CUDA kernels, executed: complete problems, forward and backward, against fp64.

Every run has all of the emulator's checks on (bounds, alignment, uninitialised shared memory, races in shared and
global memory, barriers), and outputs and workspace start as NaN. `cp.async` data arrives at once or as late as allowed,
threads run in order or in random ones; none of that may change a bit.

By default a few instances run on a few schedules; CTKERNELS_TEST_PROFILE=thorough runs every instance, and all edge
cases of the op's own tests.
"""

import os

import pytest
import torch

from ctkernels.testing.calls import Call, cotangents_for, make_call, run
from ctkernels.testing.compare import assert_matches
from tests.backends.triton.test_execution import options_call, split_call, training_call
from tests.op import test_properties
from tests.op.test_edges import EDGES
from tools.gpu.cuda.emulated import BACKEND, Emulator, running_on

pytestmark = pytest.mark.needs_nvcc

THOROUGH = os.environ.get("CTKERNELS_TEST_PROFILE") == "thorough"
SCHEDULES = [("eager", 0), ("lazy", 2), ("eager", 1), *[("lazy", 0), ("lazy", 3)] * THOROUGH]
TYPES = ["bf16", "fp16", "fp32"]
WIDTHS = [64, 80, 96, 128, 256, 512]
PLAIN = [(types, D) for types in ("bf16", "fp16") for D in (64, 128)]
DEFAULT = [("bf16", 128)]  # beside D = 64, which most tests have


def execute(
    call: Call, schedules: list[tuple[str, int]], multiprocessors: int = 4, tf32: bool = False
) -> tuple[dict, list[str]]:
    """Results, the same for all schedules to the bit and right, and the kernels that ran. TF32 is not held to fp64."""
    cotangents = cotangents_for(call)
    first = None
    for mode, seed in schedules:
        with running_on(Emulator(mode, seed, multiprocessors, tf32)) as emulator:
            got = run(call, BACKEND, cotangents)
        if first is None:
            first = got
            if not tf32:
                assert_matches(call, got, cotangents)
        for name, x in got.items():
            assert torch.equal(x, first[name]), f"{name} depends on the schedule ({mode}, {seed})"
    return first, emulator.launched


def names(launched: list[str]) -> set[str]:
    return {name.removeprefix("ctk_") for name in launched}


HEADS = [("bf16", 80, 24), ("fp16", 24, 80), ("bf16+fp32", 192, 128), ("fp32", 60, 64)]  # up to 256, D and Dv apart
SLICED = [("bf16", 512, 300), ("bf16+fp32", 40, 512), ("fp16", 257, 511), ("fp32", 130, 260), ("fp32", 512, 512)]


def mixed_call(types: str, D: int, growth: float = 30.0, **more: object) -> Call:
    """Blocks of the prefix that a tile sees whole, in part, and not at all; rows that share tiles; grouped heads;
    logits that grow along the prefix, so that what was summed up is rescaled (and early keys hardly count)."""
    hidden = torch.tensor([[0, 130], [128, 256], [0, 0], [64, 128]])
    call = make_call(H=4, Hk=2, P=270, D=D, types=types, lens=[20, 70, 1, 33], mask=dict(hidden=hidden), **more)
    call.tensors["prefix_k"] *= torch.linspace(0.2, 0.2 * growth, 270)[:, None].to(call.tensors["prefix_k"].dtype)
    return call


def test_training():
    _, launched = execute(training_call("bf16+fp32"), SCHEDULES)
    kernels = {f"{name}_bf16_64_plain" for name in ("forward", "query", "keys")}
    assert names(launched) == {"setup_rows", "setup_tiles", "pack", "delta_bf16", "fill_out_bf16", *kernels}


def test_whole_partial_and_hidden_blocks():
    execute(mixed_call("bf16", 64), SCHEDULES[:2])


def test_every_option():
    _, launched = execute(options_call(), SCHEDULES[:2])
    assert {"forward_bf16_64_general", "query_bf16_64_general", "keys_bf16_64_general", "sum_parts"} <= names(launched)


def test_work_cut_into_ranges():
    _, launched = execute(split_call(), SCHEDULES[:2], multiprocessors=40)
    assert {"merge_out_bf16", "sum_parts"} <= names(launched)


@pytest.mark.parametrize("types, D", PLAIN if THOROUGH else DEFAULT)
def test_plain_instances(types, D):
    _, launched = execute(mixed_call(types, D), SCHEDULES[:2])
    assert f"forward_{types}_{D}_plain" in names(launched)


@pytest.mark.parametrize("D", WIDTHS if THOROUGH else [64])
@pytest.mark.parametrize("types", TYPES if THOROUGH else ["fp32"])
def test_general_instances(types, D):
    call = mixed_call(types, D, bias=(4, 270), softcap=3.0)
    call.mask["drop_p"] = 0.3
    _, launched = execute(call, SCHEDULES[:2])
    assert f"forward_{types}_{D}_general" in names(launched)


@pytest.mark.parametrize("types, D, Dv", HEADS if THOROUGH else HEADS[:2])
def test_values_of_a_head_dimension_of_their_own(types, D, Dv):
    """The instance of the wider one, for which the narrower ones are copied once, with zeros."""
    schedules = SCHEDULES[:2] if THOROUGH else [SCHEDULES[Dv < D]]
    _, launched = execute(mixed_call(types, D, Dv=Dv), schedules, multiprocessors=40)
    assert {"pack", f"delta_{types[:4]}"} < names(launched)
    assert not [name for name in launched if "_512_" in name]


@pytest.mark.parametrize("types, D, Dv", SLICED if THOROUGH else SLICED[:2])
def test_head_dimensions_above_256(types, D, Dv):
    """In slices, of which the last ones are not full: of D alone, of Dv alone, of both."""
    call = make_call(
        H=4, Hk=2, P=150, D=D, Dv=Dv, types=types, lens=[20, 40, 1], mask=dict(hidden=torch.tensor([[0, 130]] * 3))
    )
    _, launched = execute(call, SCHEDULES[:2])
    kernels = {f"{name}_{types[:4]}_512_general" for name in ("forward", "query", "keys_dk", "keys_dv")}
    assert kernels < names(launched)


@pytest.mark.parametrize("types", TYPES if THOROUGH else ["bf16"])
def test_head_dimensions_above_256_with_every_option(types):
    call = options_call(D=264, Dv=72, types=types)
    _, launched = execute(call, SCHEDULES[:2])
    assert {f"keys_dk_{types}_512_general", "sum_parts"} <= names(launched)


def test_head_dimensions_above_256_cut_into_ranges():
    """Parts of keys and of rows, with as many columns as the results: D and Dv apart."""
    call = split_call(D=72, Dv=264, lens=(20, 17, 15, 25, 11, 18, 21, 15))  # enough tiles of 32 lanes for two ranges
    _, launched = execute(call, SCHEDULES[:1], multiprocessors=80)
    assert {"merge_out_bf16", "sum_parts", "query_bf16_512_general"} <= names(launched)


def test_hidden_and_dropped_tokens_get_exactly_no_gradient():
    call = training_call("bf16+fp32")
    call.mask["hidden"] = torch.tensor([[10, 30]] * 5)
    got, _ = execute(call, SCHEDULES[:1])
    for name in ("dprefix_k", "dprefix_v"):
        assert got[name][:, 10:30].eq(0).all() and got[name][:, 30:].ne(0).any()


@pytest.mark.parametrize(
    "check",
    [
        test_properties.test_same_dropped_tokens_as_the_dense_mask,
        test_properties.test_keys_hidden_from_everybody_may_hold_nan,
        test_properties.test_queries_that_see_nothing,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_property(check):
    """Properties of the op's own tests: the tokens that are dropped, bit for bit, and NaN that must not get through."""
    with running_on(Emulator("lazy", 1)):
        check(BACKEND)


@pytest.mark.parametrize("heads", [{}, dict(D=40, Dv=300, types="bf16")], ids=["16", "40 and 300"])
@pytest.mark.parametrize("make", [test_properties.padded, test_properties.packed])
def test_a_broken_row_breaks_no_other(make, heads):
    with running_on(Emulator()):
        test_properties.test_a_broken_row_breaks_no_other(BACKEND, lambda: make(**heads))


def test_wide_values_are_narrow_ones_side_by_side():
    with running_on(Emulator()):
        test_properties.test_wide_values_are_narrow_ones_side_by_side(BACKEND, test_properties.packed)


@pytest.mark.parametrize("heads", [dict(D=64), dict(D=260, Dv=20, bias=(4, 270))], ids=["64", "260 and 20"])
def test_only_the_gradients_that_are_wanted(heads):
    """Each alone has the bits that it has beside the others."""
    call = mixed_call("bf16", **heads)
    cotangents = cotangents_for(call)
    with running_on(Emulator()):
        everything = run(call, BACKEND, cotangents)
        for name in call.tensors:
            leaves = {n: x.detach().requires_grad_(n == name) for n, x in call.tensors.items()}
            out, lse = test_properties.ct.prefix_attention_varlen(
                *(leaves[n] for n in ("q", "k", "v")), call.cu_seqlens, leaves["prefix_k"], leaves["prefix_v"],
                mask=test_properties.ct.ContextMask(**call.mask), return_lse=True, backend=BACKEND.name,
                prefix_bias=leaves.get("prefix_bias"),
            )  # fmt: skip
            (alone,) = torch.autograd.grad((out, lse), [leaves[name]], cotangents)
            assert torch.equal(alone, everything[f"d{name}"]), name


def test_strides_that_forbid_16_byte_accesses():
    """D = 20 in 16 bits and views into larger tensors: copied once, or written number by number."""
    call = make_call(H=2, Hk=1, S=9, P=40, D=20, types="fp16")
    wide = {name: torch.randn(*(n + 3 for n in x.shape)).to(x.dtype) for name, x in call.tensors.items()}
    sliced = {name: x[tuple(slice(1, 1 + n) for n in call.tensors[name].shape)] for name, x in wide.items()}
    _, launched = execute(call.with_tensors(**sliced), SCHEDULES[:1])
    assert "pack" in names(launched)


def test_tf32_is_near_and_exact_is_the_default():
    call = mixed_call("fp32", 64)
    exact, _ = execute(call, SCHEDULES[:1])
    near, _ = execute(call, SCHEDULES[:1], tf32=True)
    error = (near["out"] - exact["out"]).abs().max()
    assert 1e-5 < error < 1e-2


EDGE_TYPES = ["fp32", "fp16", "bf16+fp32"]
DEFAULT_EDGES = {
    "rows of no tokens", "packed rows, some empty", "context reaching into own keys", "a prefix nobody reads",
    "ragged prefixes, packed rows", "ragged rows, one empty", "decoding with fewer keys, window and ALiBi",
    "window over packed rows", "bias shared by prefixes", "negative scale", "everything packed",
    "values narrower than keys", "values of one number", "keys of one number", "wide values in rows that share tiles",
}  # fmt: skip


@pytest.mark.parametrize("types", EDGE_TYPES if THOROUGH else EDGE_TYPES[2:])
@pytest.mark.parametrize("case", EDGES if THOROUGH else sorted(DEFAULT_EDGES))
def test_edge(case, types):
    execute(make_call(types=types, **EDGES[case]), [("lazy", len(case))])
