"""The reference backend and the tests' oracle against scaled_dot_product_attention with the dense mask."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctkernels.testing import oracle
from ctkernels.testing.backends import Backend
from ctkernels.testing.calls import DIFFERENTIABLE, Call, cotangents_for, dense, make_call, results, run

REFERENCE = Backend("reference")


def make(**sizes) -> Call:
    return make_call(**{"P": 7, **sizes})


def sdpa(call: Call, visible: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Stock attention over the concatenated keys; visible [B, S, P + T] must show every query some key."""
    t = call.tensors
    B = t["q"].shape[0]
    k = torch.cat([t["prefix_k"].expand(B, -1, -1, -1), t["k"]], 2)
    v = torch.cat([t["prefix_v"].expand(B, -1, -1, -1), t["v"]], 2)
    mask = torch.zeros(visible.shape, dtype=t["q"].dtype).masked_fill(~visible, float("-inf"))[:, None]
    if bias is not None:
        mask = mask + bias
    return scaled_dot_product_attention(t["q"], k, v, mask, enable_gqa=True, scale=call.options.get("scale"))


def causal_visible(B: int, S: int, T: int, context: torch.Tensor) -> torch.Tensor:
    own = torch.ones(S, T, dtype=torch.bool).tril(T - S)
    return torch.cat([context[:, None].expand(B, S, -1), own.expand(B, S, T)], 2)


def leaves_of(call: Call) -> Call:
    return call.with_tensors(**{name: x.clone().requires_grad_() for name, x in call.tensors.items()})


def assert_same_as_sdpa(call: Call, visible: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """out and every gradient, in fp64, of the reference and of the oracle."""
    dout = cotangents_for(call)[0]
    leaves = leaves_of(call)
    names = list(leaves.tensors)
    expected = sdpa(leaves, visible, bias)
    gradients = torch.autograd.grad(expected, [leaves.tensors[n] for n in names], dout)

    no_lse = torch.zeros(dout.shape[:-1], dtype=torch.float64)
    ours = leaves_of(call)
    for got in (run(call, REFERENCE, (dout, no_lse)), results(dense(ours), ours.tensors, (dout, no_lse))):
        torch.testing.assert_close(got["out"], expected.detach(), rtol=1e-12, atol=1e-12)
        for name, gradient in zip(names, gradients, strict=True):
            torch.testing.assert_close(got["d" + name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("H", "Hk"), [(4, 4), (4, 2), (7, 1)])
def test_nothing_hidden_is_sdpa(H, Hk):
    call = make(H=H, Hk=Hk)
    assert_same_as_sdpa(call, causal_visible(3, 5, 5, torch.ones(3, 7, dtype=torch.bool)))


@pytest.mark.parametrize("Dv", [3, 20])
def test_values_of_their_own_head_dimension_are_sdpa(Dv):
    assert_same_as_sdpa(make(Dv=Dv), causal_visible(3, 5, 5, torch.ones(3, 7, dtype=torch.bool)))


def test_without_a_prefix_is_causal_sdpa():
    call = make(P=0)
    t = call.tensors
    expected = scaled_dot_product_attention(t["q"], t["k"], t["v"], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(run(call, REFERENCE)["out"], expected, rtol=1e-12, atol=1e-12)


def test_hidden_spans_and_dropout_are_a_dense_mask():
    mask = dict(hidden=torch.tensor([[0, 2], [2, 7], [0, 0]]), drop_p=0.3, seed=5)
    context = oracle.context_visible(3, 7, **mask)
    assert 0 < context.sum() < context.numel()
    assert_same_as_sdpa(make(mask=mask), causal_visible(3, 5, 5, context))


def test_decoding_and_scale():
    call = make(S=2, T=6, scale=0.37)
    assert_same_as_sdpa(call, causal_visible(3, 2, 6, torch.ones(3, 7, dtype=torch.bool)))


def test_window():
    """A sliding window of w sees w keys, its own included, as in transformers' sliding-window models."""
    P, S, w = 7, 5, 4
    distance = (P + torch.arange(S))[:, None] - torch.arange(P + S)
    visible = ((distance >= 0) & (distance < w)).expand(3, -1, -1)
    assert visible[0].sum(-1).tolist() == [4] * S
    assert_same_as_sdpa(make(window=w), visible)


def test_alibi():
    P, S = 7, 5
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    distance = (P + torch.arange(S))[:, None] - torch.arange(P + S)
    bias = -slopes.double()[:, None, None] * distance
    assert_same_as_sdpa(
        make(alibi_slopes=slopes), causal_visible(3, S, S, torch.ones(3, P, dtype=torch.bool)), bias[None]
    )


def test_softcap_bias_and_sink_by_hand():
    """One query, two prefix keys, itself: the formula in scalars."""
    q, keys = 2.0, [1.0, -3.0, 0.5]
    values, bias, cap, scale = [1.0, 10.0, 100.0], [0.3, -0.2], 1.5, 0.8
    logits = torch.tensor([scale * q * key for key in keys], dtype=torch.float64)
    logits = cap * torch.tanh(logits / cap) + torch.tensor([*bias, 0.0], dtype=torch.float64)
    expected = torch.softmax(logits, 0) @ torch.tensor(values, dtype=torch.float64)

    def column(x: list[float]) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float64)[None, :, None]

    tensors = {"q": column([q])[None], "k": column(keys[2:])[None], "v": column(values[2:])[None]}
    tensors |= {"prefix_k": column(keys[:2]), "prefix_v": column(values[:2])}
    tensors["prefix_bias"] = torch.tensor(bias, dtype=torch.float64)
    tensors["sinks"] = torch.tensor([0.4], dtype=torch.float64)
    assert set(tensors) == set(DIFFERENTIABLE)
    got = run(Call(tensors, None, dict(softcap=cap, scale=scale)), REFERENCE)
    with_sink = expected * logits.exp().sum() / (logits.exp().sum() + math.exp(0.4))
    torch.testing.assert_close(got["out"].flatten(), with_sink[None], rtol=1e-14, atol=0)
    torch.testing.assert_close(got["lse"].flatten(), torch.logsumexp(logits, 0)[None], rtol=1e-14, atol=0)
