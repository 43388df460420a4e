"""Host side set-up: who attends to what, as small integer tables on the device that all kernels of a call read.

Queries and the heads of a KV group are flattened into one axis of lanes, head fastest: lane = slot * group + head, with
one slot per valid query, row after row. A tile is a run of lanes, and spans several rows when rows are short:

    rows          | row 0    | row 1 | row 2            |
    slots         0 1 2 3 4  5 6 7   8 9 ...
    lanes (x 2)   |------- tile 0 -------|------- tile 1 ...

Everything is vectorised PyTorch without a host sync, and every launch is sized by what the host knows (tensor shapes),
so that a call can be captured in a CUDA graph and replayed with new row lengths, spans or prefix indices. Values that
index memory are clamped, since the host cannot look at them. Tables are int64 here; kernels read int32 (`plan_tables`).
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

# slots table, int32 [SLOT_COLUMNS, slots]; slots behind the last query name the tokens of q that belong to no row
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

# own blocks table, int32 [OWN_COLUMNS, blocks]; together the blocks hold every token of k once
OWN_ROW = 0  # -1: tokens that belong to no row
OWN_BLOCK = 1  # block of BLOCK_N own keys of that row
OWN_TOKEN = 2  # the first token of key 0
OWN_KEYS = 3  # tokens from there on that are the row's, or padding behind it

ROW_COLUMNS, SLOT_COLUMNS, TILE_COLUMNS, OWN_COLUMNS = 12, 4, 6, 4

INT32_MAX = 2**31 - 1


class Rows(NamedTuple):
    """A call's rows. `slots_bound` and the sizes are known to the host."""

    table: Tensor  # int64 [ROW_COLUMNS, B]
    slots: Tensor  # int64 [SLOT_COLUMNS, slots_bound]
    count: int  # B
    prefixes: int  # G
    slots_bound: int  # valid queries are at most these
    own_keys: int  # T, or N of a packed call
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
    if B == 0 or slots_bound == 0:
        return Rows(table, table.new_zeros(SLOT_COLUMNS, 0), B, G, 0, T, packed)
    slot = torch.arange(slots_bound, device=device)
    row = torch.searchsorted(ends, slot, right=True)
    in_a_row, row = row < B, row.clamp(max=B - 1)
    within = slot - table[ROW_FIRST][row]
    position = table[ROW_OFFSET][row] + within
    batch, token = table[ROW_BATCH][row], table[ROW_TOKEN][row] + within
    if may_have_idle_tokens(problem):
        idle_batch, idle_token = _idle_tokens(table, slot - ends[-1], S, packed)
        batch, token = torch.where(in_a_row, batch, idle_batch), torch.where(in_a_row, token, idle_token)
    return Rows(table, torch.stack((row, batch, token, position)), B, G, slots_bound, T, packed)


def may_have_idle_tokens(problem: Problem) -> bool:
    """Whether tokens may belong to no row: padding, or tokens around packed rows. Their results are zeros."""
    return problem.seq_lens is not None or problem.cu_seqlens is not None


def _idle_tokens(table: Tensor, n: Tensor, S: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Batch index and token of the n-th query that belongs to no row; anything where n is negative."""
    n = n.clamp(min=0)
    if packed:  # before the first row, or behind the last one
        start, end = packed_tokens(table)
        return torch.zeros_like(n), torch.where(n < start, n, n + end - start)
    idle = S - table[ROW_QUERIES]
    ends = idle.cumsum(0)
    row = torch.searchsorted(ends, n, right=True).clamp(max=table.shape[1] - 1)
    return table[ROW_BATCH][row], table[ROW_QUERIES][row] + n - (ends - idle)[row]


def packed_tokens(table: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that packed rows fill, first and last plus one."""
    start = table[ROW_TOKEN].min()
    return start, start + table[ROW_QUERIES].sum()


def tile_bound(slots_bound: int, group: int, prefixes: int, block_m: int) -> int:
    """No call of these sizes has more tiles."""
    return -(-slots_bound * group // block_m) + (prefixes if prefixes > 1 else 0)


def build_tiles(rows: Rows, group: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Cut the lanes into tiles of at most `block_m` lanes, each of one prefix.

    Returns the tiles table int64 `[TILE_COLUMNS, bound]` and, int64 `[2, G]`, the tiles of each prefix as a range.
    """
    table, device = rows.table, rows.table.device
    first, queries = table[ROW_FIRST], table[ROW_QUERIES]
    ends = first + queries
    runs = torch.arange(max(rows.prefixes, 1), device=device)
    row_bounds = torch.stack([torch.searchsorted(table[ROW_PREFIX].contiguous(), runs, right=r) for r in (False, True)])
    padded_first = torch.cat([first, ends[-1:]])
    run_start, run_end = padded_first[row_bounds] * group  # lanes of each prefix

    tiles = (run_end - run_start + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(tile_bound(rows.slots_bound, group, rows.prefixes, block_m), device=device)
    run = torch.searchsorted(tile_ends, tile, right=True)
    real = run < runs.shape[0]
    run = run.clamp(max=runs.shape[0] - 1)
    lane0 = run_start[run] + (tile - (tile_ends - tiles)[run]) * block_m
    lanes = torch.where(real, torch.minimum(lane0 + block_m, run_end[run]) - lane0, 0)
    lane0 = torch.where(real, lane0, 0)
    row0 = torch.searchsorted(ends, lane0 // group, right=True).clamp(max=rows.count - 1)
    last = torch.searchsorted(ends, (lane0 + lanes - 1).clamp(min=0) // group, right=True).clamp(max=rows.count - 1)
    prefix = torch.where(real, table[ROW_PREFIX][row0], runs.shape[0])
    columns = (prefix, row0, torch.where(real, last - row0 + 1, 0), lane0, lanes, table[ROW_PREFIX_LEN][row0])
    ranges = torch.stack([torch.searchsorted(prefix, runs, right=r) for r in (False, True)])
    return torch.stack(columns), ranges


def own_bound(count: int, own_keys: int, packed: bool, block_n: int) -> int:
    """No call of `count` rows has more blocks of own keys, tokens of no row included."""
    if packed:  # those before and behind the rows are two more rows
        return (own_keys + (count + 2) * (block_n - 1)) // block_n
    return count * -(-own_keys // block_n)


def build_own_blocks(rows: Rows, block_n: int) -> Tensor:
    """All blocks of `block_n` own keys: int64 `[OWN_COLUMNS, bound]`."""
    table = rows.table
    block = torch.arange(own_bound(rows.count, rows.own_keys, rows.packed, block_n), device=table.device)
    if not rows.packed:
        per_row = max(1, -(-rows.own_keys // block_n))
        columns = (block // per_row, block % per_row, torch.zeros_like(block), torch.full_like(block, rows.own_keys))
        return torch.stack(columns)
    start, end = packed_tokens(table)
    before, behind = start[None], (rows.own_keys - end)[None]
    keys = torch.cat((before, table[ROW_KEYS], behind))
    tokens = torch.cat((torch.zeros_like(before), table[ROW_TOKEN], end[None]))
    blocks = (keys + block_n - 1) // block_n
    ends = blocks.cumsum(0)
    piece = torch.searchsorted(ends, block, right=True).clamp(max=rows.count + 1)
    row = torch.where(piece <= rows.count, piece - 1, -1)
    return torch.stack((row, block - (ends - blocks)[piece], tokens[piece], keys[piece]))
