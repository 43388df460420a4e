"""CTKERNELS_CHECK_FINITE=1 in the environment: a debug switch that finds NaN and infinities in what a call reads.

It costs a pass over all inputs of every call, and waits for the GPU. Padding is left out: it may hold anything.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ctkernels.problem import Problem

VARIABLE = "CTKERNELS_CHECK_FINITE"


def enabled() -> bool:
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None,
    sinks: Tensor | None,
    problem: Problem,
) -> None:
    """Raise FloatingPointError that names the first input with a number that is not finite, and where it is.

    A bias of -inf closes a gate, and sinks may be infinite: those pass.
    """
    queries = keys = context = None
    if problem.seq_lens is not None:
        S, T, lens = q.shape[2], k.shape[2], problem.seq_lens.long()[:, None]
        own = torch.arange(T, device=q.device)
        at = own[:S] if T == S else own[:S] + lens - S
        queries, keys = (at < lens)[:, None, :, None], (own < lens)[:, None, :, None]
    if problem.prefix_lens is not None:
        context = torch.arange(prefix_k.shape[2], device=q.device) < problem.prefix_lens.long()[:, None]
    prefixes = None if context is None else context[:, None, :, None]
    for name, x, valid, legal in (
        ("q", q, queries, ()),
        ("k", k, keys, ()),
        ("v", v, keys, ()),
        ("prefix_k", prefix_k, prefixes, ()),
        ("prefix_v", prefix_v, prefixes, ()),
        ("prefix_bias", prefix_bias, None if context is None else context[:, None], (-math.inf,)),
        ("sinks", sinks, None, (-math.inf, math.inf)),
        ("alibi_slopes", problem.alibi_slopes, None, ()),
    ):
        _expect_finite(name, x, valid, legal)


def check_gradients(dout: Tensor, dlse: Tensor | None, lse: Tensor) -> None:
    """The same for the gradients of out and lse, but of queries that saw no key."""
    sees = lse != -math.inf
    _expect_finite("the gradient of out", dout, sees[..., None])
    _expect_finite("the gradient of lse", dlse, sees)


def _expect_finite(name: str, x: Tensor | None, valid: Tensor | None, legal: tuple[float, ...] = ()) -> None:
    if x is None:
        return
    wrong = ~x.isfinite()
    for value in legal:
        wrong &= x != value
    if valid is not None:
        wrong = wrong & valid
    if not bool(wrong.any()):
        return
    first = tuple(wrong.nonzero()[0].tolist())
    shape = tuple(wrong.shape)
    value = float(x.detach().expand(shape)[first])
    raise FloatingPointError(
        f"{VARIABLE}: {name} of shape {shape} holds {value} at {first}; {int(wrong.sum())} of its "
        f"{wrong.numel()} numbers are not finite"
    )
