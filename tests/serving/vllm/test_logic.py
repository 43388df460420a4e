"""The connector's parts that need no vLLM: salts, matching, slots, sharing of heads, memory."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctkernels.serving.vllm.loads import Load, Plan
from ctkernels.serving.vllm.memory import Kept, PrefixMemory, heads_of_rank, layers_of_rank, share
from ctkernels.serving.vllm.salts import MARK, Placed, placed

NAMES = st.text("aB7/:. @%\\é", min_size=1, max_size=8)


@given(NAMES, st.integers(1, 1 << 20), st.sampled_from(["c0", "ffee"]), st.text("a:/ é", max_size=6))
def test_a_salt_says_what_was_put_into_it(name, length, checksum, salt):
    prefix = Placed(name, length, checksum, salt)
    assert placed(str(prefix)) == prefix


@given(st.lists(st.tuples(NAMES, st.integers(1, 9), st.sampled_from(["aa", "bb"]), st.sampled_from(["", ":", "x:1"]))))
def test_different_prefixes_and_tenants_have_different_salts(prefixes):
    salts = {str(Placed(*prefix)) for prefix in prefixes}
    assert len(salts) == len(set(prefixes)) and all(salt.startswith(MARK) for salt in salts)


def test_other_salts_are_left_alone_and_broken_ones_raise():
    assert placed(None) is None and placed("tenant-7") is None
    for broken in ("ctkernels:", "ctkernels:5:aa", "ctkernels:x:aa:n:", "ctkernels:0:aa:n:", "ctkernels:5::n:"):
        with pytest.raises(ValueError, match="does not say which prefix"):
            placed(broken)


PREFIX = Placed("routing", 10, "c0ffee")


@pytest.mark.parametrize("computed", [0, 4, 8, 12])
def test_only_what_vllm_does_not_have_is_loaded(computed):
    """P = 10 in blocks of 4: the last one holds 2 prefix tokens and the first tokens of the request."""
    plan = Plan()
    count = plan.matched("r", str(PREFIX), 15, 15, computed)
    assert count == max(0, 10 - computed)
    plan.allocated("r", [7, 3, 9, 5], count)
    loads = plan.take()
    assert plan.take() == []
    if computed >= 10:
        assert loads == []
        return
    (load,) = loads
    blocks = [7, 3, 9, 5]
    assert load.slots(4).tolist() == [blocks[t // 4] * 4 + t % 4 for t in range(computed, 10)]
    assert load.touched(4) == blocks[computed // 4 : 3]


def test_a_preempted_request_is_loaded_anew_and_counts_what_vllm_kept():
    plan = Plan()
    assert plan.matched("r", str(PREFIX), 15, 15, 0) == 10
    plan.allocated("r", [0, 1, 2, 3], 10)
    plan.take()
    assert plan.matched("r", str(PREFIX), 19, 15, 4) == 6  # 4 tokens were generated, one block stayed
    plan.allocated("r", [5, 6, 7, 8, 9], 6)
    (load,) = plan.take()
    assert (load.first, load.count, load.blocks) == (4, 6, (5, 6, 7, 8, 9))


def test_requests_without_a_prefix_load_nothing():
    plan = Plan()
    assert plan.matched("r", None, 15, 15, 0) == 0 and plan.matched("s", "tenant-7", 15, 15, 4) == 0
    plan.allocated("r", [0], 0)
    assert plan.take() == []


@pytest.mark.parametrize("salt, prompt", [("ctkernels:nonsense", 15), (str(PREFIX), 10), (str(PREFIX), 3)])
def test_a_request_that_cannot_be_served_is_never_computed_as_a_plain_one(salt, prompt):
    """All its tokens but one count as loaded, so that the load that fails ends it."""
    plan = Plan()
    count = plan.matched("r", salt, prompt, prompt, 0)
    assert count == prompt - 1
    plan.allocated("r", range(9), count)
    (load,) = plan.take()
    assert load.refused and load.touched(4) == list(range(-(-count // 4)))
    plan.forget("r")
    assert plan.matched("r", None, 5, 5, 0) == 0


def test_refused_requests_stay_so_until_they_end():
    plan = Plan()
    plan.refuse("r", "prompt_logprobs")
    assert plan.matched("r", str(PREFIX), 15, 15, 0) == 14
    plan.allocated("r", range(4), 14)
    assert plan.take()[0].refused == "prompt_logprobs"


@pytest.mark.parametrize("heads, ranks", [(8, 1), (8, 2), (8, 8), (2, 4), (1, 4), (3, 3)])
def test_ranks_have_all_heads_in_order(heads, ranks):
    parts = [list(range(heads))[heads_of_rank(heads, rank, ranks)] for rank in range(ranks)]
    if ranks <= heads:
        assert list(itertools.chain(*parts)) == list(range(heads))
    else:  # a head is shared by neighbours
        assert parts == [[rank * heads // ranks] for rank in range(ranks)]


def test_heads_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="3 KV heads cannot be split over 2 ranks"):
        heads_of_rank(3, 0, 2)


def test_a_share_is_a_copy_in_the_order_and_type_of_the_cache():
    x = torch.randn(4, 5, 3)
    part = share(x, 1, 2, torch.bfloat16)
    assert part.shape == (5, 2, 3) and part.is_contiguous() and part.dtype == torch.bfloat16
    assert torch.equal(part, x[2:].transpose(0, 1).bfloat16())
    same = share(x, 0, 1, torch.float32)
    same.zero_()
    assert x.abs().sum() > 0


def test_layers_by_order_where_a_rank_has_all_and_by_number_where_not():
    assert layers_of_rank(3, [0, 1, 2], whole=True) == [0, 1, 2]
    assert layers_of_rank(3, [4, 0, 2], whole=True) == [2, 0, 1]  # others borrow their keys
    assert layers_of_rank(4, [2, 3], whole=False) == [2, 3]
    for count, own, whole in ((3, [0, 1], True), (2, [0, 1, 2], True), (3, [2, 3], False)):
        with pytest.raises(ValueError, match=f"has {count} layers"):
            layers_of_rank(count, own, whole)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
def test_memory_never_holds_more_than_its_limit_and_keeps_what_was_used_last(puts):
    kept: Kept[int, int] = Kept(20)
    order: list[tuple[int, int]] = []  # least recently used first
    for key, size in puts:
        order = [entry for entry in order if entry[0] != key]
        if kept.get(key) is None:
            kept.put(key, size, size)
        else:
            size = kept.get(key)
        order.append((key, size))
        while sum(s for _, s in order) > 20:
            order.pop(0)
        assert kept.bytes == sum(s for _, s in order) <= 20 and len(kept) == len(order)
        assert all(kept._values[k] == (s, s) for k, s in order)


def test_what_is_too_large_is_read_each_time_and_what_fails_is_not_kept():
    reads = []

    def load(key):
        reads.append(key)
        if key == "gone":
            raise ValueError("gone")
        return [(torch.zeros(8), torch.zeros(8))]

    for limit, expected in ((1 << 10, 1), (10, 2)):
        memory, reads[:] = PrefixMemory(limit, load), []
        memory.get("a"), memory.get("a")
        assert len(reads) == expected
    for _ in range(2):
        with pytest.raises(ValueError, match="gone"):
            memory.get("gone")
    assert reads.count("gone") == 2


def test_a_load_knows_the_blocks_it_writes_to():
    load = Load("r", PREFIX, 5, 5, (4, 8, 6, 2))
    assert load.touched(4) == [8, 6]
    assert load.slots(4).tolist() == [33, 34, 35, 24, 25]
