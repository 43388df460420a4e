"""Hold results against the oracle, with a tolerance that is measured: eager PyTorch's error on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ctkernels import dispatch, dispatch_table
from ctkernels.testing import oracle
from ctkernels.testing.backends import Backend
from ctkernels.testing.calls import Call, run, run_dense, unpack


def assert_right_or_refused(call: Call, backend: Backend, cotangents: tuple[Tensor, Tensor] | None) -> None:
    """Run a call and hold it against the oracle; head dimensions that a backend says it does not serve must raise."""
    q, v = call.tensors["q"], call.tensors["v"]
    _, wide = dispatch_table.heads(q.shape[-1], v.shape[-1])
    reason = dispatch.refusal(backend.name, torch.device(backend.device), q.dtype, wide)
    try:
        got = run(call, backend, cotangents)
    except ValueError as error:
        assert reason is not None and reason in str(error), error
        return
    assert reason is None, f"not refused, though {reason}"
    assert_matches(call, got, cotangents)


def assert_matches(
    call: Call, got: dict[str, Tensor], cotangents: tuple[Tensor, Tensor] | None, names: tuple[str, ...] | None = None
) -> None:
    """Hold results against the oracle in fp64; the tolerance is measured with eager PyTorch in the call's own type."""
    truth = run_dense(call, cotangents, torch.float64)
    dtype = call.tensors["q"].dtype
    eager = run_dense(call, cotangents, dtype)
    if dtype in (torch.bfloat16, torch.float16):
        # lse is fp32 whatever the rows' type: it is measured against eager PyTorch in fp32
        eager["lse"] = run_dense(call, None, torch.float32)["lse"]
    units = rounding_units(call, cotangents)
    assert got.keys() == truth.keys()
    for name in names or truth:
        expect_close(name, got[name], truth[name], eager[name], units[name], dtype)


def expect_close(name: str, got: Tensor, truth: Tensor, eager: Tensor, unit: float, dtype: torch.dtype) -> None:
    """max |got - truth| <= 2 max |eager - truth| + one rounding unit of the result + one of what it is computed from.

    In fp64 the truth itself has such errors, so that eager PyTorch measures nothing: there, 1000 units are allowed.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: not finite where it must be, or the other way round"
    assert torch.equal(got[~finite].double(), truth[~finite]), f"{name}: wrong infinities"
    truth, got, eager = (x[finite].double() for x in (truth, got, eager))
    if not truth.numel():
        return
    own = arithmetic_type(dtype) if name == "lse" else dtype
    unit += torch.finfo(own).eps * float(truth.abs().max())
    error = float((got - truth).abs().max())
    tolerance = 1000 * unit if dtype == torch.float64 else 2 * float((eager - truth).abs().max()) + unit
    assert error <= tolerance, (
        f"{name}: error {error:.3g} > {tolerance:.3g} (largest value {float(truth.abs().max()):.3g})"
    )


def arithmetic_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rounding_units(call: Call, cotangents: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """By result, how far roundings in the arithmetic's type move it: of the terms that are summed up, and of the sums.

    Needed beside eager PyTorch's error, which may be zero by luck where terms cancel or are all equal. The terms are
    rounded once each (`out`, where delta = <out, dout> reads it, in its own type); n additions err like a random walk
    of half a unit's step. First order, by sums of absolute values. `test_accuracy.py` does without this.
    """
    t = {name: x.detach().double() for name, x in call.tensors.items()}
    dtype = call.tensors["q"].dtype
    eps = torch.finfo(arithmetic_type(dtype)).eps
    options = dict(call.options)
    if cotangents is not None:
        dout, dlse = (c.double() for c in cotangents)
    sinks = t.get("sinks", torch.tensor(-torch.inf, dtype=torch.float64)).reshape(-1, 1)  # [H or 1, 1]
    if call.cu_seqlens is not None:
        lens = call.cu_seqlens.diff().tolist()
        options["seq_lens"] = torch.tensor(lens)
        t |= {name: unpack(t[name], lens) for name in ("q", "k", "v")}
        if cotangents is not None:
            dout, dlse = unpack(dout, lens), unpack(dlse[..., None], lens)[..., 0]
    out, lse, p = oracle.attention(**t, mask=call.mask, **options)
    free = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)  # without sinks, as lse has it
    B, H, _, D = t["q"].shape
    P, Hk = t["prefix_k"].shape[-2], t["k"].shape[1]
    index = options.get("prefix_index")
    index = torch.zeros(B, dtype=torch.long) if index is None else index.long()
    q = t["q"].abs()  # [B, H, S, D]
    keys, values = (
        torch.cat([(x if x.dim() == 4 else x[None])[index], own], 2).repeat_interleave(H // Hk, 1).abs()
        for x, own in ((t["prefix_k"], t["k"]), (t["prefix_v"], t["v"]))
    )  # [B, H, P + T, D | Dv]
    scale = options.get("scale")
    scale = abs(D**-0.5 if scale is None else scale)
    logits = (scale * (q @ keys.transpose(-1, -2))).masked_fill(p == 0, 0)
    # error of p = exp(logit - lse), where lse, alone and with the sink, is stored in the arithmetic's type
    lse, whole = (x.masked_fill(x.isinf(), 0) for x in (lse, torch.logaddexp(lse, sinks)))
    lse_unit = eps * (1 + _row_max(logits)[..., 0] + lse.abs())
    relative = lse_unit[..., None] + eps * whole.abs()[..., None]
    over_keys, over_queries = (eps / 2 * n**0.5 for n in (p.shape[-1], B * H // Hk * p.shape[2]))  # the sums
    units = {"out": (relative + over_keys) * (p @ values), "lse": lse_unit}
    if cotangents is not None:
        delta = (out.abs() * dout.abs()).sum(-1, keepdim=True)
        terms = p * (dout.abs() @ values.transpose(-1, -2) + delta) + free * dlse.abs()[..., None]  # of ds
        ds = relative * terms + torch.finfo(dtype).eps / 2 * p * delta  # [B, H, S, P + T]
        units["dq"] = scale * (ds + over_keys * terms) @ keys
        ds, weights = ds + over_queries * terms, (relative + over_queries) * p
        for name, grad in (
            ("k", scale * ds.transpose(-1, -2) @ q),
            ("v", weights.transpose(-1, -2) @ dout.abs()),
        ):
            grad = grad.unflatten(1, (Hk, H // Hk)).sum(2)  # [B, Hk, P + T, D | Dv]
            units["d" + name], units["dprefix_" + name] = grad[:, :, P:], grad[:, :, :P].sum(0)
        if "prefix_bias" in t:
            units["dprefix_bias"] = ds[..., :P].sum((0, 1, 2) if t["prefix_bias"].dim() == 1 else (0, 2))
        if "sinks" in t:
            taken = torch.sigmoid(sinks - lse)[..., None]
            of_out = (units["out"] * dout.abs()).sum(-1, keepdim=True)  # what errors of out do to delta
            roundings = relative + torch.finfo(dtype).eps / 2 + over_queries
            units["dsinks"] = (taken * (roundings * delta + of_out)).sum((0, 2))
    return {name: float(x.max()) if x.numel() else 0.0 for name, x in units.items()}


def _row_max(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
