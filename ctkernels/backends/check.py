"""Shapes and types that the kernels rely on. `attention.py` has checked them for its callers, but the registered
operators can be called without it, and inconsistent tensors must not reach memory that is not theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from ctkernels.problem import Problem, row_count

MAX_HEAD_DIM = 512
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None, problem: Problem
) -> None:
    """Raises ValueError if the inputs of a call do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        expect(x.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
        expect(x.shape[3] <= 1 or x.stride(3) == 1, f"{name} must have a contiguous last dimension, got {x.stride()}")
        expect(x.device == q.device, f"{name} must be on q's device {q.device}, got {x.device}")
    B, H, S, D = q.shape
    G, Hk, P = prefix_k.shape[:3]
    shape = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype}"
    Dv = v.shape[3]
    fits = k.shape[:3] == v.shape[:3] and k.shape[0] == B and k.shape[3] == D and k.shape[2] >= S
    fits = fits and q.dtype in ROW_DTYPES and k.dtype == v.dtype == q.dtype
    fits = fits and k.shape[1] > 0 and H % k.shape[1] == 0 and min(D, Dv) >= 1 and max(D, Dv) <= MAX_HEAD_DIM
    expect(fits, f"{shape} do not fit together")
    fits = prefix_k.shape[:3] == prefix_v.shape[:3] and Hk == k.shape[1]
    fits = fits and prefix_k.shape[3] == D and prefix_v.shape[3] == Dv
    fits = fits and prefix_k.dtype == prefix_v.dtype and prefix_k.dtype in (q.dtype, torch.float32)
    shape = f"prefix_k {tuple(prefix_k.shape)} {prefix_k.dtype} and prefix_v {tuple(prefix_v.shape)} {prefix_v.dtype}"
    expect(fits, f"{shape} do not fit k {tuple(k.shape)} and v {tuple(v.shape)}")
    if bias is not None:
        fits = bias.dim() == 3 and bias.shape[0] in (1, G) and bias.shape[1] in (1, H) and bias.shape[2] == P
        expect(fits, f"prefix_bias must be [1 or {G}, 1 or {H}, {P}], got {tuple(bias.shape)}")
        expect(bias.device == q.device, f"prefix_bias must be on q's device {q.device}, got {bias.device}")
    expect(0 <= problem.drop_p < 1, f"drop_p must be in [0, 1), got {problem.drop_p}")
    least = min(problem.context_length, problem.window)
    expect(
        least >= 0, f"context_length and window must not be negative, got {problem.context_length}, {problem.window}"
    )
    cu_seqlens, rows = problem.cu_seqlens, row_count(q, problem)
    if cu_seqlens is not None:
        fits = cu_seqlens.dim() == 1 and rows >= 0 and B == 1 and k.shape[2] == S and problem.seq_lens is None
        expect(fits, "packed rows need q and k of batch size 1 and equal length, and no seq_lens")
    optional: Tensor | None
    for name, optional, wanted in (
        ("seq_lens", problem.seq_lens, (rows,)),
        ("prefix_index", problem.prefix_index, (rows,)),
        ("prefix_lens", problem.prefix_lens, (G,)),
        ("row_ids", problem.row_ids, (rows,)),
        ("alibi_slopes", problem.alibi_slopes, (H,)),
        ("hidden", problem.hidden, (rows, 2)),
        ("keep", problem.keep, (rows, problem.context_length)),
        ("seed_in_memory", problem.seed_in_memory, (1,)),
    ):
        if optional is not None:
            expect(tuple(optional.shape) == wanted, f"{name} must have shape {wanted}, got {tuple(optional.shape)}")
            expect(optional.device == q.device, f"{name} must be on q's device {q.device}, got {optional.device}")
    expect(problem.keep is None or problem.keep.dtype == torch.bool, "keep must be a bool tensor")
    seed = problem.seed_in_memory
    expect(seed is None or seed.dtype == torch.int64, "seed_in_memory must be an int64 tensor")


def check_gradients(
    q: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> None:
    """Raises ValueError if what backward gets does not fit q and v."""
    shape = (*q.shape[:3], v.shape[3])
    for name, x in (("dout", dout), ("out", out)):
        fits = x.shape == shape and x.dtype == q.dtype and x.device == q.device
        expect(fits, f"{name} must be {shape} {q.dtype} on q's device, got {tuple(x.shape)} {x.dtype}")
    optional: Tensor | None
    for name, optional in (("dlse", dlse), ("lse", lse)):
        if optional is not None:
            fits = optional.shape == q.shape[:3] and optional.dtype == torch.float32 and optional.device == q.device
            expect(fits, f"{name} must be fp32 {tuple(q.shape[:3])}, got {tuple(optional.shape)} {optional.dtype}")
    expect(out.shape[3] <= 1 or out.stride(3) == 1, f"out must have a contiguous last dimension, got {out.stride()}")
    expect(bias is not None or not needs[5], "the gradient of an absent prefix_bias is asked for")
