"""Matrix products over the visible pairs of queries and keys alone, with all derivatives.

A plain product gives a hidden pair the weight 0. That leaves nothing of finite values, while 0 * NaN and 0 * infinity
are NaN. Here hidden pairs contribute nothing, whatever they hold. The derivatives are products of the same two kinds:

    pairs: s_ij = <a_i, b_j>, 0 where hidden       da = sums(ds, b)     db = sums(ds^T, a)
    sums:  y_i = sum over visible j of x_ij b_j    dx = pairs(dy, b)    db = sums(x^T, dy)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairs(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    """`[..., M, N]` products of a `[..., M, D]` and b `[..., N, D]`; 0 where not `visible`, bool `[..., M, N]`."""
    return (_Pairs if torch.compiler.is_compiling() else _PairsWithTangents).apply(a, b, visible)


def sums(x: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    """`[..., M, D]` sums of b `[..., N, D]` with weights x `[..., M, N]` over what is `visible`, bool `[..., M, N]`."""
    return (_Sums if torch.compiler.is_compiling() else _SumsWithTangents).apply(x, b, visible)


class _Bilinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class _Pairs(_Bilinear):
    @staticmethod
    def forward(a, b, visible):
        return torch.where(visible, a @ b.mT, 0)

    @staticmethod
    def backward(ctx, grad):
        a, b, visible = ctx.saved_tensors
        da = sums(grad, b, visible) if ctx.needs_input_grad[0] else None
        db = sums(grad.mT, a, visible.mT) if ctx.needs_input_grad[1] else None
        return da, db, None


class _Sums(_Bilinear):
    @staticmethod
    def forward(x, b, visible):
        x, finite = torch.where(visible, x, 0), b.isfinite()
        # under torch.func's transforms and torch.compile, values cannot decide
        decides = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        if decides and bool(finite.all()):
            return x @ b
        return x @ torch.where(finite, b, 0) + _not_finite(x, b, visible)

    @staticmethod
    def backward(ctx, grad):
        x, b, visible = ctx.saved_tensors
        dx = pairs(grad, b, visible) if ctx.needs_input_grad[0] else None
        db = sums(x.mT, grad, visible.mT) if ctx.needs_input_grad[1] else None
        return dx, db, None


class _PairsWithTangents(_Pairs):
    """With the forward-mode derivative, which torch.compile cannot trace."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, da, db, _):
        a, b, visible = ctx.saved_tensors
        return _added(None if da is None else pairs(da, b, visible), None if db is None else pairs(a, db, visible))


class _SumsWithTangents(_Sums):
    """The same for sums."""

    setup_context = _PairsWithTangents.setup_context

    @staticmethod
    def jvp(ctx, dx, db, _):
        x, b, visible = ctx.saved_tensors
        return _added(None if dx is None else sums(dx, b, visible), None if db is None else sums(x, db, visible))


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _not_finite(x: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    """What NaN and infinities in b add to the sums: NaN, an infinity, or 0. Found by counting."""

    def count(weights: Tensor, values: Tensor) -> Tensor:
        return weights.to(x.dtype) @ values.to(x.dtype)

    up, down = b == math.inf, b == -math.inf
    ups = count(x > 0, up) + count(x < 0, down)
    downs = count(x > 0, down) + count(x < 0, up)
    lost = count(visible, b.isnan()) + count(visible & (x == 0), b.isinf())
    lost = (lost > 0) | ((ups > 0) & (downs > 0))
    infinite = torch.where(ups > 0, math.inf, torch.where(downs > 0, -math.inf, 0.0))
    return torch.where(lost, math.nan, infinite).to(x.dtype)
