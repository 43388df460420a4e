"""Calls of the op as its backends receive them; on the "meta" device they are planned and compiled for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctkernels.problem import Problem


@dataclass(frozen=True)
class Sizes:
    """Packed rows of `lens` tokens over one prefix of P keys, made of `segments` demonstrations of equal length.

    Row b leaves out demonstration b % segments. `past` own keys before the queries make it a padded decoding call.

    prefix_dtype: None is the rows' type.  options: further fields of `Problem`.
    """

    name: str
    lens: tuple[int, ...]
    H: int
    Hk: int
    P: int
    D: int
    dtype: torch.dtype
    prefix_dtype: torch.dtype | None = None
    segments: int = 0
    drop_p: float = 0.0
    past: int = 0
    bias: bool = False
    alibi: bool = False
    softcap: float = 0.0
    window: int = 0
    Dv: int | None = None  # None: D

    @property
    def hidden(self) -> Tensor | None:
        """Hidden spans int32 [B, 2]."""
        if not self.segments:
            return None
        bounds = torch.linspace(0, self.P, self.segments + 1).int()
        row = torch.arange(len(self.lens)) % self.segments
        return torch.stack((bounds[row], bounds[row + 1]), dim=1)


@dataclass(frozen=True)
class Inputs:
    """Arguments of a backend's forward, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    prefix_bias: Tensor | None
    problem: Problem
    dout: Tensor

    @property
    def forward(self) -> tuple:
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.prefix_bias, self.problem


def cu_seqlens(lens: Sequence[int]) -> Tensor:
    """int32 [B+1]."""
    return torch.tensor([sum(lens[:b]) for b in range(len(lens) + 1)], dtype=torch.int32)


def make(sizes: Sizes, device: str = "cpu") -> Inputs:
    """Random tensors of these sizes; memory of the rows in the order that model code has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    B, N, widths = len(sizes.lens), sum(sizes.lens), (sizes.D, sizes.Dv or sizes.D)
    if sizes.past:  # padded rows of one length
        S, T = sizes.lens[0], sizes.past + sizes.lens[0]
        q, dout = (normal((B, S, sizes.H, width), sizes.dtype).transpose(1, 2) for width in widths)
        k, v = (normal((B, T, sizes.Hk, width), sizes.dtype).transpose(1, 2) for width in widths)
    else:
        q, dout = (normal((N, sizes.H, width), sizes.dtype).transpose(0, 1)[None] for width in widths)
        k, v = (normal((N, sizes.Hk, width), sizes.dtype).transpose(0, 1)[None] for width in widths)
    prefix_k, prefix_v = (normal((1, sizes.Hk, sizes.P, width), sizes.prefix_dtype or sizes.dtype) for width in widths)
    problem = Problem(
        alibi_slopes=normal((sizes.H,), torch.float32).abs() if sizes.alibi else None,
        cu_seqlens=None if sizes.past else cu_seqlens(sizes.lens).to(device),
        seq_lens=None,
        prefix_index=None,
        prefix_lens=None,
        hidden=None if sizes.hidden is None else sizes.hidden.to(device),
        row_ids=None,
        keep=None,
        seed_in_memory=None,
        context_length=sizes.P,
        drop_p=sizes.drop_p,
        seed=1,
        scale=sizes.D**-0.5,
        causal=True,
        window=sizes.window,
        window_prefix=True,
        softcap=sizes.softcap,
    )
    bias = normal((1, sizes.H, sizes.P), torch.float32) if sizes.bias else None
    return Inputs(q, k, v, prefix_k, prefix_v, bias, problem, dout)
