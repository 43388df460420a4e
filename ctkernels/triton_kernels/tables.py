"""Host side set-up: who attends to what, as small integer tables on the device that all kernels of a call read.

Queries and the heads of a KV group are flattened into one axis of lanes, head fastest: lane = slot * group + head, with
one slot per valid query, row after row. A tile is a run of lanes, and spans several rows when rows are short:

    rows          | row 0    | row 1 | row 2            |
    slots         0 1 2 3 4  5 6 7   8 9 ...
    lanes (x 2)   |------- tile 0 -------|------- tile 1 ...

Everything is vectorised PyTorch without a host sync, and every launch is sized by what the host knows (tensor shapes),
so that a call can be captured in a CUDA graph and replayed with new row lengths, spans or prefix indices. Values that
index memory are clamped, since the host cannot look at them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ctkernels.problem import Problem, row_count

# rows table, int32 [ROW_COLUMNS, B], rows in order of the prefix they read
ROW_FIRST = 0  # first slot
ROW_QUERIES = 1  # valid queries
ROW_BATCH = 2  # index into the batch dimension of q, k, v
ROW_TOKEN = 3  # first token there
ROW_KEYS = 4  # valid own keys
ROW_OFFSET = 5  # own position of query 0
ROW_HIDE_START = 6  # hidden span of context positions
ROW_HIDE_END = 7
ROW_ID = 8  # identity in the random stream, the bits of a uint32
ROW_INDEX = 9  # index of the row in the call
ROW_PREFIX = 10
ROW_PREFIX_LEN = 11

# slots table, int32 [SLOT_COLUMNS, slots]
SLOT_ROW = 0  # index into the rows table
SLOT_BATCH = 1
SLOT_TOKEN = 2  # position of the query in q
SLOT_POSITION = 3  # own position of the query, from which causality counts

# tiles table, int32 [TILE_COLUMNS, tiles]; a tile reads one prefix
TILE_PREFIX = 0
TILE_ROW = 1  # first row
TILE_ROWS = 2
TILE_LANE = 3  # first lane
TILE_LANES = 4  # 0: nothing to do
TILE_PREFIX_LEN = 5
TILE_SKIP_START = 6  # context positions hidden from all rows of the tile
TILE_SKIP_END = 7
TILE_HULL_START = 8  # no row of the tile hides a position outside of this range
TILE_HULL_END = 9

# own blocks table, int32 [OWN_COLUMNS, blocks]
OWN_ROW = 0  # -1: nothing to do
OWN_BLOCK = 1  # block of BLOCK_N own keys of that row

INT32_MAX = 2**31 - 1


class Rows(NamedTuple):
    """A call's rows. `slots_bound`, `uniform` and the sizes are known to the host."""

    table: Tensor  # int32 [ROW_COLUMNS, B]
    slots: Tensor  # int32 [SLOT_COLUMNS, slots_bound]
    count: int  # B
    prefixes: int  # G
    slots_bound: int  # valid queries are at most these
    own_keys: int  # T, or N of a packed call
    uniform: int  # queries of every row if they are all alike, else 0
    packed: bool


def build_rows(q: Tensor, k: Tensor, G: int, P: int, problem: Problem) -> Rows:
    """Tables of a call with q `[B, H, S, D]`, k `[B, Hk, T, D]` (batch 1 and rows packed with cu_seqlens)."""
    device, B = q.device, row_count(q, problem)
    S, T = q.shape[2], k.shape[2]
    packed = problem.cu_seqlens is not None
    zeros = torch.zeros(B, dtype=torch.int64, device=device)
    index = torch.arange(B, device=device)
    offset = zeros
    if packed:
        bounds = problem.cu_seqlens.long().clamp(0, S).cummax(0).values
        batch, token = zeros, bounds[:-1]
        queries = keys = bounds[1:] - token
    else:
        batch, token = index, zeros
        keys = zeros + T if problem.seq_lens is None else problem.seq_lens.long().clamp(0, T)
        queries = keys
        if T > S:
            queries, offset = zeros + S, keys - S
    C = min(problem.context_length, INT32_MAX)
    start, end = (zeros, zeros) if problem.hidden is None else problem.hidden.long().clamp(0, C).unbind(-1)
    prefix = zeros if problem.prefix_index is None else problem.prefix_index.long().clamp(0, max(G - 1, 0))
    prefix_len = zeros + (P if G else 0)
    if problem.prefix_lens is not None and G:
        prefix_len = problem.prefix_lens.long().clamp(0, P)[prefix]
    ids = index if problem.row_ids is None else problem.row_ids.long()
    columns = (queries, batch, token, keys, offset, start, end, ids, index, prefix, prefix_len)
    table = torch.stack(columns)
    if G > 1 and B:
        table = table[:, torch.argsort(prefix, stable=True)]
    ends = table[0].cumsum(0)
    table = torch.cat([(ends - table[0])[None], table])
    slots_bound = S if packed else B * S
    uniform = 0 if packed or problem.seq_lens is not None else S
    if B == 0 or slots_bound == 0:
        return Rows(table.int(), table.new_zeros(4, 0).int(), B, G, 0, T, uniform, packed)
    slot = torch.arange(slots_bound, device=device)
    row = torch.searchsorted(ends, slot, right=True).clamp(max=B - 1)
    within = slot - table[ROW_FIRST][row]
    position = table[ROW_OFFSET][row] + within
    slots = torch.stack((row, table[ROW_BATCH][row], table[ROW_TOKEN][row] + within, position))
    return Rows(table.int(), slots.int(), B, G, slots_bound, T, uniform, packed)


def rows_per_tile(rows: Rows, group: int, block_m: int) -> int:
    """ROWS: how many rows a tile may span before it is cut; a power of two.

    Token dropout evaluates the random stream once per (row of the tile, key), so a small number is cheap; rows shorter
    than the average must not cut too many tiles, hence the slack.
    """
    slots = rows.uniform or max(1, rows.slots_bound // max(rows.count, 1))
    spanned = (block_m - 2) // (slots * group) + 2
    if not rows.uniform:
        spanned += spanned // 2
    return 1 << (min(max(spanned, 2), block_m + 1) - 1).bit_length()


def tile_bound(rows: Rows, group: int, block_m: int, limit: int) -> int:
    """The largest number of tiles that `build_tiles` can make."""
    tiles = -(-rows.slots_bound * group // block_m) + (rows.prefixes if rows.prefixes > 1 else 0)
    if rows.uniform and (block_m - 2) // (rows.uniform * group) + 2 <= limit:
        return tiles
    return tiles + (rows.count + tiles) // limit


def build_tiles(rows: Rows, group: int, block_m: int, limit: int) -> tuple[Tensor, Tensor]:
    """Cut the lanes into tiles of at most `block_m` lanes and `limit` rows, each of one prefix.

    Returns the tiles table int32 `[TILE_COLUMNS, tile_bound]` and, int32 `[2, G]`, the tiles of each prefix as a range.
    """
    table, device = rows.table.long(), rows.table.device
    first, queries = table[ROW_FIRST], table[ROW_QUERIES]
    ends = first + queries
    runs = torch.arange(max(rows.prefixes, 1), device=device)
    row_bounds = torch.stack([torch.searchsorted(table[ROW_PREFIX].contiguous(), runs, right=r) for r in (False, True)])
    padded_first = torch.cat([first, ends[-1:]])
    run_start, run_end = padded_first[row_bounds] * group  # lanes of each prefix

    # tiles of each prefix, then of each tile its cuts
    tiles = (run_end - run_start + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    bound = -(-rows.slots_bound * group // block_m) + (rows.prefixes if rows.prefixes > 1 else 0)
    tile = torch.arange(bound, device=device)
    run = torch.searchsorted(tile_ends, tile, right=True)
    real = run < runs.shape[0]
    run = run.clamp(max=runs.shape[0] - 1)
    start = run_start[run] + (tile - (tile_ends - tiles)[run]) * block_m
    end = torch.minimum(start + block_m, run_end[run])
    start, end = torch.where(real, start, 0), torch.where(real, end, 0)
    row = torch.searchsorted(ends, start // group, right=True).clamp(max=rows.count - 1)
    last = torch.searchsorted(ends, (end - 1).clamp(min=0) // group, right=True).clamp(max=rows.count - 1)
    cuts = torch.where(end > start, (last - row) // limit + 1, 0)
    cut_ends = cuts.cumsum(0)

    piece = torch.arange(tile_bound(rows, group, block_m, limit), device=device)
    tile = torch.searchsorted(cut_ends, piece, right=True)
    real = tile < bound
    tile = tile.clamp(max=bound - 1)
    row0 = (row[tile] + (piece - (cut_ends - cuts)[tile]) * limit).clamp(max=rows.count - 1)
    row1 = torch.minimum(row0 + limit - 1, last[tile])
    lane0 = torch.maximum(start[tile], first[row0] * group)
    lane1 = torch.minimum(end[tile], ends[row1] * group)
    lanes = torch.where(real, (lane1 - lane0).clamp(min=0), 0)
    prefix = torch.where(real, table[ROW_PREFIX][row0], runs.shape[0])

    spans = (row0[:, None] + torch.arange(limit, device=device)).clamp(max=rows.count - 1)
    spans = torch.minimum(spans, row1[:, None])  # [tiles, limit], the last row repeated
    hide_start, hide_end = table[ROW_HIDE_START][spans], table[ROW_HIDE_END][spans]
    hides = hide_start < hide_end
    columns = (
        prefix,
        row0,
        row1 - row0 + 1,
        lane0,
        lanes,
        table[ROW_PREFIX_LEN][row0],
        hide_start.amax(1),
        hide_end.amin(1),
        torch.where(hides, hide_start, INT32_MAX).amin(1),
        torch.where(hides, hide_end, 0).amax(1),
    )
    ranges = torch.stack([torch.searchsorted(prefix, runs, right=r) for r in (False, True)])
    return torch.stack(columns).int(), ranges.int()


def build_own_blocks(rows: Rows, block_n: int) -> Tensor:
    """All blocks of `block_n` own keys: int32 `[OWN_COLUMNS, bound]`."""
    per_row = -(-rows.own_keys // block_n)
    bound = rows.own_keys // block_n + rows.count if rows.packed else rows.count * per_row
    blocks = (rows.table[ROW_KEYS].long() + block_n - 1) // block_n
    ends = blocks.cumsum(0)
    block = torch.arange(bound, device=rows.table.device)
    row = torch.searchsorted(ends, block, right=True)
    real = row < rows.count
    row = row.clamp(max=rows.count - 1)
    return torch.stack((torch.where(real, row, -1), block - (ends - blocks)[row])).int()
