"""The same attention, computed in other ways: each a short function of the same inputs, and the check against fp64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

import ctkernels as ct
from benchmarks.cases import FLOPS, Case, Inputs

# largest relative error (norms over all values) against the fp64 reference; a wrong mask gives a far larger one
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
COMPILER = "inductor"  # of torch.compile; rehearsals take "eager", which compiles nothing
CHECK_FLOPS = 5e8  # a larger problem is checked on as many rows and KV heads as this allows


def ours(x: Inputs) -> Tensor:
    """`ctkernels.prefix_attention`, on the backend that the inputs name."""
    return ct.prefix_attention(
        x.q, x.k, x.v, x.prefix_k, x.prefix_v, x.mask, prefix_index=x.prefix_index, backend=x.backend
    )


def join(prefix: Tensor, own: Tensor, prefix_index: Tensor | None) -> Tensor:
    """Keys (or values) `[B, Hk, P+T, D]`: the prefix of each row, and the row's own."""
    rows = prefix.expand(own.shape[0], *prefix.shape) if prefix_index is None else prefix[prefix_index]
    return torch.cat((rows, own), dim=2)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_index: Tensor | None, bias: Tensor
) -> Tensor:
    """Plain PyTorch as in model code: keys repeated per head, logits, mask, softmax in fp32."""
    group = q.shape[1] // k.shape[1]
    keys = join(prefix_k, k, prefix_index).repeat_interleave(group, dim=1)
    values = join(prefix_v, v, prefix_index).repeat_interleave(group, dim=1)
    logits = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias  # [B, H, S, P+T]
    return softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype) @ values


def eager(x: Inputs) -> Tensor:
    """Plain PyTorch."""
    return eager_attention(*x.leaves.values(), x.prefix_index, x.bias)


def sdpa(x: Inputs) -> Tensor:
    """`scaled_dot_product_attention` with the dense mask; it handles grouped heads itself, which is faster."""
    k, v = join(x.prefix_k, x.k, x.prefix_index), join(x.prefix_v, x.v, x.prefix_index)
    return scaled_dot_product_attention(x.q, k, v, attn_mask=x.bias, enable_gqa=x.case.Hk != x.case.H)


@cache
def compile_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile` for one shape at a time, which gives the fastest code."""
    return torch.compile(function, dynamic=False, backend=COMPILER)


def compiled(x: Inputs) -> Tensor:
    """Plain PyTorch under `torch.compile`."""
    return compile_once(eager_attention)(*x.leaves.values(), x.prefix_index, x.bias)


def flex(x: Inputs) -> Tensor:
    """FlexAttention with a block mask, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not hasattr(x, "block_mask"):
        visible = x.visible[:, 0].contiguous()

        # a tensor of the rule: code that is compiled for one mask serves all masks of its shape
        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return visible[b, i, j]

        x.block_mask = create_block_mask(rule, x.case.B, None, x.case.S, visible.shape[-1], device=x.device)
    k, v = join(x.prefix_k, x.k, x.prefix_index), join(x.prefix_v, x.v, x.prefix_index)
    return compile_once(flex_attention)(x.q, k, v, block_mask=x.block_mask, enable_gqa=x.case.Hk != x.case.H)


def flash(x: Inputs) -> Tensor:
    """flash-attn has no such mask: it gets the keys that each row sees, gathered and packed. Errors as those of
    `_flash`."""
    return _flash(x, "flash-attn", "flash_attn")


def flash4(x: Inputs) -> Tensor:
    """flash-attn-4 (CuTe DSL), on the same packed keys as `flash`."""
    return _flash(x, "flash-attn-4", "flash_attn.cute")


def _flash(x: Inputs, package: str, module: str) -> Tensor:
    """One of the two packages on the keys that each row sees.

    Raises:
        RuntimeError: it is not installed, or cannot compute this type on this device.
    """
    try:
        attend = import_module(module).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{package} is not installed") from error
    case = x.case
    if not hasattr(x, "visible_keys"):
        x.visible_keys = _visible_keys(x)
    index, starts, longest = x.visible_keys

    def packed(prefix: Tensor, own: Tensor) -> Tensor:  # [visible keys of all rows, Hk, D]
        shared = prefix.reshape(-1, case.Hk, case.P, case.D).transpose(1, 2).flatten(0, 1)
        return torch.cat((shared, own.transpose(1, 2).flatten(0, 1)))[index]

    sizes = {
        "cu_seqlens_q": torch.arange(0, case.B * case.S + 1, case.S, dtype=torch.int32, device=x.device),
        "cu_seqlens_k": starts,
        "max_seqlen_q": case.S,
        "max_seqlen_k": longest,
    }
    known = inspect.signature(attend).parameters  # some versions of flash-attn-4 find the longest rows themselves
    out = attend(
        x.q.transpose(1, 2).flatten(0, 1),
        packed(x.prefix_k, x.k),
        packed(x.prefix_v, x.v),
        **{name: value for name, value in sizes.items() if name in known},
        causal=True,  # aligned to the last key, so that every prefix key is in the past
    )
    out = out[0] if isinstance(out, tuple) else out  # flash-attn-4 may also return the log-sum-exp
    return out.unflatten(0, (case.B, case.S)).transpose(1, 2)


def _visible_keys(x: Inputs) -> tuple[Tensor, Tensor, int]:
    """The keys that each row sees, as indices into `[all prefixes | all rows' own keys]`, row after row; the offset of
    each row among them (int32 [B+1]); the length of the longest row."""
    case = x.case
    rows = torch.arange(case.B, device=x.device)
    group = torch.zeros_like(rows) if x.prefix_index is None else x.prefix_index
    prefix = group[:, None] * case.P + torch.arange(case.P, device=x.device)
    own = case.G * case.P + rows[:, None] * case.T + torch.arange(case.T, device=x.device)
    seen = torch.cat((x.mask.dense(case.B, case.P).to(x.device), torch.ones_like(own, dtype=torch.bool)), dim=1)
    starts = torch.nn.functional.pad(seen.sum(1).cumsum(0), (1, 0)).int()
    return torch.cat((prefix, own), dim=1)[seen], starts, int(seen.sum(1).max())


PEERS: dict[str, Callable[[Inputs], Tensor]] = {
    "eager": eager,
    "sdpa": sdpa,
    "compiled": compiled,
    "flex": flex,
    "flash": flash,
    "flash4": flash4,
}
UNREPEATED = ("sdpa", "flex", "flash", "flash4")  # peers that need no copy of the keys for each head of a group


def needed_bytes(name: str, case: Case) -> int:
    """About how much memory a peer takes for forward and backward."""
    keys = 2 * case.B * (case.P + case.T) * case.D * case.dtype.itemsize
    mask = case.B * case.S * (case.P + case.T)
    logits = case.B * case.H * case.S * (case.P + case.T)
    heads = case.Hk if name in UNREPEATED else 2 * case.H
    total = 3 * heads * keys + mask * (1 + case.dtype.itemsize)
    return total if name in UNREPEATED else total + 4 * 4 * logits


def results(out: Tensor, x: Inputs, dout: Tensor | None) -> dict[str, Tensor]:
    """The output and, if its gradient is given, the gradients of all leaves, by name."""
    if dout is None:
        return {"out": out}
    grads = torch.autograd.grad(out, list(x.leaves.values()), dout)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(x.leaves, grads, strict=True)}}


@dataclass(frozen=True)
class Truth:
    """Some rows of some heads, computed by the reference backend in fp64.

    rows: int64, their indices.  dout: the gradient of the output that the results belong to; zero for all other rows,
    so that the prefix gradients are those of the whole call.  values: output and gradients of the first heads, by name.
    """

    rows: Tensor
    dout: Tensor
    values: dict[str, Tensor]


def truth(x: Inputs) -> Truth:
    """As many rows and heads as `CHECK_FLOPS` allows, at least one of each; rows are spread over the batch."""
    case = x.case
    group, visible = case.H // case.Hk, x.mask.dense(case.B, case.P)
    affordable = CHECK_FLOPS / (FLOPS["both"] * group * case.S * (case.P + case.T) * case.D)  # rows x KV heads
    kv_heads = max(1, min(case.Hk, int(affordable / case.B)))
    heads = {"q": kv_heads * group}
    rows = torch.linspace(0, case.B - 1, max(1, min(case.B, int(affordable / kv_heads)))).long().unique().to(x.device)
    leaves = {name: t[..., : heads.get(name, kv_heads), :, :].detach().double() for name, t in x.leaves.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in ("out", "dq", "dk", "dv")}
    sums = {name: torch.zeros_like(leaves[name]) for name in ("prefix_k", "prefix_v")}
    for row in rows.split(1):
        leaf = {name: t[row] if name in ("q", "k", "v") else t.clone() for name, t in leaves.items()}
        out = ct.prefix_attention(
            *(t.requires_grad_() for t in leaf.values()),
            ct.ContextMask(keep=visible[row]),
            prefix_index=None if x.prefix_index is None else x.prefix_index[row],
            backend="reference",
        )
        grads = torch.autograd.grad(out, list(leaf.values()), x.dout[row, : kv_heads * group].double())
        for name, value in zip(parts, (out.detach(), *grads[:3]), strict=True):
            parts[name].append(value)
        for name, grad in zip(sums, grads[3:], strict=True):
            sums[name] += grad
    dout = torch.zeros_like(x.dout)
    dout[rows] = x.dout[rows]
    values = {name: torch.cat(some) for name, some in parts.items()} | {f"d{name}": t for name, t in sums.items()}
    return Truth(rows, dout, values)


def relative_errors(got: dict[str, Tensor], expected: Truth) -> dict[str, float]:
    """|got - expected| / |expected| by name, in Frobenius norms, on the rows and heads that `expected` has."""
    errors = {}
    for name, value in got.items():
        right = expected.values[name]
        value = value if name.startswith("dprefix") else value[expected.rows]
        errors[name] = float((value[..., : right.shape[-3], :, :].double() - right).norm() / right.norm())
    return errors


def check(name: str, got: dict[str, Tensor], expected: Truth, dtype: torch.dtype) -> float:
    """The largest relative error of a peer's results.

    Raises:
        ArithmeticError: it is larger than `AGREEMENT` allows, so that a time would mean nothing.
    """
    errors = relative_errors(got, expected)
    worst = max(errors, key=errors.get)
    if not errors[worst] <= AGREEMENT[dtype]:
        raise ArithmeticError(
            f"{name}: {worst} differs from the fp64 reference by {errors[worst]:.1e}, more than {AGREEMENT[dtype]:.0e}"
        )
    return errors[worst]
