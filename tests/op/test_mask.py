"""ContextMask: the random stream, construction, leave-one-out spans, and the dense form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctkernels as ct
from ctkernels.mask import philox4x32
from ctkernels.testing import oracle
from ctkernels.testing.strategies import SEEDS, masks

# (counter, key, output) of philox4x32-10 as published with Random123
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, output):
    assert oracle.philox(counter, key) == output
    words = philox4x32([torch.tensor(c) for c in counter], key)
    assert tuple(int(w) for w in words) == output


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_philox_matches_plain_integers(counter, key):
    words = philox4x32([torch.tensor(c) for c in counter], key)
    assert tuple(int(w) for w in words) == oracle.philox(counter, key)


@given(data=st.data(), B=st.integers(0, 4), P=st.sampled_from([0, 1, 3, 4, 5, 37, 130]))
def test_dense_matches_the_definition(data, B, P):
    fields = data.draw(masks(torch.Generator().manual_seed(P), B, P, P + 9))
    length = fields.get("length", P)
    expected = oracle.context_visible(B, length, **{n: x for n, x in fields.items() if n != "length"})
    dense = ct.ContextMask(**fields).dense(B, length)
    assert dense.dtype == torch.bool
    assert torch.equal(dense, expected)


def test_dense_positions_beyond_the_context_are_visible():
    mask = ct.ContextMask(hidden=torch.tensor([[0, 3]]), drop_p=0.99, seed=1, length=3)
    assert mask.dense(1, 6).tolist() == [[False, False, False, True, True, True]]


@given(seed=SEEDS, row_id=st.sampled_from([0, 1, 2**31, 2**32 - 1]), drop_p=st.sampled_from([1e-9, 0.3, 0.999]))
def test_dropout_of_any_seed_and_row(seed, row_id, drop_p):
    dense = ct.ContextMask(drop_p=drop_p, seed=seed, row_ids=torch.tensor([row_id])).dense(1, 23)
    assert dense.tolist() == oracle.kept_tokens(seed, [row_id], 23, drop_p).tolist()


def test_negative_seed_is_its_64_bit_pattern():
    for seed in (-1, -(2**63), -123456789):
        same = [ct.ContextMask(drop_p=0.5, seed=s).dense(3, 200) for s in (seed, seed + 2**64)]
        assert torch.equal(*same)


def test_every_bit_of_the_seed_counts():
    base = ct.ContextMask(drop_p=0.5).dense(1, 200)
    for bit in range(64):
        assert not torch.equal(base, ct.ContextMask(drop_p=0.5, seed=1 << bit).dense(1, 200)), f"bit {bit} is ignored"


def test_dropout_rate_and_independence():
    """A drop rate of p within 5 standard errors, different rows and seeds, and nested patterns for growing p."""
    rows, length = 64, 2000
    dense = {p: ct.ContextMask(drop_p=p, seed=7).dense(rows, length) for p in (0.05, 0.1, 0.5)}
    for p, visible in dense.items():
        rate = 1 - visible.double().mean().item()
        assert abs(rate - p) < 5 * (p * (1 - p) / (rows * length)) ** 0.5
    assert torch.equal(dense[0.5] & dense[0.1], dense[0.5])  # what p = 0.1 drops, p = 0.5 drops too
    assert len({tuple(row.tolist()) for row in dense[0.5]}) == rows


def test_default_row_ids_count_from_zero():
    implied = ct.ContextMask(drop_p=0.5, seed=3).dense(5, 64)
    assert torch.equal(implied, ct.ContextMask(drop_p=0.5, seed=3, row_ids=torch.arange(5)).dense(5, 64))


def test_leave_one_out():
    segments, held_out = torch.tensor([0, 4, 4, 9]), torch.tensor([2, -1, 0, 1])
    mask = ct.ContextMask.leave_one_out(segments, held_out)
    expected = torch.ones(4, 9, dtype=torch.bool)
    expected[0, 4:9] = False
    expected[2, 0:4] = False
    assert torch.equal(mask.dense(4, 9), expected)


def test_values_on_other_devices_are_not_waited_for():
    """Reading them would stop the queue of a GPU in every step."""
    segments, held_out = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (4, 2))
    mask = ct.ContextMask.leave_one_out(segments, held_out, 0.4, 99, held_out)
    assert mask.hidden.shape == (2, 2) and mask.hidden.device.type == "meta"


def test_a_mask_moves():
    mask = ct.ContextMask(hidden=torch.tensor([[0, 2]]), drop_p=0.5, seed=7, row_ids=torch.tensor([3]), length=9)
    moved = mask.to("meta")
    assert moved.hidden.device == moved.row_ids.device == torch.device("meta") and moved.keep is None
    assert (moved.drop_p, moved.seed, moved.length) == (0.5, 7, 9) and mask.to("cpu") is mask


def test_leave_one_out_passes_the_random_stream_on():
    segments, held_out, ids = torch.tensor([0, 10, 30]), torch.tensor([1, 0]), torch.tensor([8, 3])
    mask = ct.ContextMask.leave_one_out(segments, held_out, 0.4, 99, ids)
    assert torch.equal(mask.dense(2, 30), oracle.context_visible(2, 30, mask.hidden, 0.4, 99, ids))


def test_leave_one_out_without_demonstrations():
    mask = ct.ContextMask.leave_one_out(torch.tensor([0]), torch.tensor([-1, -1]))
    assert mask.dense(2, 0).shape == (2, 0)


def test_leave_one_out_rejects():
    segments = torch.tensor([0, 4, 9])
    for held_out, culprit in (([0, 2], "2"), ([-2], "-2"), ([7], "7")):
        with pytest.raises(ValueError, match=rf"held_out.*\[-1, 2\).*got {culprit}"):
            ct.ContextMask.leave_one_out(segments, torch.tensor(held_out))
    with pytest.raises(ValueError, match=r"segments.*non-decreasing.*\[0, 5, 3\]"):
        ct.ContextMask.leave_one_out(torch.tensor([0, 5, 3]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"segments.*-1"):
        ct.ContextMask.leave_one_out(torch.tensor([-1, 5]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"segments.*\[K\+1\]"):
        ct.ContextMask.leave_one_out(torch.zeros(2, 2, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"segments.*int.*float"):
        ct.ContextMask.leave_one_out(torch.tensor([0.0, 5.0]), torch.tensor([0]))
    with pytest.raises(TypeError, match=r"held_out.*int.*float"):
        ct.ContextMask.leave_one_out(segments, torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"held_out.*\[B\].*\(1, 1\)"):
        ct.ContextMask.leave_one_out(segments, torch.tensor([[0]]))


REJECTED = [
    (dict(drop_p=1.0), ValueError, r"drop_p.*\[0, 1\).*1\.0"),
    (dict(drop_p=-0.1), ValueError, r"drop_p.*\[0, 1\).*-0\.1"),
    (dict(drop_p=float("nan")), ValueError, r"drop_p.*\[0, 1\).*nan"),
    (dict(drop_p="0.1"), TypeError, r"drop_p.*str"),
    (dict(drop_p=None), TypeError, r"drop_p.*None"),
    (dict(seed=2**64), ValueError, rf"seed.*64.*{2**64}"),
    (dict(seed=-(2**63) - 1), ValueError, r"seed.*64"),
    (dict(seed=1.5), TypeError, r"seed.*int.*float"),
    (dict(length=-1), ValueError, r"length.*-1"),
    (dict(length=2.0), TypeError, r"length.*int.*float"),
    (dict(hidden=torch.zeros(3, dtype=torch.long)), ValueError, r"hidden.*\[B, 2\].*\(3,\)"),
    (dict(hidden=torch.zeros(3, 3, dtype=torch.long)), ValueError, r"hidden.*\[B, 2\].*\(3, 3\)"),
    (dict(hidden=torch.zeros(3, 2)), TypeError, r"hidden.*int.*float32"),
    (dict(hidden=[[0, 1]]), TypeError, r"hidden.*tensor.*list"),
    (dict(hidden=torch.tensor([[0, 1], [3, 2]])), ValueError, r"hidden.*start <= end.*\(3, 2\).*row 1"),
    (dict(hidden=torch.tensor([[-1, 1]])), ValueError, r"hidden.*\(-1, 1\)"),
    (dict(hidden=torch.tensor([[0, 5]]), length=4), ValueError, r"hidden.*4.*\(0, 5\)"),
    (dict(row_ids=torch.zeros(2, 2, dtype=torch.long)), ValueError, r"row_ids.*\[B\].*\(2, 2\)"),
    (dict(row_ids=torch.zeros(2)), TypeError, r"row_ids.*int.*float32"),
    (dict(row_ids=torch.tensor([0, -1])), ValueError, r"row_ids.*-1"),
    (dict(row_ids=torch.tensor([2**32])), ValueError, rf"row_ids.*{2**32}"),
    (dict(keep=torch.ones(2, 4)), TypeError, r"keep.*bool.*float32"),
    (dict(keep=torch.ones(4, dtype=torch.bool)), ValueError, r"keep.*\[B, C\].*\(4,\)"),
    (dict(keep=torch.ones(2, 4, dtype=torch.bool), length=5), ValueError, r"keep.*5.*\(2, 4\)"),
    (
        dict(keep=torch.ones(2, 4, dtype=torch.bool), hidden=torch.zeros(3, 2, dtype=torch.long)),
        ValueError,
        r"(?s)(?=.*hidden)(?=.*keep)(?=.*2)(?=.*3)",
    ),
    (
        dict(row_ids=torch.arange(4), hidden=torch.zeros(3, 2, dtype=torch.long)),
        ValueError,
        r"(?s)(?=.*hidden)(?=.*row_ids)(?=.*4)(?=.*3)",
    ),
]


@pytest.mark.parametrize(
    ("fields", "error", "message"), REJECTED, ids=lambda x: ",".join(x) if isinstance(x, dict) else ""
)
def test_constructor_rejects(fields, error, message):
    with pytest.raises(error, match=message):
        ct.ContextMask(**fields)


def test_dense_rejects_another_number_of_rows():
    for fields in (
        dict(hidden=torch.zeros(3, 2, dtype=torch.long)),
        dict(row_ids=torch.arange(3)),
        dict(keep=torch.ones(3, 4) > 0),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(fields))}.*2.*3"):
            ct.ContextMask(**fields).dense(2, 4)


@pytest.mark.parametrize("seed", [torch.tensor(1.0), torch.zeros(2, dtype=torch.int64), torch.tensor(1).int(), "1"])
def test_a_seed_that_is_neither_a_number_nor_one_in_memory_is_refused(seed):
    with pytest.raises(TypeError, match="seed must be a 64-bit integer or an int64 tensor"):
        ct.ContextMask(drop_p=0.5, seed=seed)


def test_a_seed_in_memory_elsewhere_is_refused():
    mask = ct.ContextMask(drop_p=0.5, seed=torch.tensor(1, device="meta"))
    q, prefix = torch.zeros(1, 1, 2, 8), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match=r"mask\.seed must be on q's device cpu, got meta"):
        ct.prefix_attention(q, q, q, prefix, prefix, mask)
