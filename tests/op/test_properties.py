"""Properties that tie calls to one another: what must not matter, what must stay zero, and what must agree."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import ctkernels as ct
from ctkernels.testing import oracle
from ctkernels.testing.calls import Call, cotangents_for, cu_seqlens_of, make_call, run
from ctkernels.testing.compare import assert_matches

ROWS = ("q", "k", "v")
SHARED = ("dprefix_k", "dprefix_v", "dprefix_bias", "dsinks")  # gradients of what all rows read
NAN = float("nan")
TIGHT = dict(rtol=1e-5, atol=1e-6)
LENS = [5, 0, 9, 1, 17, 3]
MASK = dict(
    hidden=torch.tensor([[0, 7], [3, 9], [40, 70], [0, 0], [0, 70], [69, 70]]),
    drop_p=0.3,
    seed=12345678901234567890,
    row_ids=torch.tensor([4, 11, 2, 7, 5, 0]),
)


def packed(**changes) -> Call:
    """Six ragged rows over two prefixes of 70 keys, with spans and dropout."""
    index = torch.tensor([0, 1, 1, 0, 1, 0])
    settings = dict(lens=LENS, G=2, P=70, types="fp32", D=16, prefix_index=index, mask=MASK, bias=(4, 70), softcap=8.0)
    return make_call(**{"sinks": True, **settings, **changes})


def padded(**changes) -> Call:
    index = torch.tensor([0, 1, 1, 0, 1, 0])
    settings = dict(B=6, S=17, G=2, P=70, types="fp32", D=16, prefix_index=index, mask=MASK, bias=(4, 70), softcap=8.0)
    return make_call(**{"sinks": True, **settings, "seq_lens": torch.tensor(LENS), **changes})


def tokens_of(rows: list[int], lens: list[int] = LENS) -> torch.Tensor:
    """Packed positions of some rows, in the order given."""
    starts = cu_seqlens_of(lens).tolist()
    pieces = [torch.arange(starts[b], starts[b + 1]) for b in rows]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)


def select_rows(call: Call, cotangents: tuple, rows: list[int]) -> tuple[Call, tuple]:
    """The same problem restricted to some rows, in the order given, with the identities they had."""
    index = torch.tensor(rows)
    at = index if call.cu_seqlens is None else tokens_of(rows)
    tensors = {name: x[at] if name in ROWS else x for name, x in call.tensors.items()}
    mask = {name: x[index] if isinstance(x, torch.Tensor) else x for name, x in call.mask.items()}
    options = {name: x[index] if name in ("prefix_index", "seq_lens") else x for name, x in call.options.items()}
    cu_seqlens = None if call.cu_seqlens is None else cu_seqlens_of([LENS[b] for b in rows])
    return Call(tensors, mask, options, cu_seqlens), tuple(c[at] for c in cotangents)


@pytest.mark.parametrize("seed", [7, 12345678901234567890])
@pytest.mark.parametrize(
    "changes", [{}, dict(P=0, mask=MASK | dict(length=6, hidden=None))], ids=["prefix", "own keys"]
)
def test_a_seed_in_memory_drops_the_tokens_of_its_number(build, changes, seed):
    """Written to between two calls, as before a replay, it gives the bits of the number that it then holds."""
    changes = {"bias": None, **changes}
    mask = changes.pop("mask", MASK)
    memory = torch.zeros(1, dtype=torch.int64, device=build.device)
    kept = packed(mask=mask | dict(seed=memory), **changes)
    cotangents = cotangents_for(kept)
    at_first = run(kept, build, cotangents)
    memory.fill_(seed if seed < 2**63 else seed - 2**64)
    got, expected = (run(call, build, cotangents) for call in (kept, packed(mask=mask | dict(seed=seed), **changes)))
    assert all(torch.equal(got[name], x) for name, x in expected.items())
    assert not torch.equal(at_first["out"], got["out"])


@pytest.mark.parametrize("types", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("make", [padded, packed])
def test_permuting_rows_permutes_results_exactly(build, make, types):
    call = make(types=types)
    cotangents = cotangents_for(call)
    order = [3, 0, 5, 4, 2, 1]
    at = torch.tensor(order) if call.cu_seqlens is None else tokens_of(order)
    whole, permuted = run(call, build, cotangents), run(*_with_build(select_rows(call, cotangents, order), build))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(permuted[name], whole[name][at]), name
    for name in SHARED:
        torch.testing.assert_close(permuted[name], whole[name], **TIGHT)


def _with_build(problem: tuple[Call, tuple], build) -> tuple:
    call, cotangents = problem
    return call, build, cotangents


@pytest.mark.parametrize("make", [padded, packed])
def test_sharding_rows_changes_nothing(build, make):
    """Two halves with their row ids give the rows of the whole; their prefix gradients add up to the whole's."""
    call = make()
    cotangents = cotangents_for(call)
    whole = run(call, build, cotangents)
    shards = [run(*_with_build(select_rows(call, cotangents, rows), build)) for rows in ([0, 1, 2, 3], [4, 5])]
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(torch.cat([shard[name] for shard in shards]), whole[name], **TIGHT)
    for name in SHARED:
        torch.testing.assert_close(sum(shard[name] for shard in shards), whole[name], **TIGHT)


@pytest.mark.parametrize("make", [padded, packed])
def test_rows_do_not_affect_one_another(build, make):
    """New values, and a new mask, in one row leave every bit of the other rows as it was."""
    call = make()
    cotangents = cotangents_for(call)
    changed = call.clone()
    changed_row = 4
    at = torch.tensor([changed_row]) if call.cu_seqlens is None else tokens_of([changed_row])
    others = [b for b in range(6) if b != changed_row]
    rest = torch.tensor(others) if call.cu_seqlens is None else tokens_of(others)
    for name in ROWS:
        changed.tensors[name][at] *= -3
    changed.mask["hidden"][changed_row] = torch.tensor([20, 25])
    before, after = run(call, build, cotangents), run(changed, build, cotangents)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(before[name][rest], after[name][rest]), name
        assert not torch.equal(before[name][at], after[name][at]), name


@pytest.mark.parametrize("make", [padded, packed])
def test_a_broken_row_breaks_no_other(build, make):
    """NaN in one row's queries, keys and values leaves every bit of the other rows as it was."""
    call = make()
    cotangents = cotangents_for(call)
    broken = call.clone()
    at = torch.tensor([2]) if call.cu_seqlens is None else tokens_of([2])
    rest = torch.tensor([0, 1, 3, 4, 5]) if call.cu_seqlens is None else tokens_of([0, 1, 3, 4, 5])
    for name in ROWS:
        broken.tensors[name][at] = NAN
    before, after = run(call, build, cotangents), run(broken, build, cotangents)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(before[name][rest], after[name][rest]), name
    assert after["out"][at].isnan().any()


def test_padded_equals_packed(build):
    """Values, and gradients with respect to values, of the same rows with and without padding."""
    flat = packed()
    dout, dlse = cotangents_for(flat)
    wide = padded(seed=1)
    for name in ROWS:
        for b, n in enumerate(LENS):
            wide.tensors[name][b, :, :n] = flat.tensors[name][tokens_of([b])].transpose(0, 1)
    wide.tensors |= {name: x for name, x in flat.tensors.items() if name not in ROWS}
    wide_dout, wide_dlse = torch.zeros(6, 4, 17, 16), torch.zeros(6, 4, 17)
    for b, n in enumerate(LENS):
        wide_dout[b, :, :n] = dout[tokens_of([b])].transpose(0, 1)
        wide_dlse[b, :, :n] = dlse[tokens_of([b])].transpose(0, 1)
    a, b_ = run(flat, build, (dout, dlse)), run(wide, build, (wide_dout, wide_dlse))
    for name in SHARED:
        torch.testing.assert_close(a[name], b_[name], **TIGHT)
    for name in ("out", "lse", "dq", "dk", "dv"):
        for b, n in enumerate(LENS):
            torch.testing.assert_close(a[name][tokens_of([b])].transpose(0, 1), b_[name][b, :, :n], **TIGHT)


@pytest.mark.parametrize("make", [padded, packed])
def test_wide_values_are_narrow_ones_side_by_side(wide_build, make):
    """Columns of values do not affect one another, and what they do to the other gradients adds up."""
    call = make(Dv=40)
    dout, dlse = cotangents_for(call)
    whole, parts = run(call, wide_build, (dout, dlse)), []
    for columns in (slice(0, 16), slice(16, 17), slice(17, 40)):
        narrow = call.with_tensors(**{name: call.tensors[name][..., columns] for name in ("v", "prefix_v")})
        parts.append(run(narrow, wide_build, (dout[..., columns], dlse if columns.start == 0 else 0 * dlse)))
    for name, x in whole.items():
        if name in ("out", "dv", "dprefix_v"):
            pieced = torch.cat([part[name] for part in parts], -1)
        else:
            pieced = parts[0][name] if name == "lse" else sum(part[name] for part in parts)
        torch.testing.assert_close(pieced, x, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_is_zero_and_stays_out_of_everything(build):
    """NaN in padded queries and keys, and in the gradients that arrive for them, reaches nothing."""
    call = padded()
    dout, dlse = cotangents_for(call)
    clean = run(call, build, (dout, dlse))
    poisoned = call.clone()
    for b, n in enumerate(LENS):
        for x in (*(poisoned.tensors[name] for name in ROWS), dout, dlse):
            x[b, :, n:] = NAN
    got = run(poisoned, build, (dout, dlse))
    for name, x in got.items():
        assert torch.equal(x, clean[name]), name
    for b, n in enumerate(LENS):
        assert (got["lse"][b, :, n:] == -float("inf")).all()
        for name in ("out", "dq", "dk", "dv"):
            assert (got[name][b, :, n:] == 0).all(), name


def test_queries_that_see_a_broken_value_say_so(build):
    """Two rows of one tile: NaN in a value of the first reaches its queries from that key on, and not the second."""
    call = make_call(B=2, H=2, Hk=1, S=6, P=10, types="fp32")
    whole = run(call, build)["out"]
    broken = call.with_tensors()
    broken.tensors["v"] = call.tensors["v"].clone()
    broken.tensors["v"][0, :, 3] = NAN
    out = run(broken, build)["out"]
    assert out[0, :, 3:].isnan().all()
    assert torch.equal(out[1], whole[1])


def test_keys_hidden_from_everybody_may_hold_nan(build):
    """Span, keep, a short prefix, an unread prefix and the context part of own keys: what nobody sees is not read."""
    keep = torch.ones(3, 40, dtype=torch.bool)
    keep[:, [0, 7, 8, 33]] = False  # 33 is own key 3
    mask = dict(keep=keep, length=40, hidden=torch.tensor([[12, 20]] * 3))
    for options in ({}, dict(softcap=3.0, bias=(4, 30))):
        call = make_call(types="fp32", P=30, S=10, mask=mask, **options)
        _expect_poison_ignored(call, build, prefix=[0, 7, 8, *range(12, 20)], own=[3])

    hidden = torch.tensor([[4, 9], [0, 0], [3, 12]])  # 4 to 8 are seen by a row alone that has no tokens
    packed_rows = make_call(types="fp32", P=30, lens=[5, 0, 3], mask=dict(hidden=hidden))
    poisoned = packed_rows.clone()
    for name in ("prefix_k", "prefix_v"):
        poisoned.tensors[name][:, 4:9] = NAN
    cotangents = cotangents_for(packed_rows)
    _expect_same(run(packed_rows, build, cotangents), run(poisoned, build, cotangents))

    short = make_call(
        types="fp32", P=30, G=3, prefix_index=torch.tensor([0, 2, 0]), prefix_lens=torch.tensor([20, 30, 0])
    )
    cotangents = cotangents_for(short)
    poisoned = short.clone()
    for name in ("prefix_k", "prefix_v"):
        poisoned.tensors[name][0, :, 20:] = NAN
        poisoned.tensors[name][1:] = NAN
    _expect_same(run(short, build, cotangents), run(poisoned, build, cotangents))


def _expect_poison_ignored(call: Call, build, prefix: list[int], own: list[int]) -> None:
    cotangents = cotangents_for(call)
    poisoned = call.clone()
    for name in ("prefix_k", "prefix_v"):
        poisoned.tensors[name][:, prefix] = NAN
    for name in ("k", "v"):
        poisoned.tensors[name][:, :, own] = NAN
    got = run(poisoned, build, cotangents)
    _expect_same(run(call, build, cotangents), got)
    for name in ("k", "v"):
        assert (got["d" + name][:, :, own] == 0).all() and (got["dprefix_" + name][:, prefix] == 0).all()


def _expect_same(clean: dict, got: dict) -> None:
    for name, x in got.items():
        assert torch.equal(x, clean[name]), name


def test_future_keys_beyond_every_query_may_hold_nan(build):
    """Tokens that arrive later, in rows that are padded now, are not read."""
    call = make_call(types="fp32", S=2, T=9, seq_lens=torch.tensor([3, 6, 2]))
    cotangents = cotangents_for(call)
    poisoned = call.clone()
    for name in ("k", "v"):
        for b, n in enumerate([3, 6, 2]):
            poisoned.tensors[name][b, :, n:] = NAN
    _expect_same(run(call, build, cotangents), run(poisoned, build, cotangents))


def test_no_gradient_reaches_hidden_or_dropped_tokens(build):
    """A key gets a nonzero gradient iff a row that reads it sees it."""
    P = 70
    mask = dict(drop_p=0.75, seed=3, hidden=torch.tensor([[0, 9], [4, 30]]))
    call = make_call(types="fp32", B=2, P=P, bias=(P,), mask=mask)
    seen = oracle.context_visible(2, P, **mask).any(0)
    assert 0 < seen.sum() < P
    got = run(call, build, cotangents_for(call))
    for name in ("dprefix_k", "dprefix_v"):
        assert torch.equal((got[name] != 0).any(-1), seen.expand(2, P)), name
        assert (got[name][:, ~seen] == 0).all()
    assert torch.equal(got["dprefix_bias"] != 0, seen)


def test_prompt_rows_get_no_gradient_in_what_they_hide(build):
    """CT-Prompt: the context lies in the row's own keys, and a row's hidden part of it stays without key gradients."""
    mask = dict(length=8, hidden=torch.tensor([[0, 4], [4, 8]]))
    call = make_call(types="fp32", B=2, P=0, S=12, mask=mask)
    got = run(call, build, cotangents_for(call))
    for name in ("dk", "dv"):
        assert (got[name][0, :, 0:4] == 0).all() and (got[name][1, :, 4:8] == 0).all()
        assert (got[name][0, :, 4:] != 0).any(-1).all() and (got[name][1, :, :4] != 0).any(-1).all()
    assert (got["out"][0, :, :4] == 0).all() and (got["lse"][0, :, :4] == -float("inf")).all()
    assert (got["dq"][0, :, :4] == 0).all()


def test_queries_that_see_nothing(build):
    """out = 0, lse = -inf, no gradient, whatever arrives for them (even NaN): and the other queries do not notice."""
    mask = dict(length=16, hidden=torch.tensor([[0, 16], [0, 0], [0, 14]]))
    call = make_call(types="fp32", bias=(11,), sinks=True, mask=mask)
    dout, dlse = cotangents_for(call)
    clean = run(call, build, (dout, dlse))
    dout[0], dlse[0], dout[2, :, :3], dlse[2, :, :3] = NAN, NAN, NAN, NAN
    got = run(call, build, (dout, dlse))
    _expect_same(clean, got)
    for rows, queries in ((0, slice(None)), (2, slice(0, 3))):
        assert (got["out"][rows, :, queries] == 0).all() and (got["dq"][rows, :, queries] == 0).all()
        assert (got["lse"][rows, :, queries] == -float("inf")).all()
    assert (got["dk"][0] == 0).all() and (got["dv"][0] == 0).all()
    assert got["lse"][1].isfinite().all() and got["lse"][2, :, 3:].isfinite().all()


def test_same_dropped_tokens_as_the_dense_mask(build):
    """Read out token by token: all logits are equal and the values are one-hot, so out counts the visible tokens."""
    B, P = 5, 233
    mask = dict(drop_p=0.37, seed=2**63 + 12345, row_ids=torch.tensor([0, 9, 2**32 - 1, 77, 2**31]))
    expected = oracle.context_visible(B, P, **mask)
    assert torch.equal(ct.ContextMask(**mask).dense(B, P), expected)
    seen = torch.zeros(B, P, dtype=torch.bool)
    for start in range(0, P, 200):  # a head dimension holds 200 tokens at a time
        count = min(200, P - start)
        values = torch.zeros(1, P, 200)
        values[0, start : start + count, :count] = torch.eye(count)
        tensors = {name: torch.zeros(B, 1, 1, 200) for name in ROWS}
        tensors |= {"prefix_k": torch.zeros(1, P, 200), "prefix_v": values}
        seen[:, start : start + count] = run(Call(tensors, mask), build)["out"][:, 0, 0, :count] > 0
    assert torch.equal(seen, expected)


def test_backward_drops_what_forward_dropped(build):
    """Padded, packed, several prefixes: dv of a prefix token is nonzero iff some row that reads it kept it."""
    for call in (padded(softcap=None), packed(softcap=None)):
        got = run(call, build, cotangents_for(call))
        visible = oracle.context_visible(6, 70, **MASK)
        visible &= (torch.tensor(LENS) > 0)[:, None]
        for g in range(2):
            seen = visible[call.options["prefix_index"] == g].any(0)
            assert torch.equal((got["dprefix_v"][g] != 0).any(-1), seen.expand(2, 70))


@pytest.mark.parametrize("types", ["fp32", "bf16"])
def test_nothing_hidden_is_sdpa(build, types):
    call = make_call(types=types, D=64, P=40, S=20)
    t = call.tensors
    k, v = (torch.cat([t["prefix_" + n].expand(3, -1, -1, -1), t[n]], 2) for n in "kv")
    visible = torch.ones(20, 60, dtype=torch.bool).tril(40)
    expected = scaled_dot_product_attention(t["q"], k, v, visible, enable_gqa=True)
    truth = scaled_dot_product_attention(t["q"].double(), k.double(), v.double(), visible, enable_gqa=True)
    for mask in (
        None,
        dict(drop_p=0.0, seed=5),
        dict(hidden=torch.zeros(3, 2, dtype=torch.long)),
        dict(keep=torch.ones(3, 40) > 0),
    ):
        got = run(replace(call, mask=mask), build)["out"]
        unit = torch.finfo(expected.dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= 2 * (expected.double() - truth).abs().max() + unit


def test_one_mask_told_in_three_ways(build):
    """A span and dropout, the same as an explicit pattern, and the same over a longer context: same values."""
    call = padded()
    cotangents = cotangents_for(call)
    keep = ct.ContextMask(**MASK).dense(6, 70)
    longer = torch.cat([keep, torch.ones(6, 5, dtype=torch.bool)], 1)
    expected = run(call, build, cotangents)
    for mask in (dict(keep=keep), dict(keep=longer, length=75)):
        got = run(replace(call, mask=mask), build, cotangents)
        for name, x in got.items():
            torch.testing.assert_close(x, expected[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


def test_splitting_the_prefix_and_merging_by_lse(build):
    """Attention over two parts of the prefix, own keys in the first only, merged by lse, is that over the whole."""
    S, P, cut = 6, 31, 13
    call = make_call(types="fp32", S=S, P=P)
    whole = run(call, build)
    parts = []
    for start, end in ((0, cut), (cut, P)):
        part = call.with_tensors(**{n: call.tensors[n][:, start:end] for n in ("prefix_k", "prefix_v")})
        if start:  # hide the own keys
            part = part.with_mask(length=P - cut + S, hidden=torch.tensor([[P - cut, P - cut + S]] * 3))
        parts.append(run(part, build))
    lse = torch.stack([part["lse"] for part in parts])
    weights = torch.softmax(lse, 0)[..., None]
    merged = sum(w * part["out"] for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole["out"], **TIGHT)
    torch.testing.assert_close(torch.logsumexp(lse, 0), whole["lse"], **TIGHT)


def test_several_prefixes_equal_separate_calls(build):
    """prefix_index and prefix_lens are the same as cutting out each row's prefix, windows and ALiBi included."""
    lens, index = torch.tensor([20, 0, 9]), torch.tensor([2, 0, 1, 2])
    shared = dict(window=14, alibi_slopes=torch.rand(4, generator=torch.Generator().manual_seed(1)))
    call = make_call(types="fp32", B=4, S=7, P=20, G=3, prefix_index=index, prefix_lens=lens, **shared)
    cotangents = cotangents_for(call)
    whole = run(call, build, cotangents)
    dk = torch.zeros_like(call.tensors["prefix_k"])
    for b, g in enumerate(index.tolist()):
        one = {n: call.tensors[n][b : b + 1] for n in ROWS}
        one |= {n: call.tensors[n][g, :, : lens[g]] for n in ("prefix_k", "prefix_v")}
        single = run(Call(one, None, shared), build, tuple(c[b : b + 1] for c in cotangents))
        for name in ("out", "lse", "dq", "dk", "dv"):
            torch.testing.assert_close(single[name][0], whole[name][b], **TIGHT)
        dk[g, :, : lens[g]] += single["dprefix_k"]
    torch.testing.assert_close(whole["dprefix_k"], dk, **TIGHT)


def test_decoding_equals_the_end_of_a_full_pass(build):
    """The last S queries over T keys, with ragged rows: the same as the full call's valid tail."""
    lens, S = [9, 4, 6], 2
    call = make_call(types="fp32", S=9, seq_lens=torch.tensor(lens), mask=dict(drop_p=0.3, seed=1), window=8)
    full = run(call, build)
    tail = torch.stack([call.tensors["q"][b, :, n - S : n] for b, n in enumerate(lens)])
    got = run(call.with_tensors(q=tail), build)
    for b, n in enumerate(lens):
        for name in ("out", "lse"):
            torch.testing.assert_close(got[name][b], full[name][b, :, n - S : n], **TIGHT)


def test_prefix_gradient_is_the_sum_over_rows(build):
    """Many rows that read one prefix: its gradient is accumulated in fp32 whatever the rows' type.

    With all rows equal, 4096 bf16 addends of one size would stall a bf16 sum after 256 of them.
    """
    one = make_call(types="bf16+fp32", B=1, S=1, P=5)
    many = one.with_tensors(**{n: one.tensors[n].expand(4096, -1, -1, -1) for n in ROWS})
    cotangents = cotangents_for(one)
    repeated = tuple(c.expand(4096, *c.shape[1:]) for c in cotangents)
    single, summed = run(one, build, cotangents), run(many, build, repeated)
    for name in ("dprefix_k", "dprefix_v"):
        torch.testing.assert_close(
            summed[name], single[name] * 4096, rtol=1e-4, atol=1e-4 * float(summed[name].abs().max())
        )


@pytest.mark.parametrize("layout", ["transposed", "sliced", "broadcast"])
def test_inputs_are_read_in_place_and_left_alone(build, layout):
    """Strided inputs give the bits of contiguous ones, and no input is written to."""
    call = padded()
    strided = call.clone()
    for name in (*ROWS, "prefix_k", "prefix_v"):
        x = call.tensors[name]
        if layout == "transposed":
            strided.tensors[name] = x.transpose(-2, -3).contiguous().transpose(-2, -3)
        elif layout == "sliced":
            strided.tensors[name] = torch.full([n + 2 for n in x.shape], NAN)[
                tuple(slice(1, -1) for _ in x.shape)
            ].copy_(x)
        else:
            strided.tensors[name] = x[:1].expand(x.shape)
            call.tensors[name] = strided.tensors[name].contiguous()
    before = {name: x.clone() for name, x in strided.tensors.items()}
    cotangents = cotangents_for(call)
    _expect_same(run(call, build, cotangents), run(strided, build, cotangents))
    for name, x in strided.tensors.items():
        assert torch.equal(x, before[name]), name


def test_offset_views_of_one_buffer(build):
    """q, k, v cut out of one fused projection, as GPT-2 and Phi-3 pass them."""
    fused = torch.randn(3, 6, 3 * 4 * 16, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in fused.chunk(3, -1))
    call = make_call(types="fp32", H=4, Hk=4, S=6, D=16).with_tensors(q=q, k=k, v=v)
    cotangents = cotangents_for(call)
    assert_matches(call, run(call, build, cotangents), cotangents)
