"""`ctkernels.prepare` changes no bit, under the interpreter; `test_interpreter.py` runs this file."""

import pytest
import torch
from torch import Tensor

import ctkernels as ct
from ctkernels.backends.triton.interpreter import repair
from ctkernels.backends.triton.plan import plan_backward, plan_forward
from ctkernels.problem import Problem
from ctkernels.testing.calls import Call, context_mask, cotangents_for, make_call

repair()
SPANS = torch.tensor([[0, 9], [5, 20], [0, 0]])
SIZES = dict(H=2, Hk=1, S=2, P=20, D=16)
CASES = {
    "padded, a seed in memory": dict(
        B=3, types="bf16+fp32", seq_lens=torch.tensor([2, 1, 2]), mask=dict(drop_p=0.3, seed=torch.tensor(2**40 + 3))
    ),
    "packed, spans and dropout": dict(
        lens=[2, 0, 3], types="bf16+fp32", mask=dict(hidden=SPANS, drop_p=0.3, seed=2**40 + 3)
    ),
    "two prefixes, a pattern and a bias": dict(
        B=2, G=2, types="fp32", prefix_index=torch.tensor([1, 0]), bias=(2, 2, 20),
        mask=dict(keep=torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.7),
    ),
}  # fmt: skip


def attend(call: Call, mask: ct.ContextMask, leaves: dict[str, Tensor], backward: bool = True) -> list[Tensor]:
    """out, lse and all gradients, or the former two."""
    t = leaves
    options = dict(prefix_bias=t.get("prefix_bias"), return_lse=True, backend="triton", **call.options)
    own, prefix = (t["q"], t["k"], t["v"]), (t["prefix_k"], t["prefix_v"])
    if call.cu_seqlens is None:
        outputs = ct.prefix_attention(*own, *prefix, mask, **options)
    else:
        outputs = ct.prefix_attention_varlen(*own, call.cu_seqlens, *prefix, mask, **options)
    if not backward:
        return [*outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(t.values()), cotangents_for(call))]


@pytest.mark.parametrize("name", CASES)
def test_prepared_calls_have_the_bits_of_plain_ones(name):
    """Then again after a write to what the mask is made of, and to a prefix."""
    call = make_call(**SIZES, **CASES[name])
    leaves = {n: x.detach().requires_grad_() for n, x in call.tensors.items()}
    mask = context_mask(call)
    prepared = ct.prepare(mask, [(leaves["prefix_k"], leaves["prefix_v"])])
    first = attend(call, mask, leaves)
    assert all(torch.equal(x, y) for x, y in zip(attend(call, prepared, leaves), first, strict=True))
    for x in (mask.hidden, mask.keep, mask.seed):
        if isinstance(x, Tensor):
            x.copy_(torch.zeros_like(x) if x.dtype != torch.int64 or x.dim() else x + 1)
    with torch.no_grad():
        leaves["prefix_k"].mul_(2)
    changed = attend(call, ct.ContextMask(**call.mask), leaves, backward=False)
    assert not torch.equal(changed[0], first[0])
    again = attend(call, prepared, leaves, backward=False)
    assert all(torch.equal(x, y) for x, y in zip(again, changed, strict=True))


def test_tokens_of_no_row_are_zero():
    """Those before the first packed row and behind the last one, which only a GPU's caller can have: nothing looks at
    the values of cu_seqlens there. Memory that nothing writes is NaN."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 16, generator=generator) for heads in (2, 1, 1))
    prefix = torch.randn(1, 1, 20, 16, generator=generator)

    def run(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> list[Tensor]:
        problem = Problem(
            alibi_slopes=None, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), seq_lens=None, prefix_index=None,
            prefix_lens=None, hidden=None, row_ids=None, keep=None, seed_in_memory=None, context_length=20, drop_p=0.0,
            seed=0, scale=0.25, causal=True, window=0, window_prefix=True, softcap=0.0,
        )  # fmt: skip
        inputs = q, k, v, prefix, prefix, None
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            forward = plan_forward(*inputs, problem)
            for launch in forward.launches:
                launch.run()
            out, lse = forward.outputs
            backward = plan_backward(out, None, *inputs, out, lse, [True] * 5 + [False], problem)
            for launch in backward.launches:
                launch.run()
        finally:
            torch.use_deterministic_algorithms(before)
        return [out, lse, *backward.outputs[:3]]

    whole = run(q, k, v, [2, 5, 9])
    rows = run(*(x[:, :, 2:9] for x in (q, k, v)), [0, 3, 7])
    for x, inside, nothing in zip(whole, rows, (0, -torch.inf, 0, 0, 0), strict=True):
        assert torch.equal(x[:, :, 2:9], inside)
        assert x[:, :, :2].eq(nothing).all() and x[:, :, 9:].eq(nothing).all()
