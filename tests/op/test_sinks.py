"""Attention sinks: a logit per head that has no value, and is not part of lse."""

from dataclasses import replace

import pytest
import torch

import ctkernels as ct
from ctkernels.backends import sinks
from ctkernels.testing.calls import Call, call_op, cotangents_for, make_call, run

TIGHT = dict(rtol=1e-5, atol=1e-6)
MASK = dict(drop_p=0.3, seed=1)


def without_sinks(call: Call) -> Call:
    return replace(call, tensors={name: x for name, x in call.tensors.items() if name != "sinks"})


@pytest.mark.parametrize("lens", [None, [4, 0, 7]], ids=["padded", "packed"])
def test_a_sink_is_a_key_without_a_value(build, lens):
    """The same as one more prefix key of zeros, whose bias is the sink, and whose value is zero; but for lse."""
    call = make_call(types="fp32", lens=lens, bias=(4, 11), sinks=True, mask=MASK)
    dout, dlse = cotangents_for(call)
    t = call.tensors
    key = {name: torch.nn.functional.pad(t[name], (0, 0, 1, 0)) for name in ("prefix_k", "prefix_v")}
    keep = torch.cat([torch.ones(3, 1) > 0, ct.ContextMask(**call.mask).dense(3, 11)], 1)
    bias = torch.cat([t["sinks"][:, None], t["prefix_bias"]], 1)
    other = replace(without_sinks(call).with_tensors(prefix_bias=bias, **key), mask=dict(keep=keep))
    got, expected = run(call, build, (dout, 0 * dlse)), run(other, build, (dout, 0 * dlse))
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(got[name], expected[name], **TIGHT)
    for name in ("dprefix_k", "dprefix_v"):
        torch.testing.assert_close(got[name], expected[name][:, 1:], **TIGHT)
    torch.testing.assert_close(got["dsinks"], expected["dprefix_bias"][:, 0], **TIGHT)
    torch.testing.assert_close(got["dprefix_bias"], expected["dprefix_bias"][:, 1:], **TIGHT)
    with_sink = torch.logaddexp(got["lse"], t["sinks"][:, None] if lens is None else t["sinks"])
    torch.testing.assert_close(with_sink, expected["lse"], **TIGHT)


@pytest.mark.parametrize("types", ["fp32", "bf16+fp32"])
def test_lse_is_that_without_sinks(build, types):
    """lse still merges partial attentions: its bits, and the gradients that come through it alone, know no sink."""
    call = make_call(types=types, bias=(11,), sinks=True, mask=MASK)
    dout, dlse = cotangents_for(call)
    got, plain = run(call, build, (0 * dout, dlse)), run(without_sinks(call), build, (0 * dout, dlse))
    assert (got.pop("dsinks") == 0).all() and not torch.equal(got.pop("out"), plain["out"])
    for name, x in got.items():
        assert torch.equal(x, plain[name]), name


@pytest.mark.parametrize("types", ["fp32", "bf16+fp32"])
def test_no_weight_is_no_sink(build, types):
    """A sink of minus infinity leaves every bit as it is."""
    call = make_call(types=types, bias=(11,), sinks=True, mask=MASK)
    call.tensors["sinks"].fill_(-torch.inf)
    cotangents = cotangents_for(call)
    got, plain = run(call, build, cotangents), run(without_sinks(call), build, cotangents)
    assert (got.pop("dsinks") == 0).all()
    for name, x in got.items():
        assert torch.equal(x, plain[name]), name


def test_a_sink_that_is_nan_says_so(build):
    """Its head is NaN, the others do not notice, and queries that see nothing stay zero."""
    mask = dict(length=16, hidden=torch.tensor([[0, 16], [0, 0], [0, 0]]))
    call = make_call(types="fp32", sinks=True, mask=mask)
    clean = run(call, build)["out"]
    call.tensors["sinks"][2] = torch.nan
    out = run(call, build)["out"]
    assert out[1:, 2].isnan().all() and (out[0] == 0).all()
    assert torch.equal(out[:, [0, 1, 3]], clean[:, [0, 1, 3]])


def test_each_head_has_its_own(build):
    call = make_call(types="fp32", sinks=True)
    before = run(call, build, cotangents_for(call))
    changed = call.with_tensors(sinks=call.tensors["sinks"] + torch.tensor([0.0, 0.0, 1.0, 0.0]))
    after = run(changed, build, cotangents_for(call))
    for name in ("out", "dq"):
        same = (before[name] == after[name]).flatten(2).all(-1).all(0)
        assert same.tolist() == [True, True, False, True], name


def test_no_memory_of_the_caller_is_written(backend):
    """Scaling happens in the kernel's own output; the gradient that arrives stays as it is."""
    call = make_call(types="fp32", sinks=True).to(backend.device)
    leaves = {name: x.clone().requires_grad_() for name, x in call.tensors.items()}
    outputs = call_op(call.with_tensors(**leaves), backend.name)
    cotangents = [c.to(o) for c, o in zip(cotangents_for(call), outputs, strict=True)]
    kept = [x.detach().clone() for x in (*leaves.values(), *outputs, *cotangents)]
    torch.autograd.backward(outputs, cotangents)
    for before, after in zip(kept, (*leaves.values(), *outputs, *cotangents), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("H", [1, 3])
def test_the_gradient_has_the_same_bits_for_any_number_of_threads(H):
    """So many queries that a plain sum would be shared out among threads."""
    generator = torch.Generator().manual_seed(0)
    out, dout = torch.randn(2, 2, H, 70000, 2, generator=generator)
    lse, sink = torch.randn(2, H, 70000, generator=generator), torch.randn(H, generator=generator)
    before, values = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            values.append(sinks.gradient(dout, out, lse, sink))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(values[0], x) for x in values)
    exact = [x.double() for x in (dout, out, lse, sink)]
    torch.testing.assert_close(values[0].double(), sinks.gradient(*exact), rtol=1e-4, atol=1e-3)
