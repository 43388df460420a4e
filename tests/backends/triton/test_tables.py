"""Tiles and plans: who is in which tile, and that nothing on the host depends on values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from ctkernels.backends.triton import config, tables
from ctkernels.backends.triton.plan import plan_backward, plan_forward
from ctkernels.problem import Problem

NO_PROBLEM = Problem(
    alibi_slopes=None, cu_seqlens=None, seq_lens=None, prefix_index=None, prefix_lens=None, hidden=None, row_ids=None,
    keep=None, seed_in_memory=None, context_length=0, drop_p=0.0, seed=0, scale=1.0, causal=True, window=0,
    window_prefix=True, softcap=0.0,
)  # fmt: skip


@st.composite
def problems(draw):
    """Sizes and a Problem of ragged rows, packed or padded, over up to three prefixes, with spans."""
    lens = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20, 40]), min_size=1, max_size=40))
    B, longest, C = len(lens), max(lens), 50
    packed, G = draw(st.booleans()), draw(st.sampled_from([1, 3]))
    S = T = sum(lens) if packed else longest
    values = {}
    if packed:
        values["cu_seqlens"] = torch.tensor([sum(lens[:b]) for b in range(B + 1)], dtype=torch.int32)
    elif draw(st.booleans()):
        values["seq_lens"] = torch.tensor(lens)
        S = T - draw(st.sampled_from([0, min(longest, 2)]))
    if G > 1:
        values["prefix_index"] = torch.tensor(draw(st.lists(st.integers(0, G - 1), min_size=B, max_size=B)))
    spans = draw(st.lists(st.tuples(st.integers(0, C), st.integers(0, C)), min_size=B, max_size=B))
    values["hidden"] = torch.tensor([sorted(span) for span in spans])
    return B, S, T, G, NO_PROBLEM._replace(context_length=C, **values)


def tensors(B: int, S: int, T: int, G: int, problem: Problem, H: int = 4, Hk: int = 2, P: int = 50, D: int = 16):
    batch = B if problem.cu_seqlens is None else 1
    own = [torch.zeros(batch, heads, tokens, D) for heads, tokens in ((H, S), (Hk, T), (Hk, T))]
    return (*own, torch.zeros(G, Hk, P, D), torch.zeros(G, Hk, P, D), None)


@given(problems(), st.sampled_from([16, 32, 64]), st.sampled_from([1, 2, 3]))
def test_tiles_hold_every_lane_once(drawn, block_m, group):
    """At most BLOCK_M lanes to a tile, one prefix, and all rows that the lanes belong to."""
    B, S, T, G, problem = drawn
    q, k, *_ = tensors(B, S, T, G, problem)
    rows = tables.build_rows(q, k, G, 50, problem)
    if rows.slots_bound == 0:
        return
    tiles, ranges = tables.build_tiles(rows, group, block_m)
    table = rows.table.tolist()
    owner = [r for r in range(B) for _ in range(table[tables.ROW_QUERIES][r] * group)]
    covered = []
    for tile in tiles.T.tolist():
        lanes = range(tile[tables.TILE_LANE], tile[tables.TILE_LANE] + tile[tables.TILE_LANES])
        if not lanes:
            assert tile[tables.TILE_ROWS] == 0
            continue
        covered += lanes
        first, count = tile[tables.TILE_ROW], tile[tables.TILE_ROWS]
        assert len(lanes) <= block_m
        members = {owner[lane] for lane in lanes}
        assert min(members) == first and max(members) == first + count - 1
        assert {table[tables.ROW_PREFIX][r] for r in members} == {tile[tables.TILE_PREFIX]}
        assert tile[tables.TILE_PREFIX_LEN] == table[tables.ROW_PREFIX_LEN][first]
    assert covered == list(range(len(owner)))
    prefixes = tiles[tables.TILE_PREFIX].tolist()
    for g in range(G):
        assert set(prefixes[ranges[0, g] : ranges[1, g]]) <= {g} and prefixes.count(g) == ranges[1, g] - ranges[0, g]


@given(problems())
def test_slots_and_own_blocks(drawn):
    """A slot knows its row, token and own position; own blocks hold every token of k once, those of no row included."""
    B, S, T, G, problem = drawn
    q, k, *_ = tensors(B, S, T, G, problem)
    rows = tables.build_rows(q, k, G, 50, problem)
    table = rows.table.T.tolist()
    slots = rows.slots.T.tolist()
    for r, row in enumerate(table):
        for i in range(row[tables.ROW_QUERIES]):
            expected = [r, row[tables.ROW_BATCH], row[tables.ROW_TOKEN] + i, row[tables.ROW_OFFSET] + i]
            assert slots[row[tables.ROW_FIRST] + i] == expected
    # together with the slots behind them, which belong to no row, every query once
    tokens = [(batch, token) for _, batch, token, _ in slots]
    assert sorted(tokens) == [(b, s) for b in range(q.shape[0]) for s in range(S)]
    written = []
    for r, block, token, keys in tables.build_own_blocks(rows, 16).T.tolist():
        batch, extent = (0, keys) if r < 0 else (table[r][tables.ROW_BATCH], T if problem.cu_seqlens is None else keys)
        assert keys == extent and (r < 0 or token == table[r][tables.ROW_TOKEN])
        written += [(batch, token + t) for t in range(block * 16, min(block * 16 + 16, keys))]
    assert sorted(written) == [(b, t) for b in range(k.shape[0]) for t in range(T)]


@pytest.mark.parametrize("D", range(1, 513))
def test_pieces_hold_the_head_dimension(D):
    D0, D1 = config.pieces(D)
    assert D0 >= 16 and D0 & (D0 - 1) == 0
    assert D1 == 0 or (D1 >= 16 and D1 & (D1 - 1) == 0 and D1 < D0)
    assert D <= D0 + D1 <= max(16, 1 << (D - 1).bit_length())


def test_pieces_of_usual_head_dimensions():
    assert [config.pieces(D) for D in (64, 80, 96, 128, 256)] == [(64, 0), (64, 16), (64, 32), (128, 0), (256, 0)]


class NoSync(TorchDispatchMode):
    """Refuses the operators by which the host waits for values of the device."""

    SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "index.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "index.Tensor" in name:  # synchronises with a boolean index only
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        else:
            assert not any(word in name for word in self.SYNCHRONISING), name
        return func(*args, **(kwargs or {}))


def launches_of(call: tuple, problem: Problem) -> list:
    forward = plan_forward(*call, problem)
    out, lse = forward.outputs
    backward = plan_backward(out, None, *call, out, lse, [True] * 5 + [False], problem)
    return forward.launches + backward.launches


@pytest.mark.parametrize("packed", [True, False])
def test_launches_depend_on_shapes_alone(packed):
    """Other lengths, spans, prefixes and seeds of the same shapes: the same grids, scalars and constants, no sync.

    So a captured CUDA graph can be replayed with new values in the same tensors (its seed and drop_p are constants).
    """
    plans = []
    for lens, prefix, start in (([9, 0, 4, 7], [0, 2, 1, 0], 0), ([5, 5, 5, 5], [1, 1, 1, 1], 13)):
        hidden = torch.tensor([[start, start + 10]] * 4)
        values = dict(hidden=hidden, prefix_index=torch.tensor(prefix), prefix_lens=torch.tensor([50, 3, start]))
        if packed:
            values["cu_seqlens"] = torch.tensor([sum(lens[:b]) for b in range(5)], dtype=torch.int32)
        else:
            values["seq_lens"] = torch.tensor(lens)
        problem = NO_PROBLEM._replace(context_length=50, drop_p=0.1, seed=start, **values)
        size = 20 if packed else 9
        with NoSync():
            plans.append(launches_of(tensors(4, size, size, 3, problem), problem))
    for a, b in zip(*plans, strict=True):
        assert (a.name, a.grid, a.constexprs, a.num_warps) == (b.name, b.grid, b.constexprs, b.num_warps)
        for name, x in a.args.items():
            y = b.args[name]
            if isinstance(x, torch.Tensor):
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype), name
            elif not name.startswith("seed_"):
                assert x == y, name


def test_few_tiles_split_the_prefix_and_few_keys_split_the_queries():
    call = tensors(1, 1, 1, 1, NO_PROBLEM, P=4096)
    splits = {x.name: x.constexprs["SPLITS"] for x in launches_of(call, NO_PROBLEM) if "SPLITS" in x.constexprs}
    assert splits["forward_kernel"] == splits["dq_kernel"] == splits["merge_kernel"] > 1 == splits["prefix_kernel"]
    call = tensors(64, 100, 100, 1, NO_PROBLEM, P=40)
    splits = {x.name: x.constexprs["SPLITS"] for x in launches_of(call, NO_PROBLEM) if "SPLITS" in x.constexprs}
    assert splits["prefix_kernel"] > 1 == splits["forward_kernel"]
