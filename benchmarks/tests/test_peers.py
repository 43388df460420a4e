"""What is measured is right: the peers compute the same attention, the check sees errors, FLOPs are those kept."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from benchmarks import harness, peers
from benchmarks.bench_attention import measure, usable
from benchmarks.cases import FLOPS, Case, Inputs

TOY = Case("toy", B=5, H=4, Hk=2, S=6, P=33, D=16, segments=3, drop_p=0.2)
CASES = {
    "grouped heads": TOY,
    "one head per group": replace(TOY, Hk=4, drop_p=0.0),
    "hidden share": replace(TOY, segments=0, hidden_share=0.5),
    "several prefixes": replace(TOY, G=3),
    "decoding": replace(TOY, S=1, past=7),
    "bf16": replace(TOY, dtype=torch.bfloat16),
}


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    monkeypatch.setattr(harness.MatrixProduct, "SIZES", (64,))
    monkeypatch.setattr(harness.MatrixProduct, "LAP", 1e-4)


@pytest.mark.parametrize("peer", ["ctkernels", "eager", "sdpa"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_peer_agrees_with_the_reference(peer, case):
    x = Inputs(case)
    entry = usable(peer, x, True, peers.truth(x))
    assert entry["backward"] and 0 < entry["error"] <= peers.AGREEMENT[case.dtype]


def packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    """What flash_attn documents for rows packed one after another; a causal mask is aligned to the last key."""
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert causal and max_seqlen_q == max(queries) and max_seqlen_k == max(keys) and len(k) == sum(keys)
    rows = []
    for one_q, one_k, one_v in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        visible = torch.ones(len(one_q), len(one_k), dtype=torch.bool).tril(len(one_k) - len(one_q))
        heads = (x.transpose(0, 1)[None] for x in (one_q, one_k, one_v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible, enable_gqa=True)
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_flash_attn_on_gathered_keys_agrees(monkeypatch, case):
    flash_attn = types.ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = packed_attention
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    x = Inputs(case)
    entry = usable("flash", x, True, peers.truth(x))
    assert entry["backward"] and 0 < entry["error"] <= peers.AGREEMENT[case.dtype]


def test_flash_attn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    x = Inputs(TOY)
    assert usable("flash", x, True, peers.truth(x)) == {"reason": "flash-attn is not installed"}


def test_the_compiled_peers_agree_and_flex_says_what_it_cannot():
    x = Inputs(TOY)
    expected = peers.truth(x)
    assert usable("compiled", x, True, expected)["backward"]
    entry = usable("flex", x, True, expected)
    assert not entry["backward"] and "backward on CPU" in entry["reason_backward"]
    assert 0 < entry["error"] <= peers.AGREEMENT[torch.float32]


def sees_all(x: Inputs) -> torch.Tensor:
    return peers.eager_attention(*x.leaves.values(), x.prefix_index, torch.zeros_like(x.bias))


def loses_prefix_gradient(x: Inputs) -> torch.Tensor:
    leaves = {**x.leaves, "prefix_v": x.prefix_v * 0.99 + x.prefix_v.detach() * 0.01}
    return peers.eager_attention(*leaves.values(), x.prefix_index, x.bias)


@pytest.mark.parametrize("wrong, name", [(sees_all, "out|d"), (loses_prefix_gradient, "dprefix_v")])
@pytest.mark.parametrize("budget", [peers.CHECK_FLOPS, 1, 14 * 2 * 6 * 39 * 16 * 3])
def test_a_wrong_peer_is_refused(monkeypatch, wrong, name, budget):
    """Also where only some rows (the third budget: three) and heads are checked."""
    monkeypatch.setattr(peers, "CHECK_FLOPS", budget)
    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    with pytest.raises(ArithmeticError, match=f"wrong: ({name}).* differs from the fp64 reference"):
        measure(TOY, ["wrong"], seconds=0)


def test_the_check_takes_what_the_budget_allows(monkeypatch):
    x = Inputs(TOY)
    assert peers.truth(x).rows.tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(peers, "CHECK_FLOPS", 14 * 2 * 6 * 39 * 16 * 3)  # three rows of one KV head
    some = peers.truth(x)
    assert some.rows.tolist() == [0, 2, 4] and some.values["dq"].shape == (3, 2, 6, 16)
    assert some.dout[1].eq(0).all() and torch.equal(some.dout[2], x.dout[2])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_flops_are_those_of_the_visible_pairs(case):
    visible = int(Inputs(case).visible.sum())
    assert case.kept_pairs == visible < case.B * case.S * (case.P + case.T)
    assert case.flops("both") == 7 * 2 * visible * case.H * case.D
    assert FLOPS["both"] == FLOPS["forward"] + FLOPS["backward"]


def test_a_measurement_has_times_rates_and_memory():
    result = measure(TOY, ["eager"], seconds=0)
    for name in ("ctkernels", "eager"):
        entry = result["entries"][name]
        both = entry["times"]["both"]
        assert both.count == 3 and 0 < both.best <= both.q1 <= both.median <= both.q3
        assert entry["rates"]["both"]["median"] == pytest.approx(result["flops"]["both"] / both.median)
        assert entry["extra_bytes"] is None or entry["extra_bytes"] >= 0
    assert 0 < result["ceiling"]["median"] <= result["ceiling"]["best"]


def test_a_peer_that_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(harness, "free_memory", lambda device: 2000)
    result = measure(TOY, ["eager", "sdpa"], seconds=0)
    assert set(result["entries"]["ctkernels"]) > {"times", "rates"}
    for name in ("eager", "sdpa"):
        assert result["entries"][name].keys() == {"reason"} and "needs about" in result["entries"][name]["reason"]


def test_works_run_in_turn():
    ran = []

    def work(name):
        return lambda: (ran.append(name), {"both": len(ran)})[1]

    times = harness.in_turn({name: work(name) for name in "abc"}, seconds=0, least=2)
    assert "".join(ran) == "abcabc"
    assert times["b"]["both"] == harness.Spread(3.5, 2.75, 4.25, 2, 2)


def test_memory_counts_what_is_used_between_and_not_what_is_returned():
    def work():
        between = torch.ones(16 << 20, dtype=torch.uint8)
        return [torch.ones(8 << 20, dtype=torch.uint8), between[:4].clone()]

    size = harness.extra_memory(work, "cpu")
    if size is not None:  # None: the system does not tell
        assert 14 << 20 < size < 20 << 20
