"""Gradients: gradcheck through the real code, only what is asked for, and what happens beyond the first derivative."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctkernels.testing.calls import DIFFERENTIABLE, call_op, cotangents_for, make_call, run

SMALL = dict(B=2, H=2, Hk=1, S=3, P=4, D=2)
CHECKED = {
    "plain": dict(SMALL, bias=(4,)),
    "sinks": dict(SMALL, sinks=True, mask=dict(length=7, hidden=torch.tensor([[0, 7], [3, 4]]))),
    "sinks and packed values of their own": dict(SMALL, lens=[2, 0, 3], Dv=3, bias=(2, 4), sinks=True, softcap=2.0),
    "wider values": dict(SMALL, Dv=5),
    "narrower values": dict(SMALL, D=5, Dv=1, seq_lens=torch.tensor([3, 1])),
    "grouped heads, span and dropout": dict(
        SMALL, H=4, Hk=2, bias=(4, 4), mask=dict(hidden=torch.tensor([[0, 2], [3, 4]]), drop_p=0.3, seed=1)
    ),
    "several prefixes": dict(
        SMALL, G=2, B=3, bias=(2, 2, 4), prefix_index=torch.tensor([1, 0, 1]), prefix_lens=torch.tensor([4, 2])
    ),
    "ragged decoding": dict(SMALL, S=1, T=4, seq_lens=torch.tensor([4, 2]), bias=(4,)),
    "packed": dict(SMALL, lens=[2, 0, 3], bias=(2, 4), window=4),
    "softcap, ALiBi, odd head": dict(
        SMALL, D=3, softcap=0.8, alibi_slopes=torch.tensor([0.3, 0.7]), bias=(4,), scale=-0.9
    ),
    "bidirectional": dict(SMALL, causal=False, bias=(4,), seq_lens=torch.tensor([3, 1])),
    "context in own keys": dict(SMALL, P=0, mask=dict(length=2, hidden=torch.tensor([[0, 1], [1, 2]]))),
}


@pytest.mark.parametrize("case", CHECKED)
def test_gradcheck(double_build, case):
    """Every differentiable input, through out and through lse."""
    call = make_call(**CHECKED[case])
    names = list(call.tensors)

    def function(*tensors: torch.Tensor):
        out, lse = call_op(replace(call, tensors=dict(zip(names, tensors, strict=True))), double_build.name)
        return out, lse.masked_fill(lse.isinf(), 0)  # finite differences of -inf are NaN

    inputs = [x.clone().requires_grad_() for x in call.tensors.values()]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-6)


class Recorder(TorchDispatchMode):
    """Keeps (arguments, results) of the package's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "ctkernels":
            self.calls.setdefault(name, []).append((func, args, outputs))
        return outputs


def leaves(call, wanted):
    return {name: x.detach().requires_grad_(name in wanted) for name, x in call.tensors.items()}


SUBSETS = [set(one) for one in ([name] for name in DIFFERENTIABLE)]
SUBSETS += [{"prefix_k", "prefix_v"}, {"prefix_k", "prefix_v", "prefix_bias"}, {"q", "k", "v"}, {"q", "prefix_v"}]


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda s: "+".join(sorted(s)))
@pytest.mark.parametrize("lens", [None, [4, 0, 7]], ids=["padded", "packed"])
def test_only_requested_gradients(backend, wanted, lens):
    """Unrequested gradients are not computed, and asking for fewer changes no bit of the others."""
    call = make_call(types="fp32", lens=lens, bias=(4, 11), sinks=True, mask=dict(drop_p=0.3, seed=1))
    cotangents = cotangents_for(call)
    full = run(call, backend, cotangents)
    tensors = leaves(call.to(backend.device), wanted)
    outputs = call_op(replace(call.to(backend.device), tensors=tensors), backend.name)
    # the reference is plain PyTorch, where lse does not depend on values
    pairs = [(o, c.to(backend.device)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    with Recorder() as recorder:
        torch.autograd.backward(*zip(*pairs, strict=True))
    for name, x in tensors.items():
        assert (x.grad is not None) == (name in wanted), name
        if name in wanted:
            assert torch.equal(x.grad.cpu(), full["d" + name]), name
    if backend.kernel:
        [(_, _, gradients)] = recorder.calls["prefix_attention_backward"]
        computed = {name for name, g in zip(DIFFERENTIABLE, gradients, strict=True) if g is not None and g.numel()}
        assert computed == wanted


def test_no_backward_without_a_request(backend):
    call = make_call(types="fp32").to(backend.device)
    out, lse = call_op(call, backend.name)
    assert not out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradient_through_one_output(backend, through, sinks):
    """One output left out of the loss is the same as a zero gradient for it."""
    call = make_call(types="fp32", bias=(11,), sinks=sinks, mask=dict(drop_p=0.3, seed=1))
    dout, dlse = cotangents_for(call)
    zeroed = (dout, dlse * 0) if through == "out" else (dout * 0, dlse)
    expected = run(call, backend, zeroed)
    tensors = leaves(call.to(backend.device), DIFFERENTIABLE)
    out, lse = call_op(replace(call.to(backend.device), tensors=tensors), backend.name)
    loss = (out * dout.to(out)).sum() if through == "out" else (lse * dlse.to(lse)).sum()
    for (name, _), g in zip(
        tensors.items(), torch.autograd.grad(loss, list(tensors.values()), allow_unused=True), strict=True
    ):
        g = torch.zeros_like(tensors[name]) if g is None else g
        torch.testing.assert_close(g.cpu(), expected["d" + name], rtol=1e-5, atol=1e-6)


def test_return_lse_does_not_change_out(build):
    call = make_call(types="fp32", mask=dict(drop_p=0.3, seed=1)).to(build.device)
    assert torch.equal(call_op(call, build.name, return_lse=False), call_op(call, build.name)[0])


def test_gradient_types(build):
    """Gradients have their tensor's type: an fp32 prefix under bf16 rows gets fp32, unrounded, gradients."""
    for types in ("bf16+fp32", "fp16+fp32", "bf16", "fp32"):
        call = make_call(types=types, bias=(4, 11), sinks=True, B=9)
        got = run(call, build, cotangents_for(call))
        assert got["out"].dtype == call.tensors["q"].dtype
        assert got["lse"].dtype == torch.float32
        for name, x in call.tensors.items():
            assert got["d" + name].dtype == x.dtype, name
        if types == "bf16+fp32":
            for name in ("dprefix_k", "dprefix_v"):
                assert not torch.equal(got[name], got[name].bfloat16().float()), f"{name} was rounded to bf16"


def test_fp64_lse_is_fp64(double_build):
    assert run(make_call(), double_build)["lse"].dtype == torch.float64


@pytest.mark.parametrize(("wanted", "through"), list(product(["q", "prefix_k"], ["out", "lse"])))
def test_second_derivative(backend, wanted, through):
    """Kernel backends refuse it in words; the reference is plain PyTorch and has it."""
    call = make_call(types="fp32").to(backend.device)
    tensors = leaves(call, {wanted})
    out, lse = call_op(replace(call, tensors=tensors), backend.name)
    loss = out.square().sum() if through == "out" else lse.square().sum()
    [first] = torch.autograd.grad(loss, tensors[wanted], create_graph=True)
    if not backend.kernel:
        assert torch.autograd.grad(first.square().sum(), tensors[wanted])[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match=r"second derivative"):
        torch.autograd.grad(first.square().sum(), tensors[wanted])


def test_repeated_backward_through_a_kept_graph(backend):
    call = make_call(types="fp32", mask=dict(drop_p=0.3, seed=1)).to(backend.device)
    tensors = leaves(call, {"prefix_k", "q"})
    out = call_op(replace(call, tensors=tensors), backend.name, return_lse=False)
    wanted = [tensors["prefix_k"], tensors["q"]]
    first = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(out.sum(), wanted)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_an_input_changed_in_place_before_backward_is_noticed(backend):
    call = make_call(types="fp32").to(backend.device)
    tensors = leaves(call, {"prefix_k"})
    out = call_op(replace(call, tensors=tensors), backend.name, return_lse=False)
    tensors["q"].mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()
