"""Calls of the op at random: shapes, strides, types, options and mask kinds, from a source of random numbers.

`random.Random(seed)` gives the same call for the same seed; hypothesis' own source gives calls that it can make smaller
(`strategies.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from ctkernels.testing.calls import TYPES, Call, cu_seqlens_of, tensor

LAYOUTS = ("plain", "transposed", "sliced", "broadcast")
EDGE_SEEDS = (0, 1, 2**32, 2**63, 2**64 - 1)
EDGE_IDS = (2**31 - 1, 2**31, 2**32 - 1)


@dataclass(frozen=True)
class Sizes:
    """What sizes are drawn from, each with the same chance."""

    rows: int = 5  # at most
    lengths: tuple[int, ...] = (0, 1, 2, 3, 5, 8, 17, 33)
    prefixes: tuple[int, ...] = (0, 1, 3, 16, 31, 33, 64, 65, 130)
    heads: tuple[int, ...] = (1, 2, 8, 17, 40, 64, 80, 96, 128, 192, 256, 512)  # D and Dv
    groups: tuple[int, ...] = (1, 1, 2, 4, 7)  # H / Hk


def random_call(chance: Random, types: str, varlen: bool | None = None, sizes: Sizes = Sizes()) -> Call:
    """A call of rows and prefix of `types` (a key of TYPES), packed or padded."""
    rows_dtype, prefix_dtype = TYPES[types]
    wide = torch.promote_types(rows_dtype, torch.float32)
    generator = torch.Generator().manual_seed(chance.randint(0, 2**31))

    def one_in(n: int) -> bool:
        return chance.randrange(n) == 0

    varlen = one_in(2) if varlen is None else varlen
    lens = [chance.choice(sizes.lengths) for _ in range(chance.randint(0, sizes.rows))]
    B, D, P = len(lens), chance.choice(sizes.heads), chance.choice(sizes.prefixes)
    Dv = chance.choice(sizes.heads) if one_in(2) else D
    Hk = chance.choice([1, 2, 3])
    H = Hk * chance.choice(sizes.groups)
    G = chance.choice([None, None, 1, 3])
    longest = max(lens, default=0)
    S = T = longest + (0 if varlen else chance.choice([0, 0, 2]))
    options: dict = {}
    if not varlen:
        if one_in(4) and B:  # decoding: the queries are the last S of each row's keys
            S = chance.randint(0, T)
            options["seq_lens"] = torch.tensor(lens)
        elif one_in(2):
            options["seq_lens"] = torch.tensor(lens, dtype=chance.choice([torch.int32, torch.int64]))
        if "seq_lens" not in options:
            lens = [T] * B

    def random(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> Tensor:
        return tensor(generator, shape, dtype, chance.choice(LAYOUTS), size)

    hot = chance.choice([1.0, 1.0, 1.0, 4.0])  # larger queries make peaked probabilities
    shapes: dict[str, tuple[int, ...]]
    if varlen:
        N = sum(lens)
        shapes = {"q": (N, H, D), "k": (N, Hk, D), "v": (N, Hk, Dv)}
    else:
        shapes = {"q": (B, H, S, D), "k": (B, Hk, T, D), "v": (B, Hk, T, Dv)}
    tensors = {name: random(shape, rows_dtype, hot if name == "q" else 1.0) for name, shape in shapes.items()}
    for name, size in (("prefix_k", D), ("prefix_v", Dv)):
        tensors[name] = random((Hk, P, size) if G is None else (G, Hk, P, size), prefix_dtype)
    groups = G or 1
    bias_shape = chance.choice([None, None, (P,), (H, P), (groups, H, P)])
    if bias_shape is not None:
        tensors["prefix_bias"] = random(bias_shape, wide)
    if one_in(3):
        tensors["sinks"] = random((H,), wide, 4.0)

    if G is not None and (groups > 1 or one_in(2)):
        options["prefix_index"] = torch.tensor([chance.randrange(groups) for _ in range(B)]).long()
    if one_in(3):
        options["prefix_lens"] = torch.tensor([chance.choice([0, P // 2, P]) for _ in range(groups)])
    if one_in(4):
        options["causal"] = False
    if one_in(3):
        options["scale"] = chance.choice([0.0, 0.05, -0.3, 0.7])
    if one_in(3):
        options["window"] = chance.choice([1, 2, 7, 16, 40, 1000])
        options["window_prefix"] = one_in(2)
    if one_in(4):
        options["softcap"] = chance.choice([0.5, 5.0, 30.0])
    if one_in(4):
        options["alibi_slopes"] = torch.rand(H, generator=generator)

    mask = None if one_in(4) else random_mask(chance, generator, B, P, P + T)
    return Call(tensors, mask, options, cu_seqlens_of(lens) if varlen else None)


def random_mask(chance: Random, generator: torch.Generator, B: int, P: int, keys: int) -> dict:
    """Fields of a ContextMask over C = P context positions, fewer, or more (reaching into the rows' own keys)."""
    mask: dict = {}
    length = P
    if chance.randrange(2):
        length = chance.choice([0, P // 2, P, (P + keys) // 2, keys, keys + 9])
        mask["length"] = length
    if chance.randrange(2):
        ends = torch.randint(0, length + 1, (B, 2), generator=generator).sort(-1).values
        kind = chance.choice(["spans", "spans", "all", "none"])
        if kind != "spans":
            ends = torch.tensor([[0, length if kind == "all" else 0]]).expand(B, 2)
        mask["hidden"] = ends
    if chance.randrange(2):
        density = chance.choice([0.0, 0.5, 0.95, 1.0])
        mask["keep"] = torch.rand(B, length, generator=generator) < density
    if chance.randrange(2):
        mask["drop_p"] = chance.choice([0.0, 0.05, 0.5, 0.95, 1 - 2**-33])
        mask["seed"] = random_seed(chance)
    if chance.randrange(2):
        ids = [chance.choice(EDGE_IDS) if chance.randrange(2) else chance.randint(0, 40) for _ in range(B)]
        mask["row_ids"] = torch.tensor(ids, dtype=torch.int64)
    return mask


def random_seed(chance: Random) -> int:
    """A seed of token dropout: any of 64 bits, or one at an edge."""
    return chance.choice(EDGE_SEEDS) if chance.randrange(2) else chance.randint(0, 2**64 - 1)
