"""Named edge cases, each against the dense oracle, forward and backward, in three types, padded and packed."""

import pytest
import torch

from ctkernels.testing.calls import Call, cotangents_for, cu_seqlens_of, make_call, run
from ctkernels.testing.compare import assert_matches, assert_right_or_refused

INF = float("inf")


def spans(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def no(B: int, C: int) -> torch.Tensor:
    return torch.zeros(B, C, dtype=torch.bool)


EDGES = {
    # sizes
    "plain": {},
    "no prefix": dict(P=0),
    "prefix of one token": dict(P=1),
    "rows of one token": dict(S=1),
    "rows of no tokens": dict(S=0),
    "no rows": dict(B=0),
    "no rows and no tokens": dict(B=0, S=0, P=0),
    "no packed rows": dict(lens=[]),
    "packed rows of no tokens": dict(lens=[0, 0]),
    "packed rows, some empty": dict(lens=[0, 3, 0, 5, 1, 0]),
    "no queries but keys": dict(S=0, T=4),
    "no prefix, rows of one token": dict(P=0, S=1),
    "head dimension 1": dict(D=1),
    "head dimension 17": dict(D=17),
    "head dimension 80": dict(D=80),
    "head dimension 255": dict(D=255),
    "head dimension 256": dict(D=256),
    "head dimension 257": dict(D=257),
    "head dimension 512": dict(D=512),
    "values narrower than keys": dict(D=192, Dv=128),
    "values wider than keys": dict(D=64, Dv=512),
    "values of one number": dict(D=17, Dv=1),
    "keys of one number": dict(D=1, Dv=80),
    "odd values over packed rows": dict(D=40, Dv=17, lens=[4, 0, 9, 1]),
    "wide values in rows that share tiles": dict(D=64, Dv=257, lens=[i % 4 for i in range(60)], P=140, H=2, Hk=1),
    "seven heads per KV head": dict(H=14, Hk=2),
    "every head its own KV head": dict(H=5, Hk=5),
    "long prefix": dict(B=2, P=1100, S=3, H=2, Hk=1),
    "long row": dict(B=1, P=5, S=300, H=2, Hk=1),
    "long packed rows": dict(lens=[130, 1, 67, 200], P=70, H=2, Hk=1),
    "many short rows": dict(B=90, S=2, P=40, H=2, Hk=1),
    "many packed rows": dict(lens=[i % 4 for i in range(120)], P=40, H=2, Hk=1),
    # which keys
    "whole prefix hidden": dict(mask=dict(hidden=spans((0, 11), (0, 11), (0, 11)))),
    "whole prefix hidden from one row": dict(mask=dict(hidden=spans((0, 0), (0, 11), (3, 5)))),
    "all tokens dropped": dict(mask=dict(keep=no(3, 11))),
    "drop_p just below one": dict(mask=dict(drop_p=1 - 2**-53, seed=1)),
    "empty spans": dict(mask=dict(hidden=spans((0, 0), (11, 11), (4, 4)))),
    "span, keep and dropout at once": dict(
        mask=dict(
            hidden=spans((0, 3), (2, 9), (8, 11)), keep=torch.arange(33).view(3, 11) % 5 > 0, drop_p=0.3, seed=2**64 - 1
        )
    ),
    "context shorter than the prefix": dict(
        mask=dict(length=4, drop_p=0.6, seed=3, hidden=spans((0, 2), (1, 4), (4, 4)))
    ),
    "context of no positions": dict(mask=dict(length=0, drop_p=0.9)),
    "context reaching into own keys": dict(
        mask=dict(length=14, hidden=spans((9, 13), (11, 14), (0, 14)), drop_p=0.3, seed=4)
    ),
    "context in own keys only": dict(
        P=0, S=9, mask=dict(length=6, hidden=spans((0, 3), (3, 6), (1, 5)), drop_p=0.2, seed=5)
    ),
    "context in packed rows of their own": dict(
        P=0, lens=[7, 2, 9], mask=dict(length=6, hidden=spans((0, 3), (3, 6), (1, 5)), drop_p=0.2, seed=5)
    ),
    "own keys kept by pattern": dict(mask=dict(length=16, keep=torch.arange(48).view(3, 16) % 3 > 0)),
    "context longer than all keys": dict(
        mask=dict(length=40, drop_p=0.5, seed=12, hidden=spans((0, 40), (9, 39), (30, 40)))
    ),
    "nothing visible to a row": dict(mask=dict(length=16, hidden=spans((0, 16), (0, 0), (2, 16)))),
    "nothing visible at all": dict(mask=dict(length=16, keep=no(3, 16))),
    "dropout over many rows": dict(B=40, S=2, P=70, H=2, Hk=1, mask=dict(drop_p=0.5, seed=11)),
    "leave-one-out over many packed rows": dict(
        lens=[3, 5, 2, 7, 1, 4] * 6,
        P=60,
        H=2,
        Hk=1,
        mask=dict(hidden=torch.tensor([[10 * (b % 6), 10 * (b % 6) + 10] for b in range(36)]), drop_p=0.1, seed=6),
    ),
    "rows in reverse with their ids": dict(mask=dict(drop_p=0.5, seed=7, row_ids=integers(2, 1, 0))),
    "large row ids": dict(mask=dict(drop_p=0.5, seed=7, row_ids=integers(2**32 - 1, 2**31, 0))),
    # several prefixes
    "three prefixes": dict(G=3, B=5, prefix_index=integers(2, 0, 2, 1, 0)),
    "a prefix nobody reads": dict(G=3, prefix_index=integers(2, 0, 2)),
    "int32 indices": dict(G=3, prefix_index=integers(2, 0, 2).int(), seq_lens=integers(5, 1, 2).int()),
    "ragged prefixes, one empty": dict(G=3, B=4, prefix_index=integers(0, 1, 2, 1), prefix_lens=integers(11, 0, 6)),
    "ragged prefixes, packed rows": dict(
        G=3,
        lens=[4, 2, 5],
        prefix_index=integers(1, 0, 2),
        prefix_lens=integers(3, 11, 0),
        mask=dict(drop_p=0.4, seed=8),
    ),
    "ragged prefixes with a window and ALiBi": dict(
        G=2, prefix_index=integers(0, 1, 0), prefix_lens=integers(4, 9), window=6, alibi_slopes=torch.rand(4)
    ),
    "one prefix with an index": dict(G=1, prefix_index=integers(0, 0, 0)),
    "one short prefix": dict(prefix_lens=integers(4)),
    # ragged rows and decoding
    "ragged rows, one empty": dict(seq_lens=integers(0, 5, 2)),
    "all rows empty": dict(seq_lens=integers(0, 0, 0)),
    "more keys than queries": dict(S=2, T=9),
    "decoding one token of ragged rows": dict(S=1, T=9, seq_lens=integers(9, 1, 4)),
    "decoding two tokens of ragged rows": dict(S=2, T=9, seq_lens=integers(2, 9, 5)),
    "decoding with fewer keys than queries": dict(S=4, T=9, seq_lens=integers(1, 0, 9)),
    "decoding with fewer keys, window and ALiBi": dict(
        S=4, T=9, seq_lens=integers(1, 0, 9), window=6, alibi_slopes=torch.tensor([0.5, 0.25, 0.0, 2.0])
    ),
    "decoding with a window": dict(S=2, T=30, seq_lens=integers(2, 30, 17), window=9),
    "decoding with dropout and a span": dict(
        S=1, T=4, mask=dict(drop_p=0.5, seed=9, hidden=spans((0, 5), (5, 11), (0, 0)))
    ),
    # rules and logits
    # few lanes over long prefixes: several units per tile, and products along D
    "decoding one row, one head": dict(B=1, H=1, Hk=1, S=1, T=4, P=1500, D=64),
    "decoding one row, two heads": dict(B=1, H=2, Hk=1, S=1, T=140, P=600, D=32, mask=dict(drop_p=0.5, seed=3)),
    "decoding one row, groups of three": dict(
        B=1, H=6, Hk=2, S=1, T=4, P=1500, D=96, mask=dict(hidden=spans((9, 900)))
    ),
    "decoding one row, groups of four": dict(B=1, H=4, Hk=1, S=1, T=1, P=900, D=256, mask=dict(drop_p=0.9, seed=4)),
    "decoding one row, all features": dict(
        B=1, H=3, Hk=1, S=1, T=9, P=1300, D=128, bias=(3, 1300), softcap=2.0, window=1100, alibi_slopes=torch.rand(3)
    ),
    "decoding rows of their own prefixes": dict(
        B=3, H=3, Hk=1, S=1, T=5, P=700, D=64, G=3, prefix_index=integers(2, 0, 1), prefix_lens=integers(700, 0, 300)
    ),
    "a span of the prefix hidden from all": dict(
        B=2, H=1, Hk=1, S=1, P=1100, D=32, mask=dict(hidden=spans((0, 1100), (0, 512)))
    ),
    "five queries over a long prefix": dict(B=1, H=2, Hk=1, S=5, P=1500, D=64),
    "decoding with values narrower than keys": dict(B=1, H=2, Hk=1, S=1, P=700, D=192, Dv=128),
    "decoding with values wider than keys": dict(B=1, H=3, Hk=1, S=1, T=9, P=1500, D=64, Dv=512),
    "decoding with odd values": dict(B=2, H=2, Hk=1, S=1, P=300, D=64, Dv=17),
    "bidirectional": dict(causal=False),
    "bidirectional ragged rows": dict(causal=False, seq_lens=integers(0, 5, 2)),
    "bidirectional packed rows with a window": dict(causal=False, lens=[4, 9, 1], window=3),
    "bidirectional with ALiBi": dict(causal=False, alibi_slopes=torch.rand(4)),
    "window of one": dict(window=1),
    "window inside the row": dict(S=20, window=4),
    "window reaching into the prefix": dict(S=20, P=50, window=15),
    "window that exempts the prefix": dict(S=20, P=50, window=15, window_prefix=False),
    "window of one that exempts the prefix": dict(window=1, window_prefix=False),
    "window larger than everything": dict(window=2**31 - 1),
    "window over ragged rows": dict(window=5, seq_lens=integers(0, 5, 2)),
    "window over packed rows": dict(window=9, lens=[20, 3, 11], P=50),
    "softcap": dict(softcap=0.7),
    "softcap with a window and a span": dict(softcap=2.0, window=12, mask=dict(hidden=spans((0, 4), (4, 8), (8, 11)))),
    "ALiBi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.0, 2.0])),
    "ALiBi over packed rows": dict(lens=[4, 9, 1], alibi_slopes=torch.tensor([0.5, 0.25, 0.0, 2.0])),
    "fp64 ALiBi slopes": dict(alibi_slopes=torch.tensor([1 / 3, 0.1, 1 / 7, 2.0], dtype=torch.float64)),
    "bias per key": dict(bias=(11,)),
    "bias per head and key": dict(bias=(4, 11)),
    "bias per prefix, head and key": dict(G=3, bias=(3, 4, 11), prefix_index=integers(2, 0, 2)),
    "bias shared by prefixes": dict(G=3, bias=(4, 11), prefix_index=integers(2, 0, 1), prefix_lens=integers(3, 0, 11)),
    "bias of one prefix": dict(bias=(1, 4, 11)),
    "bias of an empty prefix": dict(P=0, bias=(0,)),
    "bias with softcap, ALiBi and dropout": dict(
        bias=(4, 11), softcap=1.0, alibi_slopes=torch.rand(4), mask=dict(drop_p=0.4, seed=10)
    ),
    "sinks": dict(sinks=True),
    "sinks over packed rows": dict(sinks=True, lens=[4, 0, 9, 1]),
    "sinks over ragged rows": dict(sinks=True, seq_lens=integers(0, 5, 2)),
    "sinks of rows that see nothing": dict(sinks=True, mask=dict(length=16, hidden=spans((0, 16), (0, 0), (2, 16)))),
    "sinks of no rows": dict(sinks=True, B=0),
    "sinks in decoding": dict(sinks=True, B=1, H=4, Hk=1, S=1, T=4, P=1500, D=64, window=900),
    "sinks with softcap, bias and ALiBi": dict(
        sinks=True, bias=(4, 11), softcap=1.0, alibi_slopes=torch.rand(4), mask=dict(drop_p=0.4, seed=10)
    ),
    "negative scale": dict(scale=-0.5),
    "zero scale": dict(scale=0.0),
    "large scale": dict(scale=30.0),
    "everything packed": dict(
        lens=[4, 0, 9, 1, 17],
        G=2,
        P=33,
        Dv=24,
        sinks=True,
        bias=(2, 4, 33),
        prefix_index=integers(0, 1, 1, 0, 1),
        prefix_lens=integers(33, 20),
        mask=dict(length=36, hidden=spans((0, 9), (0, 0), (3, 35), (20, 36), (5, 6)), drop_p=0.2, seed=2**63),
        window=25,
        softcap=5.0,
        alibi_slopes=torch.rand(4),
        scale=0.2,
    ),
}


@pytest.mark.parametrize("types", ["fp64", "fp32", "bf16+fp32"])
@pytest.mark.parametrize("case", EDGES)
def test_edge(build, case, types):
    if types == "fp64" and not build.double:
        types = "fp16"
    call = make_call(types=types, **EDGES[case])
    assert_right_or_refused(call, build, cotangents_for(call))


@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_sinks_without_weight_and_sinks_that_take_everything(build, through):
    """From a share of zero to one that leaves nothing to the keys: no NaN, no overflow, and lse knows nothing of it."""
    call = make_call(types="fp32", sinks=True, mask=dict(length=16, hidden=spans((0, 16), (0, 0), (2, 16))))
    call.tensors["sinks"] = torch.tensor([-INF, -300.0, 80.0, 1e4])
    dout, dlse = cotangents_for(call)
    cotangents = (dout * (through != "lse"), dlse * (through != "out"))
    got = run(call, build, cotangents)
    assert_matches(call, got, cotangents)
    assert torch.equal(got["lse"], run(make_call(types="fp32", mask=call.mask), build)["lse"])
    call.tensors["sinks"][3] = INF  # the oracle cannot divide by this one
    for name, x in run(call, build, cotangents).items():
        assert torch.equal(x, got[name]), name


def test_prefix_keys_with_a_bias_of_minus_infinity(build):
    """A closed gate: such keys have probability 0, alone in a tile, in part of one, or everywhere."""
    for P, closed in ((11, 11), (11, 4), (200, 150), (200, 200)):
        call = make_call(P=P, types="fp32", bias=(P,))
        call.tensors["prefix_bias"][:closed] = -INF
        cotangents = cotangents_for(call)
        assert_matches(call, run(call, build, cotangents), cotangents)


def test_only_keys_with_a_bias_of_minus_infinity(build):
    """Visible keys that all have probability 0 leave nothing to average: as if no key were seen."""
    call = make_call(types="fp32", bias=(11,), mask=dict(length=16, hidden=torch.tensor([[11, 16]]).expand(3, 2)))
    call.tensors["prefix_bias"].fill_(-INF)
    for name, x in run(call, build, cotangents_for(call)).items():
        assert (x == (-INF if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("types", ["fp32", "bf16"])
def test_huge_logits_neither_overflow_nor_vanish(build, types):
    """Logits near +-3e4, far beyond what exp can represent."""
    call = make_call(types=types, scale=1000.0, D=64)
    got = run(call, build, cotangents_for(call))
    for name, x in got.items():
        assert x.isfinite().all(), name
    assert_matches(call, got, cotangents_for(call), names=("lse",))


@pytest.mark.parametrize("name", ["q", "k", "v", "prefix_k", "prefix_v"])
def test_strided_last_dimension_is_served_or_refused(build, name):
    """The op promises to read any strides with a contiguous last dimension; others must not give wrong numbers."""
    call = make_call(types="fp32")
    x = call.tensors[name]
    strided = torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    strange = call.with_tensors(**{name: strided})
    try:
        got = run(strange, build)
    except ValueError as error:
        assert name in str(error) and "last dimension" in str(error)
        return
    assert_matches(call, got, None)


def test_more_work_than_fits_scratch_memory(cpu_build):
    """So many queries, KV heads and prefix keys that a kernel with bounded scratch memory works in several rounds.

    Held against the same kernel on one row and one KV head at a time.
    """
    lens, Hk, group = [100, 90, 1, 120, 99], 5, 2
    call = make_call(lens=lens, H=Hk * group, Hk=Hk, P=1500, D=128, types="fp32", mask=dict(drop_p=0.1, seed=1))
    dout, dlse = cotangents_for(call)
    whole = run(call, cpu_build, (dout, dlse))
    summed = {name: torch.zeros_like(whole[name]) for name in ("dprefix_k", "dprefix_v")}
    for b, start in enumerate(call.cu_seqlens[:-1].tolist()):
        tokens = slice(start, start + lens[b])
        for g in range(Hk):
            heads, kv = slice(g * group, (g + 1) * group), slice(g, g + 1)
            t = {
                name: x[kv] if "prefix" in name else x[tokens, heads if name == "q" else kv]
                for name, x in call.tensors.items()
            }
            part = Call(t, {**call.mask, "row_ids": integers(b)}, {}, cu_seqlens_of(lens[b : b + 1]))
            got = run(part, cpu_build, (dout[tokens, heads], dlse[tokens, heads]))
            for name in ("out", "lse", "dq"):
                torch.testing.assert_close(got[name], whole[name][tokens, heads], rtol=1e-5, atol=1e-5)
            for name in ("dk", "dv"):
                torch.testing.assert_close(got[name], whole[name][tokens, kv], rtol=1e-5, atol=1e-5)
            for name, total in summed.items():
                total[kv] += got[name]
    for name, total in summed.items():
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-5)
