"""Hypothesis strategies for calls of the op: shapes, strides, types and mask kinds."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ctkernels.testing.calls import TYPES, Call, cu_seqlens_of, tensor

ROW_LENGTHS = st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33])
PREFIX_LENGTHS = st.sampled_from([0, 1, 3, 16, 31, 33, 64, 65, 130])
HEAD_DIMS = st.sampled_from([1, 2, 8, 17, 40, 64, 80, 96, 128, 192, 256, 512])
LAYOUTS = st.sampled_from(["plain", "transposed", "sliced", "broadcast"])
SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]))


@st.composite
def calls(draw: st.DrawFn, types: str, varlen: bool | None = None) -> Call:
    rows_dtype, prefix_dtype = TYPES[types]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    varlen = draw(st.booleans()) if varlen is None else varlen
    lens = draw(st.lists(ROW_LENGTHS, max_size=5))
    B, D, P = len(lens), draw(HEAD_DIMS), draw(PREFIX_LENGTHS)
    Dv = draw(HEAD_DIMS) if draw(st.booleans()) else D
    Hk = draw(st.sampled_from([1, 2, 3]))
    H = Hk * draw(st.sampled_from([1, 1, 2, 4, 7]))
    G = draw(st.sampled_from([None, None, 1, 3]))
    longest = max(lens, default=0)
    S = T = longest + (0 if varlen else draw(st.sampled_from([0, 0, 2])))
    options: dict = {}
    if not varlen:
        if draw(st.integers(0, 3)) == 0 and B:  # decoding: the queries are the last S of each row's keys
            S = draw(st.integers(0, T))
            options["seq_lens"] = torch.tensor(lens)
        elif draw(st.booleans()):
            options["seq_lens"] = torch.tensor(lens, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
        if "seq_lens" not in options:
            lens = [T] * B

    def random(name: str, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> Tensor:
        return tensor(generator, shape, dtype, draw(LAYOUTS, label=f"layout of {name}"), size)

    hot = draw(st.sampled_from([1.0, 1.0, 1.0, 4.0]))  # larger queries make peaked probabilities
    shapes: dict[str, tuple[int, ...]]
    if varlen:
        N = sum(lens)
        shapes = {"q": (N, H, D), "k": (N, Hk, D), "v": (N, Hk, Dv)}
    else:
        shapes = {"q": (B, H, S, D), "k": (B, Hk, T, D), "v": (B, Hk, T, Dv)}
    tensors = {name: random(name, shape, rows_dtype, hot if name == "q" else 1.0) for name, shape in shapes.items()}
    for name, size in (("prefix_k", D), ("prefix_v", Dv)):
        tensors[name] = random(name, (Hk, P, size) if G is None else (G, Hk, P, size), prefix_dtype)
    groups = G or 1
    bias_shape = draw(st.sampled_from([None, None, (P,), (H, P), (groups, H, P)]))
    if bias_shape is not None:
        bias_dtype = torch.promote_types(rows_dtype, torch.float32)
        tensors["prefix_bias"] = random("prefix_bias", bias_shape, bias_dtype)
    if draw(st.integers(0, 2)) == 0:
        tensors["sinks"] = random("sinks", (H,), torch.promote_types(rows_dtype, torch.float32), 4.0)

    if G is not None and (groups > 1 or draw(st.booleans())):
        options["prefix_index"] = torch.tensor(
            draw(st.lists(st.integers(0, groups - 1), min_size=B, max_size=B))
        ).long()
    if draw(st.integers(0, 2)) == 0:
        one = st.sampled_from([0, P // 2, P])
        options["prefix_lens"] = torch.tensor(draw(st.lists(one, min_size=groups, max_size=groups)))
    if draw(st.integers(0, 3)) == 0:
        options["causal"] = False
    if draw(st.integers(0, 2)) == 0:
        options["scale"] = draw(st.sampled_from([0.0, 0.05, -0.3, 0.7]))
    if draw(st.integers(0, 2)) == 0:
        options["window"] = draw(st.sampled_from([1, 2, 7, 16, 40, 1000]))
        options["window_prefix"] = draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 30.0]))
    if draw(st.integers(0, 3)) == 0:
        options["alibi_slopes"] = torch.rand(H, generator=generator)

    mask = draw(masks(generator, B, P, P + T)) if draw(st.integers(0, 3)) else None
    return Call(tensors, mask, options, cu_seqlens_of(lens) if varlen else None)


@st.composite
def masks(draw: st.DrawFn, generator: torch.Generator, B: int, P: int, keys: int) -> dict:
    """Fields of a ContextMask over C = P context positions, fewer, or more (reaching into the rows' own keys)."""
    mask: dict = {}
    length = P
    if draw(st.booleans()):
        length = draw(st.sampled_from([0, P // 2, P, (P + keys) // 2, keys, keys + 9]))
        mask["length"] = length
    if draw(st.booleans()):
        ends = torch.randint(0, length + 1, (B, 2), generator=generator).sort(-1).values
        kind = draw(st.sampled_from(["spans", "spans", "all", "none"]))
        if kind != "spans":
            ends = torch.tensor([[0, length if kind == "all" else 0]]).expand(B, 2)
        mask["hidden"] = ends
    if draw(st.booleans()):
        density = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
        mask["keep"] = torch.rand(B, length, generator=generator) < density
    if draw(st.booleans()):
        mask["drop_p"] = draw(st.sampled_from([0.0, 0.05, 0.5, 0.95, 1 - 2**-33]))
        mask["seed"] = draw(SEEDS)
    if draw(st.booleans()):
        ids = st.one_of(st.integers(0, 40), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))
        mask["row_ids"] = torch.tensor(draw(st.lists(ids, min_size=B, max_size=B)), dtype=torch.int64)
    return mask
