"""Which kernels a call launches, on what: the forward and the backward pass as lists of `Launch`.

Sizes of grids and scratch follow from tensor shapes alone: no host sync, nothing that depends on data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctkernels.backends.check import check, check_gradients
from ctkernels.backends.triton import config, tables
from ctkernels.backends.triton.backward import delta_kernel, dq_kernel, dq_sum_kernel, own_kernel
from ctkernels.backends.triton.backward_prefix import prefix_kernel, sum_kernel
from ctkernels.backends.triton.config import Target, Tile
from ctkernels.backends.triton.forward import forward_kernel, merge_kernel
from ctkernels.backends.triton.launch import Launch, Plan
from ctkernels.backends.triton.mask import tile_words_kernel, words_kernel
from ctkernels.backends.triton.rounding import round_kernel
from ctkernels.backends.triton.table_cache import tables_of
from ctkernels.problem import Problem

LOG2E = math.log2(math.e)
# an own range of keys must be long enough to be worth its fp32 partial results, which cost 8 bytes a lane and dimension
KEY_BLOCKS_PER_SPLIT = 4
TILES_PER_SPLIT = 8
FEW_ROWS = 8
SUM_BLOCK = 1024
DELTA_BLOCK = 32
MERGE_BLOCK = 16
ROUND_BLOCK = 32
WORD_ROWS = 16
WORD_BLOCK = 32


class Call:
    """What the launches of one call share: sizes, tables, scalars and flags, in the kernels' names."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None,
        problem: Problem, target: Target,
    ) -> None:  # fmt: skip
        check(q, k, v, prefix_k, prefix_v, bias, problem)
        self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.problem = q, k, v, prefix_k, prefix_v, problem
        self.H, self.D, self.Dv, self.Hk = q.shape[1], q.shape[3], v.shape[3], k.shape[1]
        self.widest = max(self.D, self.Dv)
        self.G, self.P = prefix_k.shape[0], prefix_k.shape[2]
        self.group, self.target = self.H // self.Hk, target
        self.config = config.config_for(target, self.widest, q.dtype)
        self.tables = tables_of(q, k, self.G, self.P, problem)
        self.rows = self.tables.rows
        self.lanes = self.rows.slots_bound * self.group
        self._tiles: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        table = self.rows.table
        self.bias = bias.detach().float().contiguous() if bias is not None and bias.numel() else None
        slopes = problem.alibi_slopes
        keep = problem.keep
        self.inputs = {
            "Q": q, "K": k, "V": v, "ROWS": table, "SLOTS": self.rows.slots,
            # absent tensors are never read
            "WORDS": table, "TILE_WORDS": table,
            "BIAS": table if self.bias is None else self.bias,
            "SLOPES": table if slopes is None else slopes.float().contiguous(),
            "KEEP": table if keep is None else keep.contiguous().view(torch.uint8),
        }  # fmt: skip
        C = min(problem.context_length, tables.INT32_MAX)
        drop_below = math.floor(problem.drop_p * 2**32)
        softcap, scale = problem.softcap, problem.scale
        self.scalars = {
            "n_rows": self.rows.count, "n_slots": self.rows.slots_bound, "n_prefixes": self.G, "P": self.P, "length": C,
            "n_words": 0, "drop_below": signed(drop_below), "scale": scale,
            "factor": scale / softcap if softcap else scale * LOG2E, "cap": softcap * LOG2E,
            "window": min(problem.window, self.P + k.shape[2] + 1),  # no key is farther away, and sums stay small
        }  # fmt: skip
        self.scalars |= dict(zip(("seed_low", "seed_high"), seed_words(problem), strict=True))
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.scalars |= strides(name, x, "bht")
        self.scalars["bias_g"], self.scalars["bias_h"] = 0, 0
        if self.bias is not None:
            self.scalars["bias_g"] = self.bias.stride(0) if self.bias.shape[0] > 1 else 0
            self.scalars["bias_h"] = self.bias.stride(1) if self.bias.shape[1] > 1 else 0
        (D0, D1), (VD0, VD1) = config.pieces(self.D), config.pieces(self.Dv)
        hidden, dropped, kept = problem.hidden is not None, drop_below > 0, keep is not None and C > 0
        masked = hidden or dropped or kept
        exact = q.dtype != torch.float32 or not tf32_allowed()
        self.flags = {
            "GROUP": self.group, "D": self.D, "D0": D0, "D1": D1, "W1": max(D1, 1),
            "VD": self.Dv, "VD0": VD0, "VD1": VD1, "VW1": max(VD1, 1), "MASKED": masked, "DROP": dropped,
            "KEPT": kept, "OWN_CONTEXT": C > self.P and masked, "CAUSAL": problem.causal,
            "WINDOW": problem.window > 0, "WINDOW_PREFIX": problem.window_prefix, "SOFTCAP": softcap > 0,
            "HAS_BIAS": self.bias is not None, "ALIBI": slopes is not None,
            "PLAIN": not softcap and self.bias is None and slopes is None and scale > 0,
            "PRECISION": "ieee" if exact else "tf32",
        }  # fmt: skip

        self._take_prefix(prefix_k, prefix_v)
        self.launches: list[Launch] = []
        if not self.empty and self.P and self.G:
            if prefix_k.dtype != q.dtype:
                self._round_prefix()
            self._apply_mask()

    def _take_prefix(self, prefix_k: Tensor, prefix_v: Tensor) -> None:
        self.inputs |= {"PREFIX_K": prefix_k, "PREFIX_V": prefix_v}
        self.scalars |= strides("pk", prefix_k, "ght") | strides("pv", prefix_v, "ght")

    def _round_prefix(self) -> None:
        """Rounds the prefix to the rows' type, which later launches then read."""
        rounded = [self.q.new_empty(x.shape) for x in (self.prefix_k, self.prefix_v)]
        grid = (-(-self.P // ROUND_BLOCK), self.Hk, self.G)
        values = dict(ROUNDED_K=rounded[0], ROUNDED_V=rounded[1])
        warps = 4 if self.widest <= 256 else 8  # whole rows in registers
        self.launches.append(self.launch(round_kernel, grid, Tile(0, ROUND_BLOCK, warps, 1), **values))
        self._take_prefix(*rounded)

    def _apply_mask(self) -> None:
        """Which prefix keys each row sees, if there is a mask."""
        if not self.flags["MASKED"]:
            return
        n_words = 2 * -(-self.P // 64)  # even, so that a block of 64 keys may read two
        words = torch.empty(n_words, self.rows.count, dtype=torch.int32, device=self.q.device)
        self.inputs["WORDS"], self.scalars["n_words"] = words, n_words
        grid = (n_words, -(-self.rows.count // WORD_ROWS), 1)
        self.launches.append(self.launch(words_kernel, grid, Tile(0, 0, 4, 1), BLOCK=WORD_ROWS))

    @property
    def empty(self) -> bool:
        return self.lanes == 0 or self.rows.count == 0

    @property
    def row_lanes(self) -> int:
        """Lanes of an average row."""
        return max(1, self.lanes // max(self.rows.count, 1))

    @property
    def row_keys(self) -> int:
        """Own keys of an average row."""
        return self.rows.own_keys // max(self.rows.count, 1) if self.rows.packed else self.rows.own_keys

    def tile(self, kernel: str) -> tuple[Tile, Tensor, Tensor, Tensor]:
        """The tile for "forward", "dq" or "prefix" of this call, the tiles it makes, those of each prefix, and the keys
        that each tile sees."""
        tile, most = getattr(self.config, kernel), self.lanes
        near = self.flags["WINDOW"] and self.flags["WINDOW_PREFIX"]
        branch = not (self.flags["DROP"] or self.flags["KEPT"])  # full tiles are told from others
        options = near or not self.flags["PLAIN"]
        if options or (branch and kernel != "forward") or (kernel == "prefix" and self.may_skip(tile)):
            tile = config.lighter(tile, kernel, self.widest)
        if kernel != "prefix":  # tiles walk the own keys of their rows, too, one row after another
            # all lanes wait while one row's keys are walked: limit the others' part to half of the useful work
            most = min(most, self.row_lanes + self.row_lanes * (self.P + self.row_keys) // (2 * max(self.row_keys, 1)))
        tile = config.fit(tile, most)
        if tile.block_m not in self._tiles:
            tiles, ranges = self.tables.tiles(tile.block_m)
            words, n_words, n_tiles = self.inputs["TILE_WORDS"], self.scalars["n_words"], tiles.shape[1]
            if n_words:
                words = torch.empty(2, n_words, n_tiles, dtype=torch.int32, device=self.q.device)
                values = dict(TILES=tiles, TILE_WORDS=words, n_tiles=n_tiles, BLOCK=WORD_ROWS, BLOCK_W=WORD_BLOCK)
                grid = (n_tiles, -(-n_words // WORD_BLOCK), 1)
                self.launches.append(self.launch(tile_words_kernel, grid, Tile(0, 0, 4, 1), **values))
            self._tiles[tile.block_m] = tiles, ranges, words
        return tile, *self._tiles[tile.block_m]

    def lane_grid(self, block: int) -> tuple[int, int, int]:
        return -(-self.lanes // block), self.Hk, 1

    def may_skip(self, tile: Tile) -> bool:
        """Whether `prefix_kernel` looks for tiles that see none of its keys: rows so few that each leaves out much, so
        long that tiles hold one or two of them, and head dimensions of one piece, which leaves registers for it."""
        alone = self.row_lanes >= 2 * tile.block_m and self.rows.count <= FEW_ROWS
        return self.flags["MASKED"] and alone and self.flags["D1"] == self.flags["VD1"] == 0

    def own_block(self, tile: Tile) -> int:
        wide = self.row_keys >= config.ROW_KEYS_FOR_WIDE_BLOCKS and self.widest <= config.LARGEST_D_OF_WIDE_BLOCKS
        return tile.block_n if wide else min(tile.block_n, 32)

    def key_splits(self, tile: Tile, tiles: Tensor) -> int:
        blocks = -(-self.P // tile.block_n)
        return config.split_count(tiles.shape[1] * self.Hk, blocks, KEY_BLOCKS_PER_SPLIT, tile, self.target)

    def launch(self, kernel, grid: tuple[int, int, int], tile: Tile, **values) -> Launch:
        """A launch with the values that the kernel's parameters ask for, by name."""
        known = {**self.inputs, **self.scalars, **self.flags, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        known |= values
        constexprs = {p.name for p in kernel.params if p.is_constexpr} if hasattr(kernel, "params") else None
        if constexprs is None:  # an interpreted kernel keeps its Python function alone
            constexprs = {n for n, a in kernel.fn.__annotations__.items() if "constexpr" in str(a)}
        args = {name: known[name] for name in kernel.arg_names if name not in constexprs}
        fixed = {name: known[name] for name in kernel.arg_names if name in constexprs}
        return Launch(kernel, grid, args, fixed, tile.num_warps, tile.num_stages)


def tf32_allowed() -> bool:
    """Whether the user allows TF32 in fp32 matrix products. torch 2.9 has two settings for it, and the old one must not
    be read after the new one was written."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def seed_words(problem: Problem) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """The low and the high half of the seed, int32; where they lie if the seed is in memory."""
    if problem.seed_in_memory is not None:
        low, high = problem.seed_in_memory.view(torch.int32).split(1)
        return low, high
    return signed(problem.seed & 0xFFFFFFFF), signed((problem.seed >> 32) & 0xFFFFFFFF)


def signed(word: int) -> int:
    """The int32 of the same bits: an argument whose type does not depend on its value."""
    return word - 2**32 if word >= 2**31 else word


def strides(name: str, x: Tensor, letters: str) -> dict[str, int]:
    return {f"{name}_{letter}": x.stride(i) for i, letter in enumerate(letters)}


def empty_rows(x: Tensor, D: int, zero: bool) -> Tensor:
    """`[B, H, S, D]`, as x `[B, H, S, ..]`, in memory order B, S, H, D: what the layers around attention read and
    write."""
    B, H, S, _ = x.shape
    return (x.new_zeros if zero else x.new_empty)(B, S, H, D).transpose(1, 2)


def may_have_idle_tokens(problem: Problem) -> bool:
    """Whether tokens may belong to no row: padding, or tokens after the last packed row. No kernel writes there."""
    return problem.seq_lens is not None or problem.cu_seqlens is not None


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_bias: Tensor | None, problem: Problem,
    target: Target = config.A100,
) -> Plan:  # fmt: skip
    """out `[B, H, S, Dv]` in q's type and lse fp32 `[B, H, S]`, and the launches that compute them.

    Shapes as in `ops.py`. The last dimension of the tensors must be contiguous.
    """
    call = Call(q, k, v, prefix_k, prefix_v, prefix_bias, problem, target)
    idle = may_have_idle_tokens(problem)
    out = empty_rows(q, call.Dv, idle)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if idle:
        lse.fill_(-math.inf)
    if call.empty:
        return Plan((out, lse), [])
    tile, tiles, _, words = call.tile("forward")
    splits = call.key_splits(tile, tiles)
    part = q.new_empty(splits * call.Hk * call.lanes * call.Dv if splits > 1 else 1, dtype=torch.float32)
    stats = q.new_empty(2 * splits * call.Hk * call.lanes if splits > 1 else 1, dtype=torch.float32)
    values = dict(
        TILES=tiles, TILE_WORDS=words, OUT=out, LSE=lse, PART=part, STATS=stats, n_tiles=tiles.shape[1], SPLITS=splits,
        OWN_N=call.own_block(tile), **strides("out", out, "bht"), **strides("lse", lse, "bh"),
    )  # fmt: skip
    launches = [call.launch(forward_kernel, (tiles.shape[1], call.Hk, splits), tile, **values)]
    if splits > 1:
        launches.append(call.launch(merge_kernel, call.lane_grid(MERGE_BLOCK), Tile(MERGE_BLOCK, 0, 4, 1), **values))
    return Plan((out, lse), call.launches + launches)


def plan_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    prefix_bias: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], problem: Problem,
    target: Target = config.A100,
) -> Plan:  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v, prefix_bias in their types, and the launches that compute them.

    One that `needs` does not ask for has zero elements.
    """
    check_gradients(q, v, dout, dlse, out, lse, prefix_bias, needs)
    call = Call(q, k, v, prefix_k, prefix_v, prefix_bias, problem, target)
    idle = may_have_idle_tokens(problem)
    dq, dk, dv = (
        empty_rows(x, x.shape[3], idle or call.empty) if need else x.new_empty(0)
        for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    dprefix_k, dprefix_v, dbias = (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        if need and call.empty
        else x.new_empty(x.shape if need else 0)
        for x, need in zip((prefix_k, prefix_v, q if prefix_bias is None else prefix_bias), needs[3:], strict=True)
    )
    outputs = (dq, dk, dv, dprefix_k, dprefix_v, dbias)
    if call.empty:
        return Plan(outputs, [])
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.float()
    state = q.new_empty(3, call.Hk, call.lanes, dtype=torch.float32)
    call.inputs |= {"DOUT": dout, "OUT": out, "LSE": lse, "DLSE": lse if dlse is None else dlse, "STATE": state}
    call.scalars |= strides("dout", dout, "bht") | strides("out", out, "bht") | strides("lse", lse, "bh")
    call.scalars |= strides("dlse", lse if dlse is None else dlse, "bht")
    delta = Tile(DELTA_BLOCK, 0, 4, 1)
    launches = [call.launch(delta_kernel, call.lane_grid(DELTA_BLOCK), delta, HAS_DLSE=dlse is not None)]
    if needs[0]:
        launches += _launch_dq(call, dq)
    if needs[1] or needs[2]:
        launches += _launch_own(call, dk, dv, needs)
    if any(needs[3:]) and call.P and call.G:
        launches += _launch_prefix(call, dprefix_k, dprefix_v, dbias, needs)
    return Plan(outputs, call.launches + launches)


def _launch_dq(call: Call, dq: Tensor) -> list[Launch]:
    tile, tiles, _, words = call.tile("dq")
    splits = call.key_splits(tile, tiles)
    part = dq.new_empty(splits * call.Hk * call.lanes * call.D if splits > 1 else 1, dtype=torch.float32)
    values = dict(
        TILES=tiles, TILE_WORDS=words, DQ=dq, PART=part, n_tiles=tiles.shape[1], SPLITS=splits,
        OWN_N=min(tile.block_n, 32), **strides("dq", dq, "bht"),
    )  # fmt: skip
    launches = [call.launch(dq_kernel, (tiles.shape[1], call.Hk, splits), tile, **values)]
    if splits > 1:
        launches.append(call.launch(dq_sum_kernel, call.lane_grid(MERGE_BLOCK), Tile(MERGE_BLOCK, 0, 4, 1), **values))
    return launches


def _launch_own(call: Call, dk: Tensor, dv: Tensor, needs: list[bool]) -> list[Launch]:
    tile = call.config.own
    own = call.tables.own_blocks(tile.block_n)
    if own.shape[1] == 0:
        return []
    values = dict(OWN=own, DK=dk, DV=dv, n_own=own.shape[1], NEED_K=needs[1], NEED_V=needs[2])
    for name, x, like in (("dk", dk, call.k), ("dv", dv, call.v)):
        values |= strides(name, x if x.dim() == 4 else like, "bht")
    return [call.launch(own_kernel, (own.shape[1], call.Hk, 1), tile, **values)]


def _launch_prefix(call: Call, dk: Tensor, dv: Tensor, dbias: Tensor, needs: list[bool]) -> list[Launch]:
    tile, tiles, ranges, words = call.tile("prefix")
    blocks = -(-call.P // tile.block_n)
    programs = blocks * call.Hk * call.G
    splits = config.split_count(programs, tiles.shape[1] // call.G, TILES_PER_SPLIT, tile, call.target)
    heads = 0
    if needs[5]:
        heads = 1 if dbias.shape[1] == 1 else call.group

    def buffer(grad: Tensor, per_head: int, size: int) -> Tensor:
        return grad.new_empty(splits, call.G, call.Hk * per_head, size, dtype=torch.float32)

    grads = [(dk, call.P * call.D, needs[3]), (dv, call.P * call.Dv, needs[4])]
    parts = [buffer(x, 1, size) if need and splits > 1 else x for x, size, need in grads]
    part_bias = buffer(dbias, heads, call.P) if heads else dbias
    values = dict(
        TILES=tiles, RANGES=ranges, TILE_WORDS=words, DK=parts[0], DV=parts[1], DBIAS=part_bias, n_tiles=tiles.shape[1],
        SPLITS=splits, NEED_K=needs[3], NEED_V=needs[4], BIAS_HEADS=heads,
        SKIP=call.may_skip(tile),
        BIAS_WIDTH=1 << max(heads - 1, 0).bit_length(),
    )  # fmt: skip
    launches = [call.launch(prefix_kernel, (blocks, call.Hk, call.G * splits), tile, **values)]
    sums = [(p, x, 1, size) for p, (x, size, need) in zip(parts, grads, strict=True) if need and splits > 1]
    if heads:
        sums.append((part_bias, dbias, heads, call.P))
    for part, total, per_head, width in sums:
        n_heads = call.Hk * per_head
        shared_prefix, shared_head = total.shape[0] == 1 and call.G > 1, total.shape[1] == 1 and n_heads > 1
        grid = (-(-width // SUM_BLOCK), 1 if shared_head else n_heads, 1 if shared_prefix else call.G)
        values = dict(
            PART=part, SUM=total, n_splits=splits, n_heads=n_heads, size=width, SUM_PREFIXES=shared_prefix,
            SUM_HEADS=shared_head, BLOCK=SUM_BLOCK,
        )  # fmt: skip
        launches.append(call.launch(sum_kernel, grid, Tile(0, 0, 4, 1), **values))
    return launches
