"""Attention sinks around kernels that know nothing of them: a logit per head that has no value.

Let p and out' be the probabilities and the output without a sink, and w the share that the sink leaves to the keys:

    w_i = sigmoid(lse_i - sink)      out_i = w_i out'_i      total_i = logaddexp(lse_i, sink)

Then w_i p_ij = exp(logit_ij - total_i), and with delta_i = <out_i, dout_i>

    ds_ij = w_i p_ij (<dout_i, v_j> - delta_i) + p_ij dlse_i      dv_j = sum_i w_i p_ij dout_i
    dsink = -sum_i (1 - w_i) delta_i

which is what a kernel computes from out and dout if it takes `total` for lse, as long as lse itself has no gradient. If
it has one, the kernel gets w dout in place of dout, and lse as it is: this is exact, too, where w is as good as zero.

Over the keys of a query, ds then adds up to (1 - w_i) delta_i + dlse_i, and no longer to dlse_i alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctkernels.backends.check import expect

SUM_BLOCK = 1024


def check(out: Tensor, lse: Tensor, sinks: Tensor, dout: Tensor | None = None) -> None:
    """Raises ValueError if sinks are not one number per head on out's device, or the others do not fit together: here
    they would be broadcast without a word."""
    wanted = f"sinks must be a floating tensor ({out.shape[1]},) on {out.device}"
    fits = tuple(sinks.shape) == (out.shape[1],) and sinks.is_floating_point() and sinks.device == out.device
    expect(fits, f"{wanted}, got {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}")
    expect(lse.shape == out.shape[:3], f"lse must have shape {tuple(out.shape[:3])}, got {tuple(lse.shape)}")
    expect(dout is None or dout.shape == out.shape, f"dout must have out's shape {tuple(out.shape)}")


def apply(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """out `[B, H, S, Dv]` without sinks becomes out with them, in place."""
    check(out, lse, sinks)
    out.mul_(_kept(lse, sinks).unsqueeze(-1))


def before_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor]:
    """dout and lse as a kernel's backward pass must get them."""
    check(out, lse, sinks, dout)
    if dlse is None:  # lanes that saw no key are told by their lse of -inf
        total = torch.logaddexp(lse, _per_head(lse, sinks))
        return dout, torch.where(lse == -torch.inf, lse, total)
    return torch.mul(dout, _kept(lse, sinks).unsqueeze(-1), out=dout.new_empty(dout.shape)), lse


def gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """dsinks `[H]`, in the type of sinks."""
    check(out, lse, sinks, dout)
    per_query = _taken_from_delta(dout, out, lse, sinks)
    # sums of a fixed length: a sum to a single number would depend on how many threads share it
    lines = per_query.transpose(0, 1).flatten(1)  # [H, B * S]
    blocks = -(-lines.shape[1] // SUM_BLOCK)
    lines = torch.nn.functional.pad(lines, (0, blocks * SUM_BLOCK - lines.shape[1]))
    return -lines.unflatten(1, (blocks, SUM_BLOCK)).sum(-1).sum(-1).to(sinks.dtype)


def sum_of_ds(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """`[B, H, S]`: what ds adds up to over the keys of a query, in the type of lse."""
    check(out, lse, sinks, dout)
    taken = _taken_from_delta(dout, out, lse, sinks)
    return taken if dlse is None else taken + dlse


def _taken_from_delta(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(1 - w) delta `[B, H, S]`; 0 for queries that saw no key, whatever dout holds."""
    delta = (out.to(lse.dtype) * dout).sum(-1)
    taken = torch.sigmoid(_per_head(lse, sinks) - lse)
    return torch.where(lse == -torch.inf, 0, taken * delta)


def _per_head(lse: Tensor, sinks: Tensor) -> Tensor:
    """`[H, 1]`, in the type of lse `[B, H, S]`."""
    return sinks.to(lse.dtype).unsqueeze(-1)


def _kept(lse: Tensor, sinks: Tensor) -> Tensor:
    """w `[B, H, S]`: 0 where no key is seen, whatever the sink."""
    return torch.sigmoid(lse - _per_head(lse, sinks)).masked_fill(lse == -torch.inf, 0)
