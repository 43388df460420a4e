"""Which kernels a call launches, on what: the forward and the backward pass as lists of `Launch`.

Sizes of grids and scratch follow from tensor shapes alone: no host sync, nothing that depends on data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctkernels.problem import Problem
from ctkernels.triton_kernels import config, tables
from ctkernels.triton_kernels.backward import delta_kernel, dq_kernel, dq_sum_kernel, own_kernel
from ctkernels.triton_kernels.backward_prefix import prefix_kernel, sum_kernel
from ctkernels.triton_kernels.check import check, check_gradients
from ctkernels.triton_kernels.config import Target, Tile
from ctkernels.triton_kernels.forward import forward_kernel, merge_kernel
from ctkernels.triton_kernels.launch import Launch, Plan

LOG2E = math.log2(math.e)
# an own range of keys must be long enough to be worth its fp32 partial results, which cost 8 bytes a lane and dimension
KEY_BLOCKS_PER_SPLIT = 4
TILES_PER_SPLIT = 8
SUM_BLOCK = 1024
DELTA_BLOCK = 64


class Call:
    """What the launches of one call share: sizes, tables, scalars and flags, in the kernels' names."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None,
        problem: Problem, target: Target,
    ) -> None:  # fmt: skip
        check(q, k, v, prefix_k, prefix_v, bias, problem)
        self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.problem = q, k, v, prefix_k, prefix_v, problem
        self.H, self.D, self.Hk = q.shape[1], q.shape[3], k.shape[1]
        self.G, self.P = prefix_k.shape[0], prefix_k.shape[2]
        self.group, self.target = self.H // self.Hk, target
        self.config = config.config_for(target, self.D, q.dtype)
        self.rows = tables.build_rows(q, k, self.G, self.P, problem)
        self.lanes = self.rows.slots_bound * self.group
        self._tiles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        table = self.rows.table
        self.bias = bias.detach().float().contiguous() if bias is not None and bias.numel() else None
        slopes = problem.alibi_slopes
        keep = problem.keep
        self.inputs = {
            "Q": q, "K": k, "V": v, "PREFIX_K": prefix_k, "PREFIX_V": prefix_v, "ROWS": table,
            "SLOTS": self.rows.slots,
            # absent tensors are never read
            "BIAS": table if self.bias is None else self.bias,
            "SLOPES": table if slopes is None else slopes.float().contiguous(),
            "KEEP": table if keep is None else keep.contiguous().view(torch.uint8),
        }  # fmt: skip
        C = min(problem.context_length, tables.INT32_MAX)
        drop_below = math.floor(problem.drop_p * 2**32)
        softcap, scale = problem.softcap, problem.scale
        self.scalars = {
            "n_rows": self.rows.count, "n_slots": self.rows.slots_bound, "n_prefixes": self.G, "P": self.P, "length": C,
            "drop_below": signed(drop_below), "seed_low": signed(problem.seed & 0xFFFFFFFF),
            "seed_high": signed((problem.seed >> 32) & 0xFFFFFFFF), "scale": scale,
            "factor": scale / softcap if softcap else scale * LOG2E, "cap": softcap * LOG2E,
            "window": min(problem.window, self.P + k.shape[2] + 1),  # no key is farther away, and sums stay small
        }  # fmt: skip
        for name, x in (("q", q), ("k", k), ("v", v), ("pk", prefix_k), ("pv", prefix_v)):
            self.scalars |= strides(name, x, "ght" if name[0] == "p" else "bht")
        self.scalars["bias_g"], self.scalars["bias_h"] = 0, 0
        if self.bias is not None:
            self.scalars["bias_g"] = self.bias.stride(0) if self.bias.shape[0] > 1 else 0
            self.scalars["bias_h"] = self.bias.stride(1) if self.bias.shape[1] > 1 else 0
        D0, D1 = config.pieces(self.D)
        hidden, dropped, kept = problem.hidden is not None, drop_below > 0, keep is not None and C > 0
        exact = q.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32
        self.flags = {
            "GROUP": self.group, "D": self.D, "D0": D0, "D1": D1, "W1": max(D1, 1), "HIDDEN": hidden, "DROP": dropped,
            "KEPT": kept, "OWN_CONTEXT": C > self.P and (hidden or dropped or kept), "CAUSAL": problem.causal,
            "WINDOW": problem.window > 0, "WINDOW_PREFIX": problem.window_prefix, "SOFTCAP": softcap > 0,
            "HAS_BIAS": self.bias is not None, "ALIBI": slopes is not None,
            "PRECISION": "ieee" if exact else "tf32",
        }  # fmt: skip

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

    def tile(self, tile: Tile, own_keys: bool = True) -> tuple[Tile, int, Tensor, Tensor]:
        """A configured tile fitted to the call, the rows it may span, and the tiles it makes.

        own_keys: whether tiles walk the own keys of their rows, too, one row after another.
        """
        most = self.lanes
        if own_keys:
            # all lanes wait while one row's keys are walked: limit the others' part to half of the useful work
            most = min(most, self.row_lanes + self.row_lanes * (self.P + self.row_keys) // (2 * max(self.row_keys, 1)))
        tile = config.fit(tile, most)
        limit = tables.rows_per_tile(self.rows, self.group, tile.block_m)
        key = (tile.block_m, limit)
        if key not in self._tiles:
            self._tiles[key] = tables.build_tiles(self.rows, self.group, *key)
        return tile, limit, *self._tiles[key]

    def own_block(self, tile: Tile) -> int:
        return tile.block_n if self.row_keys >= config.ROW_KEYS_FOR_WIDE_BLOCKS else min(tile.block_n, 32)

    def key_splits(self, tile: Tile, tiles: Tensor) -> int:
        blocks = -(-self.P // tile.block_n)
        return config.split_count(tiles.shape[1] * self.Hk, blocks, KEY_BLOCKS_PER_SPLIT, self.target)

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


def signed(word: int) -> int:
    """The int32 of the same bits: an argument whose type does not depend on its value."""
    return word - 2**32 if word >= 2**31 else word


def strides(name: str, x: Tensor, letters: str) -> dict[str, int]:
    return {f"{name}_{letter}": x.stride(i) for i, letter in enumerate(letters)}


def empty_rows(x: Tensor, zero: bool) -> Tensor:
    """`[B, H, S, D]` in memory order B, S, H, D: what the layers around attention read and write."""
    B, H, S, D = x.shape
    return (x.new_zeros if zero else x.new_empty)(B, S, H, D).transpose(1, 2)


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_bias: Tensor | None, problem: Problem,
    target: Target = config.A100,
) -> Plan:  # fmt: skip
    """out `[B, H, S, D]` in q's type and lse fp32 `[B, H, S]`, and the launches that compute them.

    Shapes as in `ops.py`. The last dimension of the tensors must be contiguous.
    """
    call = Call(q, k, v, prefix_k, prefix_v, prefix_bias, problem, target)
    padded = problem.seq_lens is not None
    out = empty_rows(q, padded)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if padded:
        lse.fill_(-math.inf)
    if call.empty:
        return Plan((out, lse), [])
    tile, limit, tiles, _ = call.tile(call.config.forward)
    splits = call.key_splits(tile, tiles)
    part = q.new_empty(splits * call.Hk * call.lanes * call.D if splits > 1 else 1, dtype=torch.float32)
    stats = q.new_empty(2 * splits * call.Hk * call.lanes if splits > 1 else 1, dtype=torch.float32)
    values = dict(
        TILES=tiles, OUT=out, LSE=lse, PART=part, STATS=stats, n_tiles=tiles.shape[1], LIMIT=limit, SPLITS=splits,
        OWN_N=call.own_block(tile), **strides("out", out, "bht"), **strides("lse", lse, "bh"),
    )  # fmt: skip
    launches = [call.launch(forward_kernel, (tiles.shape[1], call.Hk, splits), tile, **values)]
    if splits > 1:
        launches.append(call.launch(merge_kernel, (tiles.shape[1], call.Hk, 1), tile, **values))
    return Plan((out, lse), launches)


def plan_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    prefix_bias: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], problem: Problem,
    target: Target = config.A100,
) -> Plan:  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v, prefix_bias in their types, and the launches that compute them.

    One that `needs` does not ask for has zero elements.
    """
    check_gradients(q, dout, dlse, out, lse, prefix_bias, needs)
    call = Call(q, k, v, prefix_k, prefix_v, prefix_bias, problem, target)
    padded = problem.seq_lens is not None
    dq, dk, dv = (
        empty_rows(x, padded or call.empty) if need else x.new_empty(0)
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
    dlse = None if dlse is None else dlse.float()
    state = q.new_empty(3, call.Hk, call.lanes, dtype=torch.float32)
    call.inputs |= {"DOUT": dout, "OUT": out, "LSE": lse, "DLSE": lse if dlse is None else dlse, "STATE": state}
    call.scalars |= strides("dout", dout, "bht") | strides("out", out, "bht") | strides("lse", lse, "bh")
    call.scalars |= strides("dlse", lse if dlse is None else dlse, "bht")
    delta = Tile(DELTA_BLOCK, 0, 4, 1)
    grid = (-(-call.lanes // DELTA_BLOCK), call.Hk, 1)
    launches = [call.launch(delta_kernel, grid, delta, HAS_DLSE=dlse is not None)]
    if needs[0]:
        launches += _launch_dq(call, dq)
    if needs[1] or needs[2]:
        launches += _launch_own(call, dk, dv, needs)
    if any(needs[3:]) and call.P and call.G:
        launches += _launch_prefix(call, dprefix_k, dprefix_v, dbias, needs)
    return Plan(outputs, launches)


def _launch_dq(call: Call, dq: Tensor) -> list[Launch]:
    tile, limit, tiles, _ = call.tile(call.config.dq)
    splits = call.key_splits(tile, tiles)
    part = dq.new_empty(splits * call.Hk * call.lanes * call.D if splits > 1 else 1, dtype=torch.float32)
    values = dict(
        TILES=tiles, DQ=dq, PART=part, n_tiles=tiles.shape[1], LIMIT=limit, SPLITS=splits,
        OWN_N=call.own_block(tile), **strides("dq", dq, "bht"),
    )  # fmt: skip
    launches = [call.launch(dq_kernel, (tiles.shape[1], call.Hk, splits), tile, **values)]
    if splits > 1:
        launches.append(call.launch(dq_sum_kernel, (tiles.shape[1], call.Hk, 1), tile, **values))
    return launches


def _launch_own(call: Call, dk: Tensor, dv: Tensor, needs: list[bool]) -> list[Launch]:
    tile = call.config.own
    own = tables.build_own_blocks(call.rows, tile.block_n)
    if own.shape[1] == 0:
        return []
    values = dict(OWN=own, DK=dk, DV=dv, n_own=own.shape[1], NEED_K=needs[1], NEED_V=needs[2])
    for name, x, like in (("dk", dk, call.k), ("dv", dv, call.v)):
        values |= strides(name, x if x.dim() == 4 else like, "bht")
    return [call.launch(own_kernel, (own.shape[1], call.Hk, 1), tile, **values)]


def _launch_prefix(call: Call, dk: Tensor, dv: Tensor, dbias: Tensor, needs: list[bool]) -> list[Launch]:
    tile, limit, tiles, ranges = call.tile(call.config.prefix, own_keys=False)
    blocks = -(-call.P // tile.block_n)
    programs = blocks * call.Hk * call.G
    splits = config.split_count(programs, tiles.shape[1] // call.G, TILES_PER_SPLIT, call.target)
    heads = 0
    if needs[5]:
        heads = 1 if dbias.shape[1] == 1 else call.group

    def buffer(grad: Tensor, per_head: int, size: int) -> Tensor:
        return grad.new_empty(splits, call.G, call.Hk * per_head, size, dtype=torch.float32)

    size = call.P * call.D
    parts = [buffer(x, 1, size) if need and splits > 1 else x for x, need in zip((dk, dv), needs[3:5], strict=True)]
    part_bias = buffer(dbias, heads, call.P) if heads else dbias
    values = dict(
        TILES=tiles, RANGES=ranges, DK=parts[0], DV=parts[1], DBIAS=part_bias, n_tiles=tiles.shape[1], LIMIT=limit,
        SPLITS=splits, NEED_K=needs[3], NEED_V=needs[4], BIAS_HEADS=heads,
        SKIP=call.problem.hidden is not None and call.row_lanes >= 2 * tile.block_m,  # tiles of one or two rows
        BIAS_WIDTH=1 << max(heads - 1, 0).bit_length(),
    )  # fmt: skip
    launches = [call.launch(prefix_kernel, (blocks, call.Hk, call.G * splits), tile, **values)]
    sums = [(p, x, 1, size) for p, x, need in zip(parts, (dk, dv), needs[3:5], strict=True) if need and splits > 1]
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
