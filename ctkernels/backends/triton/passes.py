"""Which kernels a call launches: its set-up, its forward and its backward pass, as templates that lack their tensors.

Sizes of grids and scratch follow from tensor shapes alone: no host sync, nothing that depends on data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ctkernels.backends.triton import config, tables
from ctkernels.backends.triton.backward import delta_kernel, dq_kernel, own_kernel
from ctkernels.backends.triton.backward_prefix import prefix_kernel, sum_kernel
from ctkernels.backends.triton.call import Call, strides
from ctkernels.backends.triton.config import Tile
from ctkernels.backends.triton.forward import forward_kernel, merge_kernel
from ctkernels.backends.triton.launch import Template
from ctkernels.backends.triton.mask import tile_words_kernel, words_kernel
from ctkernels.backends.triton.rounding import round_kernel

TILES_PER_SPLIT = 8
SUM_BLOCK = 1024
DELTA_BLOCK = 32
MERGE_BLOCK = 16
ROUND_BLOCK = 32
WORD_ROWS = 16
WORD_BLOCK = 32
ALIGNED = 4  # int32 numbers in 16 bytes: Triton compiles a variant for pointers that are multiples of it


class SetUp:
    """What the layers of a step share: the tables of one direction and the words of its mask, as one int32 tensor.

    parts: name -> where it begins, and its shape. block_ms: sizes of the tiles, which are in the names of their parts.
    """

    def __init__(self, call: Call, backward: bool) -> None:
        self.block_ms = sorted({call.tile(name).block_m for name in (("dq", "prefix") if backward else ("forward",))})
        self.prefix_m = call.tile("prefix").block_m if backward else 0
        self.own_n = call.config.own.block_n if backward else 0
        shapes = {"ROWS": (tables.ROW_COLUMNS, call.rows), "SLOTS": (tables.SLOT_COLUMNS, call.slots)}
        for block_m in self.block_ms:
            shapes[f"TILES {block_m}"] = tables.TILE_COLUMNS, call.tiles(block_m)
        if backward:
            shapes["RANGES"] = 2, max(call.G, 1)
            shapes["OWN"] = tables.OWN_COLUMNS, tables.own_bound(call.rows, call.T, call.packed, self.own_n)
        if call.n_words:
            shapes["WORDS"] = call.n_words, call.rows
            for block_m in self.block_ms:
                shapes[f"TILE_WORDS {block_m}"] = 2 * call.n_words, call.tiles(block_m)
        self.parts: dict[str, tuple[int, tuple[int, int]]] = {}
        self.size = 0
        if not call.empty:
            for name, (lines, columns) in shapes.items():
                self.parts[name] = self.size, (lines, columns)
                self.size += -(-lines * columns // ALIGNED) * ALIGNED
        self.launches = self._launches(call) if call.n_words and not call.empty else []

    def _launches(self, call: Call) -> list[Template]:
        """The kernels that apply the mask."""
        tile = Tile(0, 0, 4, 1)
        grid = (call.n_words, -(-call.rows // WORD_ROWS), 1)
        launches = [Template(words_kernel, grid, tile, {**call.values, "BLOCK": WORD_ROWS})]
        for block_m in self.block_ms:
            tiles = call.tiles(block_m)
            values = {**call.values, "n_tiles": tiles, "BLOCK": WORD_ROWS, "BLOCK_W": WORD_BLOCK}
            grid = (tiles, -(-call.n_words // WORD_BLOCK), 1)
            launches.append(Template(tile_words_kernel, grid, tile, values, of_tiles(block_m)))
        return launches

    def views(self, made: Tensor) -> dict[str, Tensor]:
        """The parts of the tensor, by name. Those that the call does not use are others, and never read."""
        views = {name: made.as_strided(shape, (shape[1], 1), begin) for name, (begin, shape) in self.parts.items()}
        if "WORDS" not in views:
            rows = views["ROWS"]
            views |= {"WORDS": rows, **{f"TILE_WORDS {block_m}": rows for block_m in self.block_ms}}
        return views


def of_tiles(block_m: int) -> dict[str, str]:
    """Which tables a kernel gets that walks tiles of `block_m` lanes."""
    return {name: f"{name} {block_m}" for name in ("TILES", "TILE_WORDS")}


class Pass(NamedTuple):
    """Launches in order, and the fp32 scratch that they need: name -> size."""

    launches: list[Template]
    scratch: dict[str, int]


def row_strides(S: int, H: int, D: int) -> tuple[int, ...]:
    """Strides of a result `[B, H, S, D]`, in memory as B, S, H, D: what the layers around attention read and write."""
    return S * H * D, D, H * D


def rounding(call: Call) -> Template:
    """Rounds the prefix to the rows' type."""
    warps = 4 if call.widest <= 256 else 8  # whole rows in registers
    grid = (-(-call.P // ROUND_BLOCK), call.Hk, call.G)
    return Template(round_kernel, grid, Tile(0, ROUND_BLOCK, warps, 1), {**call.values, **call.given_prefix})


def forward(call: Call) -> Pass:
    tile = call.tile("forward")
    tiles, splits = call.tiles(tile.block_m), call.key_splits(tile)
    wide = call.row_keys >= config.ROW_KEYS_FOR_WIDE_BLOCKS and call.widest <= config.LARGEST_D_OF_WIDE_BLOCKS
    out, lse = row_strides(call.S, call.H, call.Dv), (call.H * call.S, call.S)
    values = {
        **call.values, **strides("out", out, "bht"), **strides("lse", lse, "bh"), "n_tiles": tiles, "SPLITS": splits,
        "OWN_N": tile.block_n if wide else min(tile.block_n, 32),
    }  # fmt: skip
    launches = [Template(forward_kernel, (tiles, call.Hk, splits), tile, values, of_tiles(tile.block_m))]
    if splits == 1:
        return Pass(launches, {})
    launches.append(Template(merge_kernel, lane_grid(call, MERGE_BLOCK), Tile(MERGE_BLOCK, 0, 4, 1), values))
    lanes = splits * call.Hk * call.lanes
    return Pass(launches, {"PART": lanes * call.Dv, "STATS": 2 * lanes})


def lane_grid(call: Call, block: int) -> tuple[int, int, int]:
    return -(-call.lanes // block), call.Hk, 1


def backward(call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool]) -> Pass:
    """For the gradients that are asked for."""
    values = {**call.values, "HAS_DLSE": dlse is not None}
    for name, x, letters in (
        ("dout", dout, "bht"), ("out", out, "bht"), ("lse", lse, "bh"), ("dlse", lse if dlse is None else dlse, "bht")
    ):  # fmt: skip
        values |= strides(name, x.stride(), letters)
    for name, heads, tokens, D in (
        ("dq", call.H, call.S, call.D), ("dk", call.Hk, call.T, call.D), ("dv", call.Hk, call.T, call.Dv)
    ):  # fmt: skip
        values |= strides(name, row_strides(tokens, heads, D), "bht")
    scratch = {"STATE": 3 * call.Hk * call.lanes}
    if needs[0]:
        launches = [_dq(call, values, scratch)]
    else:
        launches = [Template(delta_kernel, lane_grid(call, DELTA_BLOCK), Tile(DELTA_BLOCK, 0, 4, 1), values)]
    if needs[1] or needs[2]:
        launches.append(_own(call, values, needs))
    if any(needs[3:]) and call.P and call.G:
        launches.append(_prefix(call, values, needs, scratch))
    return Pass([*launches, *_sums(call, values, scratch)], scratch)


def _dq(call: Call, values: dict[str, Any], scratch: dict[str, int]) -> Template:
    tile = call.tile("dq")
    tiles, splits = call.tiles(tile.block_m), call.key_splits(tile)
    if splits > 1:
        scratch["PART_Q"] = splits * call.Hk * call.lanes * call.D
    values["query_splits"] = splits
    own = {**values, "n_tiles": tiles, "SPLITS": splits, "OWN_N": min(tile.block_n, 32)}
    return Template(dq_kernel, (tiles, call.Hk, splits), tile, own, of_tiles(tile.block_m))


def _own(call: Call, values: Mapping[str, Any], needs: list[bool]) -> Template:
    tile = call.config.own
    blocks = tables.own_bound(call.rows, call.T, call.packed, tile.block_n)
    own = {**values, "n_own": blocks, "NEED_K": needs[1], "NEED_V": needs[2]}
    return Template(own_kernel, (blocks, call.Hk, 1), tile, own)


def _prefix(call: Call, values: dict[str, Any], needs: list[bool], scratch: dict[str, int]) -> Template:
    tile = call.tile("prefix")
    blocks, tiles = -(-call.P // tile.block_n), call.tiles(tile.block_m)
    splits = config.split_count(blocks * call.Hk * call.G, tiles // call.G, TILES_PER_SPLIT, tile, call.target)
    heads = 0
    if needs[5]:
        heads = 1 if call.bias_shape[1] == 1 else call.group
    keys = splits * call.G * call.Hk * call.P
    parts = {"PART_K": keys * call.D * needs[3], "PART_V": keys * call.Dv * needs[4]} if splits > 1 else {}
    scratch |= {name: size for name, size in {**parts, "PART_BIAS": keys * heads}.items() if size}
    values["splits"] = splits
    own = {
        **values, "n_tiles": tiles, "SPLITS": splits, "NEED_K": needs[3], "NEED_V": needs[4], "BIAS_HEADS": heads,
        "BIAS_WIDTH": 1 << max(heads - 1, 0).bit_length(), "SKIP": call.may_skip(tile),
    }  # fmt: skip
    names = {
        name: f"PART_{name[1:]}" if f"PART_{name[1:]}" in scratch else f"DPREFIX_{name[1:]}" for name in ("DK", "DV")
    }
    names["DBIAS"] = "PART_BIAS"
    return Template(prefix_kernel, (blocks, call.Hk, call.G * splits), tile, own, of_tiles(tile.block_m) | names)


def _sums(call: Call, values: Mapping[str, Any], scratch: Mapping[str, int]) -> list[Template]:
    """One launch that adds up whatever was cut into parts."""
    planes = call.G * call.Hk
    heads = call.Hk * (1 if call.bias_shape[1] == 1 else call.group)
    one_prefix, one_head = call.bias_shape[0] == 1 and call.G > 1, call.bias_shape[1] == 1 and heads > 1
    # name of the parts -> elements of a plane, planes
    sizes = {
        "PART_Q": (call.lanes * call.D, call.Hk),
        "PART_K": (call.P * call.D, planes),
        "PART_V": (call.P * call.Dv, planes),
        "PART_BIAS": (call.P, (1 if one_prefix else call.G) * (1 if one_head else heads)),
    }
    asked = [sizes[name] for name in sizes if name in scratch]
    if not asked:
        return []
    flags = {name.replace("PART", "SUM"): int(name in scratch) for name in sizes}
    grid = (max(-(-size // SUM_BLOCK) for size, _ in asked), max(planes for _, planes in asked), len(asked))
    own = {
        "query_splits": 1, "splits": 1, **values, **flags, "n_heads": heads, "SUM_PREFIXES": one_prefix,
        "SUM_HEADS": one_head, "BLOCK": SUM_BLOCK,
    }  # fmt: skip
    names = {"DK": "DPREFIX_K", "DV": "DPREFIX_V"}
    return [Template(sum_kernel, grid, Tile(0, 0, 4, 1), own, names)]
