"""Hold results against the oracle, with a tolerance that is measured: eager PyTorch's error on the same inputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ctkernels import dispatch, dispatch_table
from ctkernels.testing import oracle
from ctkernels.testing.backends import Backend
from ctkernels.testing.calls import Call, Seen, run, run_dense, unpack, unpacked, visibility


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
    call: Call, got: dict[str, Tensor], cotangents: tuple[Tensor, Tensor] | None, names: Collection[str] | None = None
) -> None:
    """Hold results against the oracle in fp64; the tolerance is measured with eager PyTorch in the call's own type."""
    Judge(call, cotangents).check(got, names)


class Judge:
    """What the results of a call are held against, computed once for any number of builds.

    max |got - truth| <= 2 max |eager - truth| + one rounding unit of the result + one of what it is computed from.

    In fp64 the truth itself has such errors, so that eager PyTorch measures nothing: there, 1000 units are allowed.
    """

    def __init__(self, call: Call, cotangents: tuple[Tensor, Tensor] | None) -> None:
        seen = visibility(call)
        truth, dtype = run_dense(call, cotangents, torch.float64, seen), call.tensors["q"].dtype
        eager = truth if dtype == torch.float64 else run_dense(call, cotangents, dtype, seen)
        if dtype in (torch.bfloat16, torch.float16):
            # lse is fp32 whatever the rows' type: it is measured against eager PyTorch in fp32
            eager["lse"] = run_dense(call, None, torch.float32, seen)["lse"]
        units = rounding_units(call, cotangents, seen)
        self._expected = {
            name: Expected.of(x, eager[name], units[name], arithmetic_type(dtype) if name == "lse" else dtype)
            for name, x in truth.items()
        }

    def check(self, got: dict[str, Tensor], names: Collection[str] | None = None) -> dict[str, float]:
        """The largest error of each result, as a part of what is allowed.

        Raises AssertionError, which names the result, its error and what is allowed.
        """
        assert names or got.keys() == self._expected.keys()
        return {name: self._expected[name].check(name, got[name]) for name in names or got}


@dataclass(frozen=True)
class Expected:
    """A result in fp64, and how far from it one may be."""

    truth: Tensor
    finite: Tensor
    infinities: Tensor  # the values that are not finite
    largest: float
    tolerance: float

    @classmethod
    def of(cls, truth: Tensor, eager: Tensor, unit: float, dtype: torch.dtype) -> Expected:
        finite = truth.isfinite()
        filled = truth.masked_fill(~finite, 0)
        largest = _largest(filled)
        unit += torch.finfo(dtype).eps * largest
        theirs = _largest((eager.double() - filled).masked_fill(~finite, 0))
        tolerance = 1000 * unit if dtype == torch.float64 else 2 * theirs + unit
        return cls(filled, finite, truth[~finite], largest, tolerance)

    def check(self, name: str, got: Tensor) -> float:
        assert got.shape == self.truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(self.truth.shape)}"
        finite = got.isfinite()
        assert torch.equal(finite, self.finite), f"{name}: not finite where it must be, or the other way round"
        difference = got.double() - self.truth
        if len(self.infinities):
            assert torch.equal(got[~finite].double(), self.infinities), f"{name}: wrong infinities"
            difference.masked_fill_(~finite, 0)
        error = _largest(difference)
        assert error <= self.tolerance, (
            f"{name}: error {error:.3g} > {self.tolerance:.3g} (largest value {self.largest:.3g})"
        )
        return error / self.tolerance if error else 0.0


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def arithmetic_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rounding_units(call: Call, cotangents: tuple[Tensor, Tensor] | None, seen: Seen) -> dict[str, float]:
    """By result, how far roundings in the arithmetic's type move it: of the terms that are summed up, and of the sums.

    Needed beside eager PyTorch's error, which may be zero by luck where terms cancel or are all equal. The terms are
    rounded once each (`out`, where delta = <out, dout> reads it, in its own type); n additions err like a random walk
    of half a unit's step. First order, by sums of absolute values. `test_accuracy.py` does without this.
    """
    dtype = call.tensors["q"].dtype
    eps = torch.finfo(arithmetic_type(dtype)).eps
    padded = unpacked(call)
    options = padded.options
    t = {name: x.detach().double() for name, x in padded.tensors.items()}
    if cotangents is not None:
        dout, dlse = (c.double() for c in cotangents)
        if call.cu_seqlens is not None:
            lens = options["seq_lens"].tolist()
            dout, dlse = unpack(dout, lens), unpack(dlse[..., None], lens)[..., 0]
    sinks = t.get("sinks", torch.tensor(-torch.inf, dtype=torch.float64)).reshape(-1, 1)  # [H or 1, 1]
    out, lse, p = oracle.attention(**t, mask=call.mask, **options, seen=seen)
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
    return {name: _largest(x) for name, x in units.items()}


def _row_max(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
