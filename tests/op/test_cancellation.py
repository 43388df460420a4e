"""Gradients where one key takes nearly all of a softmax, so that dp - delta cancels: delta must not be its rounding."""

from statistics import median

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctkernels.testing.calls import Call, cotangents_for, make_call, run, run_dense

NAMES = ("dq", "dk", "dprefix_k")
SEEDS = range(11)
# keys of the prefix, and by how much the logit of the dominant key exceeds the others, which are 0
CASES = [(1, 0.0), (1, 7.0), (1, 12.0), (1, 16.0), (100, 12.0)]


def dominated(P: int, gap: float, types: str, seed: int, by: str = "k", **sizes) -> Call:
    """One query, one own key and P prefix keys; the own key, or a prefix key, has the logit `gap`, the others 0."""
    call = make_call(B=1, H=1, Hk=1, S=1, P=P, D=64, types="fp64", seed=seed, **sizes)
    q = call.tensors["q"][0, 0, 0]
    for name in ("k", "prefix_k"):
        keys = call.tensors[name]
        keys -= (keys @ q)[..., None] * q / q.square().sum()
    key = call.tensors["k"][0, 0, 0] if by == "k" else call.tensors["prefix_k"][0, P // 2]
    key += q * (8 * gap / q.square().sum())
    rows, prefix = {"bf16+fp32": ("bf16", "fp32")}.get(types, (types, types))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, x in call.tensors.items():
        own = torch.float32 if name in ("prefix_bias", "sinks") else dtypes[prefix if "prefix" in name else rows]
        call.tensors[name] = x.to(own)
    return call


def sdpa(call: Call, dout: Tensor) -> dict[str, Tensor]:
    leaves = {name: x.to(dout.dtype).requires_grad_() for name, x in call.tensors.items()}
    keys, values = (torch.cat([leaves["prefix_" + n][None], leaves[n]], 2) for n in "kv")
    scaled_dot_product_attention(leaves["q"], keys, values).backward(dout)
    return {"d" + name: x.grad for name, x in leaves.items()}


def errors(got: dict, truth: dict, names: tuple[str, ...]) -> list[float]:
    """Relative errors; relative to the smallest normal numbers where the truth is smaller (fp16)."""
    found = []
    for name in names:
        error, norm = float((got[name].double() - truth[name]).norm()), float(truth[name].norm())
        found.append(error / max(norm, torch.finfo(got[name].dtype).tiny * truth[name].numel() ** 0.5))
    return found


def medians(rows: list[list[float]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("types", ["fp32", "bf16", "fp16", "bf16+fp32"])
@pytest.mark.parametrize(("P", "gap"), CASES)
def test_a_dominant_own_key(cpu_build, P, gap, types):
    """Errors of dq and dk are at most twice those of eager PyTorch, or 1.2 times those of SDPA, and a few roundings."""
    ours, eager, fused = [], [], []
    for seed in SEEDS:
        call = dominated(P, gap, types, seed)
        dout, dlse = cotangents_for(call, seed)
        dlse = torch.zeros_like(dlse)
        truth = run_dense(call, (dout, dlse), torch.float64)
        ours.append(errors(run(call, cpu_build, (dout, dlse)), truth, NAMES))
        eager.append(errors(run_dense(call, (dout, dlse), dout.dtype), truth, NAMES))
        fused.append(errors(sdpa(call, dout), truth, NAMES))
    few = 16 * torch.finfo(dout.dtype).eps
    for name, mine, plain, other in zip(NAMES, medians(ours), medians(eager), medians(fused), strict=True):
        assert mine <= max(2 * plain, 1.2 * other), f"{name}: {mine:.2g}, eager {plain:.2g}, sdpa {other:.2g}"
        assert mine <= few, f"{name}: {mine:.2g}"


OPTIONS = {
    "a prefix key": dict(by="prefix_k"),
    "softcap": dict(softcap=40.0),
    "softcap, of a prefix key with a bias": dict(by="prefix_k", softcap=40.0, bias=(1, 300)),
    "bias": dict(bias=(300,)),
    "sinks": dict(sinks=True),
    "sinks, of a prefix key": dict(sinks=True, by="prefix_k"),
    "values of their own": dict(Dv=40),
}


@pytest.mark.parametrize("through", ["out", "both"])
@pytest.mark.parametrize("types", ["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_dominant_key_with_options(cpu_build, options, types, through):
    """The same held against fp64: a few roundings, whichever key it is and whatever else is on."""
    rows = []
    for seed in SEEDS:
        call = dominated(300, 14.0, types, seed, **OPTIONS[options])
        names = (*NAMES, *(("dprefix_bias",) if "prefix_bias" in call.tensors else ()))
        dout, dlse = cotangents_for(call, seed)
        cotangents = (dout, dlse * (through == "both"))
        rows.append(errors(run(call, cpu_build, cotangents), run_dense(call, cotangents, torch.float64), names))
    for name, mine in zip(names, medians(rows), strict=True):
        assert mine <= 32 * torch.finfo(dout.dtype).eps, f"{name}: {mine:.2g}"


def test_several_queries_with_dominant_keys(cpu_build):
    """Queries that each look at one key, of the prefix or their own: grouped heads, ragged rows, many key blocks."""
    call = make_call(lens=[40, 7, 21], H=4, Hk=2, P=900, D=64, types="fp32", mask=dict(drop_p=0.1, seed=1), scale=1.5)
    cotangents = cotangents_for(call)
    truth, eager = (run_dense(call, cotangents, dtype) for dtype in (torch.float64, torch.float32))
    got = run(call, cpu_build, cotangents)
    for name in ("dq", "dk", "dv", "dprefix_k", "dprefix_v"):
        ours, plain = (float((x[name].double() - truth[name]).norm()) for x in (got, eager))
        assert ours <= 2 * plain, f"{name}: {ours:.3g}, eager {plain:.3g}"


def test_a_single_key_gets_no_gradient(cpu_build):
    """Its probability is 1 whatever the query is."""
    for types in ("fp32", "bf16", "fp16"):
        call = make_call(B=9, S=1, P=0, D=64, types=types)
        dout, dlse = cotangents_for(call)
        got = run(call, cpu_build, (dout, torch.zeros_like(dlse)))
        assert not got["dq"].any() and not got["dk"].any() and got["dv"].any()
