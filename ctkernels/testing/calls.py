"""One call of the op as data: built from a seed, run through a backend, or through the dense oracle in any type."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import ctkernels as ct
from ctkernels.testing import oracle

DIFFERENTIABLE = ("q", "k", "v", "prefix_k", "prefix_v", "prefix_bias", "sinks")
Seen = tuple[Tensor, Tensor]  # what `oracle.visible_keys` gives
TYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16+fp32": (torch.bfloat16, torch.float32),  # rows, prefix
    "fp16+fp32": (torch.float16, torch.float32),
}


@dataclass
class Call:
    """Arguments of one call: what can be differentiated, the fields of a ContextMask, and the other keywords."""

    tensors: dict[str, Tensor]
    mask: dict | None = None
    options: dict = field(default_factory=dict)
    cu_seqlens: Tensor | None = None

    def to(self, device: str) -> Call:
        def move(values: dict) -> dict:
            return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}

        if device == "cpu":
            return self
        mask = None if self.mask is None else move(self.mask)
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return Call(move(self.tensors), mask, move(self.options), cu_seqlens)

    def clone(self) -> Call:
        return copy.deepcopy(self)

    def with_tensors(self, **tensors: Tensor) -> Call:
        return replace(self, tensors={**self.tensors, **tensors})

    def with_options(self, **options: object) -> Call:
        return replace(self, options={**self.options, **options})

    def with_mask(self, **fields: object) -> Call:
        return replace(self, mask={**(self.mask or {}), **fields})


def tensor(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "plain", size: float = 1.0
) -> Tensor:
    """Random values of standard deviation `size`; every layout has a contiguous last dimension, as the op asks."""
    if layout == "transposed" and len(shape) >= 3:  # what Hugging Face models pass: [B, S, H, D] seen as [B, H, S, D]
        *front, a, b, last = shape
        x = torch.randn(*front, b, a, last, generator=generator, dtype=torch.float64).transpose(-2, -3)
    elif layout == "sliced":  # a window of a larger tensor
        x = torch.randn([n + 3 for n in shape], generator=generator, dtype=torch.float64)
        x = x[tuple(slice(1, n + 1) for n in shape)]
    elif layout == "broadcast" and len(shape) >= 3:  # one row or head for all: stride 0
        x = torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64).expand(shape)
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * size).to(dtype) if layout != "broadcast" else (x[:1] * size).to(dtype).expand(shape)


def make_call(
    B: int = 3,
    H: int = 4,
    Hk: int = 2,
    S: int = 5,
    T: int | None = None,
    P: int = 11,
    D: int = 8,
    Dv: int | None = None,
    G: int | None = None,
    types: str = "fp64",
    lens: list[int] | None = None,
    bias: tuple[int, ...] | None = None,
    sinks: bool = False,
    mask: dict | None = None,
    seed: int = 0,
    **options: object,
) -> Call:
    """Random tensors of the given sizes (Dv: default D); `lens` asks for a packed call, `bias` is the shape of
    prefix_bias."""
    generator = torch.Generator().manual_seed(seed)
    rows, prefix = TYPES[types]
    T, Dv = S if T is None else T, D if Dv is None else Dv
    shapes: dict[str, tuple[int, ...]]
    if lens is None:
        shapes = {"q": (B, H, S, D), "k": (B, Hk, T, D), "v": (B, Hk, T, Dv)}
    else:
        shapes = {"q": (sum(lens), H, D), "k": (sum(lens), Hk, D), "v": (sum(lens), Hk, Dv)}
    tensors = {name: tensor(generator, shape, rows) for name, shape in shapes.items()}
    for name, size in (("prefix_k", D), ("prefix_v", Dv)):
        tensors[name] = tensor(generator, (Hk, P, size) if G is None else (G, Hk, P, size), prefix)
    if bias is not None:
        tensors["prefix_bias"] = tensor(generator, bias, torch.promote_types(rows, torch.float32))
    if sinks:
        tensors["sinks"] = 1 + tensor(generator, (H,), torch.promote_types(rows, torch.float32))
    return Call(tensors, mask, options, None if lens is None else cu_seqlens_of(lens))


def cu_seqlens_of(lens: list[int]) -> Tensor:
    return torch.tensor([sum(lens[:b]) for b in range(len(lens) + 1)], dtype=torch.int32)


def context_mask(call: Call) -> ct.ContextMask | None:
    return None if call.mask is None else ct.ContextMask(**call.mask)


def call_op(call: Call, backend: str | None, return_lse: bool = True):
    """The public function on the call's own tensors."""
    t = call.tensors
    common = dict(
        mask=context_mask(call),
        prefix_bias=t.get("prefix_bias"),
        sinks=t.get("sinks"),
        return_lse=return_lse,
        backend=backend,
        **call.options,
    )
    if call.cu_seqlens is None:
        return ct.prefix_attention(t["q"], t["k"], t["v"], t["prefix_k"], t["prefix_v"], **common)
    return ct.prefix_attention_varlen(t["q"], t["k"], t["v"], call.cu_seqlens, t["prefix_k"], t["prefix_v"], **common)


def results(outputs: tuple[Tensor, ...], tensors: dict[str, Tensor], cotangents: tuple[Tensor, ...] | None) -> dict:
    """out, lse and the gradients of every tensor, by name, detached and on the CPU."""
    values = {"out": outputs[0], "lse": outputs[1]}
    if cotangents is not None:
        grads = torch.autograd.grad(outputs, list(tensors.values()), cotangents, allow_unused=True)
        for (name, x), g in zip(tensors.items(), grads, strict=True):
            assert g is not None or not x.numel(), f"{name} got no gradient"
            values["d" + name] = torch.zeros_like(x) if g is None else g
    return {name: x.detach().cpu() for name, x in values.items()}


def run(
    call: Call,
    backend,
    cotangents: tuple[Tensor, Tensor] | None = None,
    wanted: Collection[str] = DIFFERENTIABLE,
) -> dict[str, Tensor]:
    """The op on one build. `cotangents` are the gradients of out and lse; None runs the forward pass only.

    wanted: tensors whose gradients are asked for.
    """
    moved = call.to(backend.device)
    asked = wanted if cotangents is not None else ()
    leaves = {name: x.detach().requires_grad_(name in asked) for name, x in moved.tensors.items()}
    outputs = call_op(replace(moved, tensors=leaves), backend.name)
    if cotangents is not None:
        cotangents = tuple(c.to(device=o.device, dtype=o.dtype) for c, o in zip(cotangents, outputs, strict=True))
    return results(outputs, {name: x for name, x in leaves.items() if x.requires_grad}, cotangents)


def run_dense(
    call: Call, cotangents: tuple[Tensor, Tensor] | None, dtype: torch.dtype, seen: Seen | None = None
) -> dict[str, Tensor]:
    """The oracle in `dtype`, fed with what a kernel of the call's type sees: prefix rounded to q's type.

    seen: `visibility(call)`, if it is known already.
    """
    q_dtype = call.tensors["q"].dtype
    leaves = {}
    for name, x in call.tensors.items():
        rounded = x.to(q_dtype) if name in ("prefix_k", "prefix_v") else x
        leaves[name] = rounded.detach().to(dtype).clone().requires_grad_()
    outputs = dense(replace(call, tensors=leaves), seen)
    if cotangents is not None:
        cotangents = tuple(c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True))
    return results(outputs, leaves, cotangents)


def dense(call: Call, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
    """The oracle's out and lse. A packed call is unpacked into padded rows by indexing and packed again."""
    padded = unpacked(call)
    out, lse, _ = oracle.attention(**padded.tensors, mask=call.mask, **padded.options, seen=seen)
    if call.cu_seqlens is None:
        return out, lse
    lens = padded.options["seq_lens"].tolist()
    return pack(out, lens), pack(lse, lens)


def unpacked(call: Call) -> Call:
    """A packed call with its rows side by side, zeros in the padding; a padded one is itself."""
    if call.cu_seqlens is None:
        return call
    lens = call.cu_seqlens.diff()
    rows = {name: unpack(call.tensors[name], lens.tolist()) for name in ("q", "k", "v")}
    return replace(call, cu_seqlens=None).with_tensors(**rows).with_options(seq_lens=lens)


def visibility(call: Call) -> Seen:
    """bool [B, S, P + T] and the distances, of the rows side by side."""
    call = unpacked(call)
    t, o = call.tensors, call.options
    (B, _, S, _), T, P = t["q"].shape, t["k"].shape[2], t["prefix_k"].shape[-2]
    rules = (o.get("prefix_index"), o.get("prefix_lens"), o.get("seq_lens"), o.get("causal", True), o.get("window"))
    return oracle.visible_keys(B, S, T, P, call.mask, *rules, o.get("window_prefix", True))


def unpack(x: Tensor, lens: list[int]) -> Tensor:
    """[N, H, D] -> [B, H, S, D], zeros in the padding."""
    if not lens:
        return x.reshape(0, x.shape[1], 0, x.shape[2])
    rows = list(x.split(lens))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)


def pack(x: Tensor, lens: list[int]) -> Tensor:
    """[B, H, S, ...] -> [N, H, ...]."""
    rows = [x[b, :, :n].transpose(0, 1) for b, n in enumerate(lens)]
    return torch.cat(rows) if rows else x.transpose(1, 2).flatten(0, 1)


def cotangents_for(call: Call, seed: int = 0, layout: str = "plain") -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse; `layout` decides out's strides ("expanded" is what `out.sum()` produces)."""
    q = call.tensors["q"]
    generator = torch.Generator().manual_seed(seed + 7919)
    shape = (*q.shape[:-1], call.tensors["v"].shape[-1])
    if layout == "expanded":
        dout = torch.randn((), generator=generator, dtype=torch.float64).to(q.dtype).expand(shape)
    elif layout == "transposed":
        swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        dout = torch.randn(swapped, generator=generator, dtype=torch.float64).to(q.dtype)
        dout = dout.transpose(-2, -3)
    else:
        dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(q.dtype)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return dout, torch.randn(shape[:-1], generator=generator, dtype=torch.float64).to(lse_dtype)
