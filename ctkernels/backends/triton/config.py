"""Tile sizes by architecture, head dimension and type: one table, no autotuning.

`triton.autotune` would time candidates at the first call, which a CUDA graph capture cannot do, and different tiles add
up in a different order, so that two runs of one program could differ in the last bit. `docs/gpu.md` derives the sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Lanes and keys of a tile, warps of a program, stages of its software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    forward: Tile
    dq: Tile
    own: Tile  # gradients of own keys: block_n keys of one row, block_m of its lanes at a time
    prefix: Tile  # gradients of prefix keys: block_n keys, block_m lanes at a time


class Target(NamedTuple):
    """What a plan is made for."""

    arch: str  # "sm_80", "gfx942", ...
    multiprocessors: int


A100 = Target("sm_80", 108)

# family -> bits of the rows' type -> largest D -> tiles. 99 KiB of shared memory is all that sm_86, sm_89 and sm_120
# give a program, 64 KiB gfx942; sm_80 gives 163 KiB, sm_90 and sm_100 227 KiB.
LARGE = {
    16: {
        64: Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 32, 4, 1), Tile(64, 64, 4, 2)),
        96: Config(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 16, 4, 1), Tile(32, 64, 4, 2)),
        128: Config(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 1), Tile(32, 64, 4, 2)),
        256: Config(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
        512: Config(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
    32: {
        64: Config(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        96: Config(Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1), Tile(32, 32, 8, 1)),
        128: Config(Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1), Tile(32, 32, 8, 1)),
        256: Config(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
        512: Config(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    },
}
HOPPER = {**LARGE, 16: {**LARGE[16], 64: LARGE[16][64]._replace(prefix=Tile(32, 64, 4, 2))}}
BLACKWELL = {**LARGE, 16: {**HOPPER[16], 96: LARGE[16][96]._replace(forward=Tile(128, 32, 8, 2))}}
SMALL = {
    16: {
        **LARGE[16],
        64: LARGE[16][64]._replace(forward=Tile(128, 64, 8, 2), prefix=Tile(64, 32, 4, 2)),
        256: Config(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1)),
    },
    32: {**LARGE[32], 256: LARGE[32][256]._replace(prefix=Tile(16, 16, 8, 1))},
}
FAMILIES = {"sm_80": LARGE, "sm_90": HOPPER, "sm_100": BLACKWELL}
# from this many own keys per row on, their blocks are as wide as the prefix's, up to this head dimension
ROW_KEYS_FOR_WIDE_BLOCKS = 96
LARGEST_D_OF_WIDE_BLOCKS = 64


def config_for(target: Target, D: int, dtype: torch.dtype) -> Config:
    by_width = FAMILIES.get(target.arch, SMALL)[32 if dtype == torch.float32 else 16]
    return by_width[min(width for width in by_width if width >= D)]


def pieces(D: int) -> tuple[int, int]:
    """D as D0 + D1, powers of two of at least 16 (D1 may be 0) that hold it with the least padding."""
    whole = max(16, 1 << (D - 1).bit_length())
    D0 = whole // 2
    if D0 < 32:
        return whole, 0
    D1 = max(16, 1 << (D - D0 - 1).bit_length()) if D > D0 else 0
    return (whole, 0) if D1 == 0 or whole <= D0 + D1 else (D0, D1)


def fit(tile: Tile, lanes: int) -> Tile:
    """The tile for a call that fills no more than `lanes`, but 16, which the tensor cores need."""
    block_m = min(tile.block_m, max(16, 1 << max(lanes - 1, 0).bit_length()))
    return tile if block_m == tile.block_m else tile._replace(block_m=block_m, num_warps=4)


def lighter(tile: Tile, kernel: str, D: int) -> Tile:
    """The tile of a call whose options take registers: half as many of what `kernel` walks, or fewer still."""
    if kernel == "prefix" and tile.block_m > 32:
        return tile._replace(block_m=tile.block_m // 2, num_stages=min(tile.num_stages, tile.block_n // 32))
    if kernel == "prefix" and D > 64:
        tile = tile._replace(block_m=16)
    if kernel == "forward" and D > 64:
        tile = tile._replace(num_stages=1)
    return tile._replace(block_n=max(16, tile.block_n // 2))


def split_count(programs: int, pieces_of_work: int, least: int, tile: Tile, target: Target) -> int:
    """Into how many ranges to cut work that has too few programs to fill the device, `least` pieces in each.

    As many as still run at once: of 8 warps one program per multiprocessor, which its registers fill, of 4 two. More
    would take turns, and ranges cost partial results and a second kernel."""
    at_once = target.multiprocessors * max(1, 8 // tile.num_warps)
    return max(1, min(at_once // max(programs, 1), pieces_of_work // least, 32))
