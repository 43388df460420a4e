"""NaN and infinities reach what sees them, and nothing else: not through tiles, blocks of keys, or sums over rows."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ctkernels as ct
from ctkernels.testing import oracle
from ctkernels.testing.backends import Backend, builds
from ctkernels.testing.calls import Call, cotangents_for, make_call, run

INF, NAN = float("inf"), float("nan")
EXACT = [b for b in builds() if b.name in ("cpu", "reference")]  # backends that promise it


@pytest.fixture(params=EXACT, ids=str)
def exact(request: pytest.FixtureRequest):
    if request.param.isa is None:
        yield request.param
        return
    before = ct.dispatch.cpu_info()["isa"]
    ct.dispatch.set_cpu_isa(request.param.isa)
    yield request.param
    ct.dispatch.set_cpu_isa(before)


def spans(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs)


# hidden spans and rules such that each poisoned key is seen by some queries and hidden from others of the same tile
CALLS = {
    "rows that share tiles": dict(
        B=6, S=3, P=40, D=16, mask=dict(hidden=spans((5, 9), (0, 0), (0, 40), (6, 7), (30, 40), (0, 0)))
    ),
    "several blocks of keys": dict(
        B=3, S=7, P=300, D=24, mask=dict(hidden=spans((0, 150), (100, 300), (0, 0)), drop_p=0.3, seed=3)
    ),
    "one row, a window": dict(B=1, S=20, P=30, H=1, Hk=1, D=16, window=9),
    "few lanes": dict(B=1, S=3, P=20, H=1, Hk=1, D=64),
    "bidirectional, bias and softcap": dict(
        B=3, S=5, P=30, D=17, causal=False, bias=(30,), softcap=3.0, mask=dict(hidden=spans((0, 9), (7, 30), (0, 0)))
    ),
    "context in own keys": dict(B=3, S=12, P=0, D=8, mask=dict(length=8, hidden=spans((0, 4), (4, 8), (2, 3)))),
    "more keys than queries": dict(B=2, S=2, T=9, P=11, D=16, alibi_slopes=torch.tensor([0.5, 0.1, 0.3, 0.0])),
}


def visible(call: Call) -> Tensor:
    """bool [B, S, P + T]"""
    t, o = call.tensors, call.options
    seen, _ = oracle.visible_keys(
        t["q"].shape[0], t["q"].shape[2], t["k"].shape[2], t["prefix_k"].shape[-2], call.mask, None, None, None,
        o.get("causal", True), o.get("window"), True,
    )  # fmt: skip
    return seen


def check(call: Call, backend: Backend, name: str, poisoned: Tensor, value: float) -> bool:
    """Poison rows of a tensor: keys [P + T] of the prefix or of row 0, or queries [S] of row 0.

    A query is affected if it sees such a key or is one; a key, in the backward pass, if an affected query sees it.
    Every other number must have the bits that it had. False: there is no other.
    """
    seen, P = visible(call), call.tensors["prefix_k"].shape[-2]
    B, S, _ = seen.shape
    queries = torch.zeros(B, S, dtype=torch.bool)
    dout, dlse = cotangents_for(call)
    changed = call.clone()
    if name in ("q", "dout"):
        queries[0] = poisoned
        (dout if name == "dout" else changed.tensors["q"])[0][:, poisoned] = value
    else:
        rows = slice(None) if "prefix" in name else slice(0, 1)
        queries[rows] = (seen[rows] & poisoned).any(-1)
        own = poisoned[:P] if "prefix" in name else poisoned[P:]
        (changed.tensors[name] if "prefix" in name else changed.tensors[name][0])[:, own] = value
    queries &= seen.any(-1)
    keys = (seen & queries[..., None]).any(1)  # [B, P + T]
    if queries.all():
        return False
    clean_cotangents = cotangents_for(call)
    clean, got = run(call, backend, clean_cotangents), run(changed, backend, (dout, dlse))
    for result, rest in (
        ("out", ~queries),
        ("lse", ~queries),
        ("dq", ~queries),
        ("dk", ~keys[:, P:]),
        ("dv", ~keys[:, P:]),
    ):
        if name == "dout" and result in ("out", "lse"):
            rest = torch.ones_like(rest)
        a, b = (x[result].transpose(1, 2)[rest] for x in (clean, got))
        assert torch.equal(a, b), f"{result} of what does not see {name}"
    untouched = ~keys[:, :P].any(0)
    for result in ("dprefix_k", "dprefix_v"):
        assert torch.equal(clean[result][:, untouched], got[result][:, untouched]), result
    if name in ("v", "prefix_v") or (name != "dout" and value != value):
        assert not got["out"].transpose(1, 2)[queries].isfinite().all(-1).any()
    if value != value:
        assert got["dq"].transpose(1, 2)[queries].isnan().all()
    return True


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("types", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("case", CALLS)
def test_reaches_only_what_sees_it(exact, case, types, value):
    call = make_call(types=types, **CALLS[case])
    seen, P = visible(call), call.tensors["prefix_k"].shape[-2]
    tried = 0
    for name in ("prefix_k", "prefix_v", "k", "v", "q", "dout"):
        poisoned = torch.zeros(seen.shape[1] if name in ("q", "dout") else seen.shape[2], dtype=torch.bool)
        if "prefix" in name and P == 0:
            continue
        poisoned[{"prefix_k": P // 5, "prefix_v": P // 5, "k": -2, "v": -2, "q": 1, "dout": 1}[name]] = True
        tried += check(call, exact, name, poisoned, value)
    assert tried >= 3


@pytest.mark.parametrize("value", [NAN, INF])
def test_one_number_of_a_value_reaches_one_number_of_the_outputs(exact, value):
    """Queries that see it keep their other numbers; those that do not see it keep every bit."""
    call = make_call(**{**CALLS["several blocks of keys"], "types": "fp32"})
    seen = visible(call)[..., 60]
    changed = call.clone()
    changed.tensors["prefix_v"][:, 60, 5] = value
    clean, got = (run(c, exact)["out"].transpose(1, 2) for c in (call, changed))
    assert torch.equal(clean[~seen], got[~seen]) and (~seen).any()
    others = torch.arange(24) != 5
    torch.testing.assert_close(got[seen][..., others], clean[seen][..., others], rtol=1e-5, atol=1e-6)
    assert not got[seen][..., 5].isfinite().any()


def test_a_prefix_that_is_split_among_workers(exact):
    """Decoding over a long prefix, whose parts are merged."""
    call = make_call(B=2, H=1, Hk=1, S=1, P=1500, D=64, types="fp32", mask=dict(hidden=spans((700, 900), (0, 0))))
    changed = call.clone()
    changed.tensors["prefix_v"][:, 800] = NAN
    clean, got = run(call, exact), run(changed, exact)
    assert torch.equal(clean["out"][0], got["out"][0]) and got["out"][1].isnan().all()
    assert torch.equal(clean["lse"], got["lse"])


def test_second_derivatives_of_the_reference_ignore_what_is_hidden():
    call = make_call(**CALLS["rows that share tiles"])
    gradients = []
    for value in (0.0, NAN):
        t = {name: x.clone() for name, x in call.tensors.items()}
        t["prefix_k"][:, 6] = t["prefix_v"][:, 6] = value
        q = t["q"][:1].requires_grad_()  # a row that does not see key 6
        out = ct.prefix_attention(
            q, t["k"][:1], t["v"][:1], t["prefix_k"], t["prefix_v"], ct.ContextMask(hidden=spans((5, 9))),
            backend="reference",
        )  # fmt: skip
        [first] = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), q)[0])
    assert torch.equal(*gradients) and gradients[0].isfinite().all()


SWITCH = """
import torch, ctkernels as ct
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 3, 8) for _ in range(3))
pk, pv = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 5, 8)
options = dict(backend="{backend}", seq_lens=torch.tensor([3, 2]), prefix_lens=torch.tensor([4]))
k[1, :, 2] = pv[:, 4] = float("nan")  # padding
bias = torch.tensor([0.0, -float("inf"), 0.0, 0.0, float("nan")])
out = ct.prefix_attention(q, k, v, pk, pv, prefix_bias=bias, **options)
out.backward(torch.ones_like(out))
def attempt(*tensors, **more):
    try:
        out = ct.prefix_attention(*tensors, **more, **options)
        dout = torch.ones_like(out)
        dout[1, 3, 1, 7] = float("inf")
        out.backward(dout)
        print("nothing")
    except FloatingPointError as error:
        print(error)
pv[2, 3, 6] = pv[3, 3, 6] = float("-inf")
attempt(q, k, v, pk, pv)
pv[2:, 3] = 0
k[1, 2, 1, 4] = float("nan")
attempt(q, k, v, pk, pv)
k[1, 2, 1, 4] = 0
attempt(q, k, v, pk, pv, sinks=torch.tensor([0.0, float("inf"), float("nan"), -float("inf")]))
attempt(q, k, v, pk, pv)
"""


@pytest.mark.parametrize("backend", [b.name for b in builds() if b.device == "cpu" and b.isa in (None, "portable")])
def test_the_debug_switch_names_what_is_not_finite(backend):
    """In every backend, forward and backward; padding, closed gates and infinite sinks pass."""
    environment = {**os.environ, "CTKERNELS_CHECK_FINITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SWITCH.format(backend=backend)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    prefix_v, k, sinks, dout = done.stdout.splitlines()
    assert "prefix_v of shape (1, 4, 5, 8) holds -inf at (0, 2, 3, 6); 2 of its 160 numbers are not finite" in prefix_v
    assert "k of shape (2, 4, 3, 8) holds nan at (1, 2, 1, 4); 1 of its" in k
    assert "sinks of shape (4,) holds nan at (2,)" in sinks
    if backend == "reference":  # plain PyTorch: no code of ours sees the gradient that arrives
        assert dout == "nothing"
    else:
        assert "gradient of out of shape (2, 4, 3, 8) holds inf at (1, 3, 1, 7)" in dout
