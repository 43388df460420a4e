"""The op under torch.func and forward-mode differentiation: right, or refused in so many words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctkernels.testing.calls import Call, call_op, cotangents_for, make_call, run

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap runs entry by entry
NAMES = ("prefix_k", "prefix_v", "q", "prefix_bias", "sinks")


@pytest.fixture
def call() -> Call:
    return make_call(types="fp32", mask=dict(drop_p=0.3, seed=1), bias=(11,), sinks=True)


def attend(call: Call, backend, *changed: Tensor):
    """out and lse with other tensors in place of NAMES, as many as there are."""
    return call_op(call.with_tensors(**dict(zip(NAMES, changed, strict=False))), backend.name)


WEIGHTS = cotangents_for(make_call(types="fp32"))


def loss(call: Call, backend, *changed: Tensor) -> Tensor:
    return sum((w.to(x) * x).sum() for w, x in zip(WEIGHTS, attend(call, backend, *changed), strict=True))


def test_grad_is_that_of_autograd(backend, call):
    expected = run(call, backend, WEIGHTS)
    only_out = run(call, backend, (WEIGHTS[0], torch.zeros_like(WEIGHTS[1])))
    call = call.to(backend.device)
    inputs = [call.tensors[name] for name in NAMES]
    for gradient in (torch.func.grad, lambda f, n: torch.no_grad()(torch.func.grad(f, n))):
        actual = gradient(lambda *x: loss(call, backend, *x), tuple(range(len(NAMES))))(*inputs)
        for name, x in zip(NAMES, actual, strict=True):
            assert torch.equal(x.cpu(), expected["d" + name]), name
    out, pullback = torch.func.vjp(lambda x: attend(call, backend, x)[0], inputs[0])
    assert torch.equal(out.cpu(), expected["out"])
    torch.testing.assert_close(pullback(WEIGHTS[0].to(out))[0].cpu(), only_out["dprefix_k"], rtol=0, atol=1e-6)


def test_vmap_over_prefixes(backend, call):
    """One prefix after another, forward and gradient."""
    call = call.to(backend.device)
    several = call.tensors["prefix_k"] * torch.tensor([1.0, -0.5, 2.0], device=backend.device)[:, None, None, None]
    out = torch.func.vmap(lambda x: attend(call, backend, x)[0])(several)
    gradients = torch.func.vmap(torch.func.grad(lambda x: loss(call, backend, x)))(several)
    for x, o, g in zip(several, out, gradients, strict=True):
        torch.testing.assert_close(o, attend(call, backend, x)[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(g, torch.func.grad(lambda x: loss(call, backend, x))(x), rtol=1e-4, atol=1e-5)


def test_what_kernels_cannot_differentiate_is_refused(kernel_backend, call):
    """Would catch: a forward-mode derivative that is dropped, since the operator does not know of any."""
    call = call.to(kernel_backend.device)
    x = call.tensors["prefix_k"]
    no_tangent = r"no forward-mode derivative .* use backend='reference'"
    with pytest.raises(RuntimeError, match=no_tangent):
        torch.func.jvp(lambda x: attend(call, kernel_backend, x)[0], (x,), (x,))
    for leaf in (x, x.detach().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=no_tangent):
            attend(call, kernel_backend, forward_ad.make_dual(leaf, x))
    with forward_ad.dual_level():
        attend(call, kernel_backend)  # nothing has a tangent
    with pytest.raises(RuntimeError, match=r"no second derivative .* use backend='reference'"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: loss(call, kernel_backend, x))(x).sum())(x)


def test_the_reference_has_all_derivatives(call):
    """What the message above recommends works."""
    reference = type("Named", (), {"name": "reference"})
    x = call.tensors["prefix_k"]
    _, tangent = torch.func.jvp(lambda x: loss(call, reference, x), (x,), (x,))
    torch.testing.assert_close(tangent, (torch.func.grad(lambda x: loss(call, reference, x))(x) * x).sum())
    second = torch.func.grad(lambda x: torch.func.grad(lambda x: loss(call, reference, x))(x).sum())(x)
    assert second.abs().max() > 0
