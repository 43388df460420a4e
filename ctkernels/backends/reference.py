"""The op in plain PyTorch: its definition in code. Any floating type, differentiable by autograd, no kernels.

Dense and slow on purpose: it materialises every row's keys `[B, H, P+T, D]` and logits `[B, H, S, P+T]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctkernels.backends import masked
from ctkernels.mask import apply_context_rule
from ctkernels.problem import Problem, compute_dtype


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None,
    sinks: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Attention of rows over `[prefix | own keys]`.

    q `[B, H, S, D]`, k `[B, Hk, T, D]`, v `[B, Hk, T, Dv]` (B = 1 and rows packed along S and T with cu_seqlens),
    prefix_k `[G, Hk, P, D]`, prefix_v `[G, Hk, P, Dv]`, prefix_bias `[1 or G, 1 or H, P]`, sinks `[H]`.
    Returns out `[B, H, S, Dv]` in q's type, and lse `[B, H, S]` in the compute type.
    """
    if problem.cu_seqlens is None:
        lengths = problem.seq_lens
        return _padded(q, k, v, prefix_k, prefix_v, prefix_bias, sinks, lengths, problem)
    lengths = (problem.cu_seqlens[1:] - problem.cu_seqlens[:-1]).long()
    rows, longest = lengths.shape[0], int(lengths.max()) if lengths.numel() else 0
    at = problem.cu_seqlens[:-1, None].long() + torch.arange(longest, device=q.device)  # [B, S]
    valid = torch.arange(longest, device=q.device) < lengths[:, None]
    at = torch.where(valid, at, 0)

    def unpack(x: Tensor) -> Tensor:  # [1, H, N, D] -> [B, H, S, D]
        if rows * longest == 0:
            return x.new_zeros(rows, x.shape[1], longest, x.shape[3])
        return x[0][:, at].transpose(0, 1)

    rows_of = (unpack(q), unpack(k), unpack(v))
    out, lse = _padded(*rows_of, prefix_k, prefix_v, prefix_bias, sinks, lengths, problem)
    packed = out.transpose(1, 2)[valid].transpose(0, 1)[None]  # [1, H, N, D]
    return packed, lse.transpose(1, 2)[valid].transpose(0, 1)[None]


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None,
    sinks: Tensor | None,
    lengths: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    B, H, S, _ = q.shape
    T, P, group = k.shape[2], prefix_k.shape[2], H // k.shape[1]
    acc = compute_dtype(q.dtype)
    index = torch.zeros(B, dtype=torch.long, device=q.device)
    if problem.prefix_index is not None:
        index = problem.prefix_index.long()
    visible, distance = visibility(B, S, T, P, index, lengths, problem, q.device)
    visible = visible[:, None]  # [B, 1, S, P+T]

    def keys(prefix: Tensor, own: Tensor) -> Tensor:  # -> [B, H, P+T, D]
        joined = torch.cat((_round_to(prefix, q.dtype).to(acc)[index], own.to(acc)), dim=2)
        return joined.repeat_interleave(group, dim=1)

    logits = problem.scale * masked.pairs(q.to(acc), keys(prefix_k, k), visible)  # [B, H, S, P+T]
    if problem.softcap:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if prefix_bias is not None:
        bias = prefix_bias.to(acc).expand(prefix_k.shape[0], H, P)[index]
        logits = logits + torch.nn.functional.pad(bias, (0, T))[:, :, None]
    if problem.alibi_slopes is not None:
        logits = logits - problem.alibi_slopes.to(acc)[:, None, None] * distance[:, None]
    logits = torch.where(visible, logits, -math.inf)
    top = logits.detach().amax(dim=-1, keepdim=True) if P + T else logits.new_full((B, H, S, 1), -math.inf)
    top = torch.where(top == -math.inf, 0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0  # no visible key, or only keys with a bias of -inf; `where` also cuts the gradient
    total = torch.where(empty, 1, total)
    out, lse = masked.sums(weights, keys(prefix_v, v), visible) / total, torch.log(total) + top
    if sinks is not None:  # exp(sink) in the denominator, but not in lse; sigmoid's own derivative would cancel near 1
        out = out * torch.nn.functional.logsigmoid(lse - sinks.to(acc)[:, None, None]).exp()
    out, lse = torch.where(empty, 0, out), torch.where(empty, -math.inf, lse)
    return out.to(q.dtype), lse.squeeze(-1)


def visibility(
    B: int,
    S: int,
    T: int,
    P: int,
    index: Tensor,
    lengths: Tensor | None,
    problem: Problem,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Which query sees which key: bool `[B, S, P+T]`, and the distance in positions between them, int64, same shape."""
    own_length = torch.full((B,), T, device=device) if lengths is None else lengths.long()
    offset = own_length - S if T > S else torch.zeros_like(own_length)
    prefix_length = torch.full((B,), P, device=device)
    if problem.prefix_lens is not None:
        prefix_length = problem.prefix_lens.long()[index]
    query = torch.arange(S, device=device) + offset[:, None]  # own position of a query, [B, S]
    key = torch.arange(P + T, device=device)
    own = key - P  # own position of a key, negative in the prefix
    is_own = own >= 0

    valid = torch.where(is_own, own < own_length[:, None], key < prefix_length[:, None])  # [B, P+T]
    context = valid.new_ones(B, P + T)
    apply_context_rule(
        context[:, : problem.context_length],
        problem.hidden,
        problem.keep,
        problem.row_ids,
        problem.drop_p,
        problem.seed if problem.seed_in_memory is None else problem.seed_in_memory,
    )
    visible = (valid & context)[:, None] & (query < own_length[:, None])[:, :, None]  # padding queries see nothing
    if problem.causal:
        visible = visible & (~is_own | (own <= query[:, :, None]))
    # positions count along the valid prefix and then the row's own keys
    position = torch.where(is_own, prefix_length[:, None] + own, key)
    distance = (prefix_length[:, None] + query)[:, :, None] - position[:, None]
    if problem.window:
        near = distance < problem.window
        visible = visible & (near if problem.window_prefix else near | ~is_own)
    return visible, distance


def _round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values to `dtype`, keep the type of x and pass the gradient through unrounded (master weights)."""
    if x.dtype == dtype:
        return x
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())
