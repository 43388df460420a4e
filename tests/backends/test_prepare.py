"""`ctkernels.prepare`: when calls share what a backend made, and when not. A stand-in counts what it is asked for."""

import pytest
import torch

import ctkernels as ct
from ctkernels import dispatch
from ctkernels.problem import Prepared
from ctkernels.testing.calls import make_call

NAME = "stand-in"
B, S, P = 3, 4, 12
asked: list[tuple[bool, object]] = []  # per set of tables: its direction and the problem
seen: list[tuple[str, Prepared]] = []  # per pass
now = [0]  # the value of `order`


@pytest.fixture(autouse=True)
def backend():
    dispatch.BACKENDS[NAME] = (__name__, ("cpu",))
    asked.clear(), seen.clear()
    now[0] = 0
    yield
    del dispatch.BACKENDS[NAME]


def unavailable() -> None:
    return None


def order(x):
    return tuple(now)


def tables(*inputs):
    *_, problem, backward = inputs
    asked.append((backward, problem))
    return torch.tensor([len(asked)])


def forward(q, k, v, prefix_k, prefix_v, prefix_bias, problem, prepared=Prepared()):  # noqa: B008
    seen.append(("forward", prepared))
    return torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.zeros(q.shape[:3])


def backward(dout, dlse, q, k, v, prefix_k, prefix_v, *others, prepared=Prepared()):  # noqa: B008
    seen.append(("backward", prepared))
    return (*map(torch.zeros_like, (q, k, v, prefix_k, prefix_v)), q.new_empty(0))


def a_mask():
    return ct.ContextMask(hidden=torch.tensor([[0, 4], [4, 8], [0, 0]]), drop_p=0.25, seed=1)


def inputs(**changes):
    call = make_call(**dict(B=B, H=2, Hk=1, S=S, P=P, D=8, types="bf16+fp32") | changes)
    return [call.tensors[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")]


def attend(tensors, mask, **options):
    return ct.prefix_attention(*tensors, mask, backend=NAME, **options)


def test_layers_share_tables_and_both_directions_get_them():
    q, k, v, *first = inputs()
    prefixes = [first, [x.clone().requires_grad_() for x in first]]
    for x in first:
        x.requires_grad_()
    mask = ct.prepare(a_mask(), prefixes)
    out = sum(attend([q, k, v, *prefix], mask) for prefix in prefixes)
    out.sum().backward()
    assert [backward for backward, _ in asked] == [False, True]
    assert [name for name, _ in seen] == ["forward"] * 2 + ["backward"] * 2
    for _, prepared in seen:
        assert [int(x) for x in prepared[:2]] == [1, 2]
        assert prepared.prefix_k.dtype == torch.bfloat16
        assert torch.equal(prepared.prefix_k, first[0].detach()[None].bfloat16())


def test_without_gradients_there_are_no_tables_of_the_backward_pass():
    with torch.no_grad():
        attend(inputs(), ct.prepare(a_mask()))
    assert [backward for backward, _ in asked] == [False]


def test_a_mask_that_is_not_prepared_shares_nothing():
    attend(inputs(), a_mask())
    assert not asked and seen == [("forward", Prepared())]


DIFFERENCES = {
    "hidden is written to": lambda mask: mask.hidden[0].fill_(1),
    "another window": dict(window=5),
    "another softcap": dict(softcap=2.0),
    "a bias": dict(prefix_bias=torch.zeros(P)),
    "lengths": dict(seq_lens=torch.tensor([4, 2, 1])),
    "slopes": dict(alibi_slopes=torch.ones(2)),
    "another scale": dict(scale=-1.0),
    "not causal": dict(causal=False),
    "another stream": lambda mask: now.__setitem__(0, 1),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_gets_tables_of_its_own(name):
    tensors, mask, change = inputs(), ct.prepare(a_mask()), DIFFERENCES[name]
    attend(tensors, mask)
    if callable(change):
        change(mask)
    attend(tensors, mask, **({} if callable(change) else change))
    assert len(asked) == 2
    attend(tensors, mask, **({} if callable(change) else change))
    assert len(asked) == 2


def test_a_seed_in_memory_that_is_written_to_gets_tables_of_its_own():
    mask = ct.prepare(ct.ContextMask(drop_p=0.25, seed=torch.tensor(1)))
    for expected in (1, 1):
        attend(inputs(), mask)
        assert len(asked) == expected
    mask.seed.fill_(2)
    attend(inputs(), mask)
    assert len(asked) == 2


LIKE = dict(B=3, H=4, Hk=2, S=5, P=12, D=8, types="fp32")
STEPS = {  # each changes the call before it
    "another type": dict(types="bf16"),
    "master weights": dict(types="bf16+fp32"),
    "a longer prefix": dict(P=14),
    "two prefixes": dict(G=2, prefix_index=torch.tensor([0, 1, 1])),
    "the other index": dict(G=2, prefix_index=torch.tensor([1, 0, 1])),
    "lengths": dict(seq_lens=torch.tensor([5, 2, 1])),
    "other lengths": dict(seq_lens=torch.tensor([1, 2, 5])),
    "a window": dict(window=3),
    "a softcap": dict(softcap=2.0),
    "another scale": dict(scale=0.1),
    "not causal": dict(causal=False),
    "the reference": dict(backend="reference"),
    "a bias": dict(bias=(4, 12)),
    "a bias of one head": dict(bias=(12,)),
    "sinks": dict(sinks=True),
    "slopes": dict(alibi_slopes=torch.linspace(0.1, 0.4, 4)),
    "more heads": dict(H=6),
    "packed rows": dict(B=None, S=None, lens=[5, 2, 4]),
}


def test_what_was_decided_of_one_call_is_not_taken_for_another():
    """One prepared mask for all of them, in turn: each has the bits that it has with a mask of its own."""
    mask = ct.ContextMask(hidden=torch.tensor([[0, 4], [4, 8], [0, 0]]), drop_p=0.25, seed=3)
    prepared = ct.prepare(mask)
    for name in ("", *STEPS, ""):
        changes = dict(STEPS.get(name, {}))
        backend = changes.pop("backend", "cpu")
        call = make_call(**{key: x for key, x in (LIKE | changes).items() if x is not None})
        for grad in (True, False, True):
            outputs = []
            for each in (mask, prepared):
                with torch.set_grad_enabled(grad):
                    tensors = {key: x.clone().requires_grad_(grad) for key, x in call.tensors.items()}
                    out = run_with(each, tensors, call, backend)
                found = [out.detach()]
                if grad:
                    found += torch.autograd.grad(out.float().sum(), list(tensors.values()))
                outputs.append(found)
            assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True)), name


def run_with(mask, tensors, call, backend):
    options = {**call.options, "backend": backend}
    if call.cu_seqlens is None:
        return ct.prefix_attention(mask=mask, **tensors, **options)
    return ct.prefix_attention_varlen(mask=mask, cu_seqlens=call.cu_seqlens, **tensors, **options)


BAD = {
    "causal must be a bool": dict(causal=1),
    "window must be an integer": dict(window=True),
    "scale must be a number": dict(scale=True),
    "alibi_slopes must not require": dict(alibi_slopes=torch.ones(4).requires_grad_()),
    "prefix_bias must be a floating tensor": dict(prefix_bias=torch.zeros(12, dtype=torch.int64)),
    "backend must be one of": dict(backend="none"),
    "seq_lens must be an int32": dict(seq_lens=torch.ones(3)),
    "seq_lens must have shape": dict(seq_lens=torch.ones(4, dtype=torch.int64)),
    "k must have q's type": dict(k=torch.zeros(3, 2, 5, 8, dtype=torch.float16)),
    "v must be a tensor": dict(v=None),
}


@pytest.mark.parametrize("message", BAD)
def test_a_call_that_is_wrong_is_refused_behind_one_that_is_right(message):
    tensors = make_call(**LIKE).tensors
    mask = ct.prepare(a_mask())
    for options in ({}, dict(window=1), dict(scale=1.0), dict(prefix_bias=torch.zeros(12))):
        ct.prefix_attention(**tensors, mask=mask, backend="cpu", **options)
    assert mask.decided
    with pytest.raises((TypeError, ValueError), match=message):
        ct.prefix_attention(**{**tensors, "mask": mask, "backend": "cpu", **BAD[message]})


def test_autocast_is_asked_for_in_every_call():
    tensors, mask = make_call(**LIKE).tensors, ct.prepare(a_mask())
    plain = ct.prefix_attention(**tensors, mask=mask, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        cast = ct.prefix_attention(**tensors, mask=mask, backend="cpu")
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(plain, ct.prefix_attention(**tensors, mask=mask, backend="cpu"))


@pytest.mark.parametrize("sizes", [dict(S=5), dict(P=13), dict(types="fp16+fp32"), dict(D=16), dict(H=4)], ids=str)
def test_other_sizes_and_types_get_tables_of_their_own(sizes):
    mask = ct.prepare(a_mask())
    attend(inputs(), mask)
    attend(inputs(**sizes), mask)
    assert len(asked) == 2


def test_equal_lengths_that_are_another_tensor_are_not_taken_for_the_same():
    mask = ct.prepare(a_mask())
    for lengths in ([4, 2, 1], [4, 3, 1], [4, 3, 1]):
        attend(inputs(), mask, seq_lens=torch.tensor(lengths))
    assert len(asked) == 3


def test_a_prefix_that_was_written_to_or_is_another_is_rounded_by_the_call():
    q, k, v, *prefix = inputs()
    mask = ct.prepare(a_mask(), [prefix])
    attend([q, k, v, *prefix], mask)
    attend([q, k, v, *(x.clone() for x in prefix)], mask)
    prefix[1].mul_(2)
    attend([q, k, v, *prefix], mask)
    assert [prepared.prefix_k is None for _, prepared in seen] == [False, True, True]
    assert all(prepared.prefix_v is None for _, prepared in seen[1:])


def test_a_prefix_of_the_rows_type_is_read_in_place():
    tensors = inputs(types="bf16")
    attend(tensors, ct.prepare(a_mask(), [tensors[3:]]))
    assert seen[0][1].prefix_k is None and seen[0][1].forward_tables is not None


def test_tensors_that_do_not_count_writes_share_nothing():
    with torch.inference_mode():
        mask = ct.prepare(a_mask())
        attend(inputs(), mask)
    assert not asked and seen == [("forward", Prepared())]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_backends_take_it_as_the_mask_that_it_is(backend):
    tensors = inputs()
    results = [
        ct.prefix_attention(*tensors, mask, backend=backend)
        for mask in (a_mask(), ct.prepare(a_mask(), [tensors[3:]]), ct.prepare(ct.prepare(a_mask())))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    bare = [ct.prefix_attention(*tensors, mask, backend=backend) for mask in (None, ct.prepare())]
    assert torch.equal(*bare)


def test_bad_arguments():
    x = torch.zeros(1)
    with pytest.raises(TypeError, match="mask must be a ContextMask or None, got int"):
        ct.prepare(3)
    for prefixes in ([x], [(x, x, x)], [(x, 1)]):
        with pytest.raises(TypeError, match="prefixes must be pairs of tensors"):
            ct.prepare(None, prefixes)


def test_moved_once():
    mask = ct.prepare(a_mask())
    assert mask.to("cpu") is mask and mask.to("meta") is mask.to("meta")
    assert mask.to("meta").hidden.is_meta
