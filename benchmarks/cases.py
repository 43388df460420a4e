"""The attention problems that are measured: sizes, inputs, and the arithmetic that their masks keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ctkernels import ContextMask

# multiplications and additions per kept (query, key, head) and head dimension: 2 products forward, 5 backward
FLOPS = {"forward": 2 * 2, "backward": 5 * 2, "both": 7 * 2}


@dataclass(frozen=True)
class Case:
    """B rows of S queries and `past + S` own keys over G prefixes of P keys, by default without padding.

    Row b leaves out segment `b % segments` of `segments` equal ones; with `segments = 0` all rows leave out the first
    `hidden_share` of the prefix.
    """

    name: str
    B: int
    H: int
    Hk: int
    S: int
    P: int
    D: int
    segments: int = 0
    hidden_share: float = 0.0
    drop_p: float = 0.0
    past: int = 0
    G: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def T(self) -> int:
        return self.past + self.S

    @property
    def sizes(self) -> str:
        """The sizes in words."""
        more = [f"{self.segments} segments"] if self.segments else []
        more += [f"{name}={value:g}" for name in ("hidden_share", "drop_p", "past") if (value := getattr(self, name))]
        more += [f"G={self.G}"] if self.G > 1 else []
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in ("B", "H", "Hk", "P", "S", "D"))
        return ", ".join([sizes, *more, str(self.dtype).removeprefix("torch.")])

    def mask(self, device: str = "cpu", seed: int = 1) -> ContextMask:
        """The context mask of all rows."""
        if self.segments:
            offsets = torch.linspace(0, self.P, self.segments + 1).long()
            held_out = torch.arange(self.B) % self.segments
            hidden = ContextMask.leave_one_out(offsets, held_out).hidden
        else:
            hidden = torch.tensor([[0, int(self.hidden_share * self.P)]]).expand(self.B, 2).contiguous()
        return ContextMask(hidden=hidden.to(device), drop_p=self.drop_p, seed=seed)

    @property
    def kept_pairs(self) -> int:
        """Number of (query, key) pairs of one head that the mask and causality keep."""
        context = int(self.mask().dense(self.B, self.P).sum())
        return context * self.S + self.B * (self.S * self.past + self.S * (self.S + 1) // 2)

    def flops(self, phase: str) -> int:
        """Floating-point operations of a phase on what the mask keeps."""
        return FLOPS[phase] * self.D * self.H * self.kept_pairs


class Inputs:
    """Tensors of a case: q [B, H, S, D], k and v [B, Hk, T, D] as views of [B, S, H, D] memory, which is what models
    pass, prefix_k and prefix_v [Hk, P, D] (or [G, Hk, P, D]), the gradient `dout` of the output, and the mask.
    `backend` is the one that computes our own result."""

    def __init__(self, case: Case, device: str = "cpu", backend: str | None = None) -> None:
        self.case, self.device, self.backend = case, device, backend
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, case.dtype)

        self.q, self.dout = (normal(case.B, case.S, case.H, case.D).transpose(1, 2) for _ in range(2))
        self.k, self.v = (normal(case.B, case.T, case.Hk, case.D).transpose(1, 2) for _ in range(2))
        front = (case.G,) if case.G > 1 else ()
        self.prefix_k, self.prefix_v = (normal(*front, case.Hk, case.P, case.D) for _ in range(2))
        self.prefix_index = torch.arange(case.B, device=device) % case.G if case.G > 1 else None
        self.mask = case.mask(device)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What is differentiated, by name."""
        return {name: getattr(self, name) for name in ("q", "k", "v", "prefix_k", "prefix_v")}

    def require_grad(self, needed: bool) -> None:
        """Whether the leaves take gradients from now on."""
        for leaf in self.leaves.values():
            leaf.requires_grad_(needed)

    @cached_property
    def visible(self) -> Tensor:
        """The mask as a tensor, for peers: bool [B, 1, S, P+T]."""
        case = self.case
        context = self.mask.dense(case.B, case.P)[:, None, None].expand(case.B, 1, case.S, case.P)
        own = torch.ones(case.S, case.T, dtype=torch.bool, device=self.device).tril(case.past)
        return torch.cat((context, own.expand(case.B, 1, case.S, case.T)), dim=-1)

    @cached_property
    def bias(self) -> Tensor:
        """The mask as a term of the logits, for peers: [B, 1, S, P+T] in the type of q."""
        return torch.zeros_like(self.visible, dtype=self.case.dtype).masked_fill(~self.visible, -torch.inf)


GPT2_LARGE = Case("GPT-2 Large on NLP-LR", B=16, H=20, Hk=20, P=800, S=48, D=64, segments=16)
HEADLINE = (
    GPT2_LARGE,
    replace(GPT2_LARGE, name="the same in bf16", dtype=torch.bfloat16),
    Case("long rows, grouped heads", B=4, H=32, Hk=8, P=2048, S=256, D=64, segments=4),
    Case("GPT-2 Small", B=8, H=12, Hk=12, P=1024, S=64, D=64, segments=8),
)
SMOLLM2 = Case("SmolLM2", B=16, H=9, Hk=3, P=1024, S=32, D=64, segments=16)
LLAMA = Case("Llama-3.2-1B", B=16, H=32, Hk=8, P=1024, S=32, D=64, segments=16)
QWEN = Case("Qwen2.5-1.5B", B=16, H=12, Hk=2, P=1024, S=32, D=128, segments=16)
GEMMA = Case("Gemma-3-1B", B=16, H=4, Hk=1, P=1024, S=32, D=256, segments=16)
QUICK = (
    SMOLLM2,
    replace(SMOLLM2, B=64, P=256, S=8),
    replace(SMOLLM2, B=1, P=16384, S=512),
    LLAMA,
    QWEN,
    GEMMA,
    replace(GEMMA, B=64, P=4096, S=8),
)
SWEEP_FLOPS = 5e11  # forward and backward; larger ones take many seconds per run on a small machine


def sweep() -> list[Case]:
    """Head shapes of four models over P, S and B, without those that are too large to time."""
    grid = [
        replace(model, P=P, S=S, B=B)
        for model in (SMOLLM2, LLAMA, QWEN, GEMMA)
        for P in (256, 1024, 4096, 16384)
        for S in (8, 32, 128, 512)
        for B in (1, 8, 64)
    ]
    return [case for case in grid if case.flops("both") <= SWEEP_FLOPS]
