"""What is decided once for all calls of the same sizes, strides, types and rules. The layers of a model, and its steps,
make the same call again and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ctkernels.backends.check import check
from ctkernels.backends.triton import config, tables
from ctkernels.backends.triton.config import Target, Tile
from ctkernels.problem import PROBLEM_TENSORS, Problem, row_count

T = TypeVar("T")
LOG2E = math.log2(math.e)
# an own range of keys must be long enough to be worth its fp32 partial results, which cost 8 bytes a lane and dimension
KEY_BLOCKS_PER_SPLIT = 4
FEW_ROWS = 8
MOST = 256

_known: dict[tuple, Call] = {}


def call_of(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None, problem: Problem,
    target: Target,
) -> Call:  # fmt: skip
    """What was decided for such a call before, or is now.

    Raises:
        ValueError: the inputs do not fit together.
    """
    rules = problem._replace(seed=0)[PROBLEM_TENSORS:]
    looks = looks_of(q, k, v, prefix_k, prefix_v, bias, *problem[:PROBLEM_TENSORS])
    key = looks, rules, target, tf32_allowed()
    call = _known.get(key)
    if call is None:
        if len(_known) >= MOST:
            _known.clear()
        call = _known[key] = Call(q, k, v, prefix_k, prefix_v, bias, problem, target)
    return call


def looks_of(*optional: Tensor | None) -> tuple:
    """All of some tensors but what they hold and where."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in optional])


def tf32_allowed() -> bool:
    """Whether the user allows TF32 in fp32 matrix products. torch 2.9 has two settings for it, and the old one must not
    be read after the new one was written."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def signed(word: int) -> int:
    """The int32 of the same bits: an argument whose type does not depend on its value."""
    return word - 2**32 if word >= 2**31 else word


def strides(name: str, stride: tuple[int, ...], letters: str) -> dict[str, int]:
    return {f"{name}_{letter}": stride[i] for i, letter in enumerate(letters)}


class Call:
    """Sizes, scalars and flags, the latter two in the kernels' names. It holds no tensor."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, bias: Tensor | None,
        problem: Problem, target: Target,
    ) -> None:  # fmt: skip
        check(q, k, v, prefix_k, prefix_v, bias, problem)
        _, self.H, self.S, self.D = q.shape
        _, self.Hk, self.T, self.Dv = v.shape
        self.widest = max(self.D, self.Dv)
        self.G, self.P = prefix_k.shape[0], prefix_k.shape[2]
        self.group, self.target = self.H // self.Hk, target
        self.config = config.config_for(target, self.widest, q.dtype)
        self.rows, self.packed = row_count(q, problem), problem.cu_seqlens is not None
        self.slots = self.S if self.packed else self.rows * self.S
        self.lanes = self.slots * self.group
        self.empty = self.lanes == 0 or self.rows == 0
        self.rounds = prefix_k.dtype != q.dtype and self.P > 0 and self.G > 0
        has_bias = bias is not None and bias.numel() > 0
        C = min(problem.context_length, tables.INT32_MAX)
        drop_below = math.floor(problem.drop_p * 2**32)
        softcap, scale = problem.softcap, problem.scale
        hidden, dropped, kept = problem.hidden is not None, drop_below > 0, problem.keep is not None and C > 0
        masked = hidden or dropped or kept
        # even, so that a block of 64 keys may read two
        self.n_words = 2 * -(-self.P // 64) if masked and self.G else 0
        pk, pv = prefix_k.stride(), prefix_v.stride()
        self.given_prefix = strides("pk", pk, "ght") | strides("pv", pv, "ght")
        if self.rounds:  # later launches read the rounded one
            pk, pv = ((self.Hk * self.P * D, self.P * D, D) for D in (self.D, self.Dv))
        self.values: dict[str, Any] = {
            "n_rows": self.rows, "n_slots": self.slots, "n_prefixes": self.G, "n_kv": self.Hk, "P": self.P, "length": C,
            "n_words": self.n_words, "drop_below": signed(drop_below), "scale": scale,
            "factor": scale / softcap if softcap else scale * LOG2E, "cap": softcap * LOG2E,
            "window": min(problem.window, self.P + self.T + 1),  # no key is farther away, and sums stay small
            "bias_g": bias.stride(0) if has_bias and bias.shape[0] > 1 else 0,
            "bias_h": bias.stride(1) if has_bias and bias.shape[1] > 1 else 0,
            **strides("q", q.stride(), "bht"), **strides("k", k.stride(), "bht"), **strides("v", v.stride(), "bht"),
            **strides("pk", pk, "ght"), **strides("pv", pv, "ght"),
        }  # fmt: skip
        (D0, D1), (VD0, VD1) = config.pieces(self.D), config.pieces(self.Dv)
        exact = q.dtype != torch.float32 or not tf32_allowed()
        self.values |= {
            "GROUP": self.group, "D": self.D, "D0": D0, "D1": D1, "W1": max(D1, 1),
            "VD": self.Dv, "VD0": VD0, "VD1": VD1, "VW1": max(VD1, 1), "MASKED": masked, "DROP": dropped,
            "KEPT": kept, "OWN_CONTEXT": C > self.P and masked, "CAUSAL": problem.causal,
            "WINDOW": problem.window > 0, "WINDOW_PREFIX": problem.window_prefix, "SOFTCAP": softcap > 0,
            "HAS_BIAS": has_bias, "ALIBI": problem.alibi_slopes is not None,
            "PLAIN": not softcap and not has_bias and problem.alibi_slopes is None and scale > 0,
            "PRECISION": "ieee" if exact else "tf32", "IDLE": tables.may_have_idle_tokens(problem),
            "PADDED": problem.seq_lens is not None,
        }  # fmt: skip
        self.bias_shape = (1, 1, 0) if bias is None else bias.shape
        self._made: dict[Hashable, Any] = {}

    @property
    def row_lanes(self) -> int:
        """Lanes of an average row."""
        return max(1, self.lanes // max(self.rows, 1))

    @property
    def row_keys(self) -> int:
        """Own keys of an average row."""
        return self.T // max(self.rows, 1) if self.packed else self.T

    def tile(self, kernel: str) -> Tile:
        """The tile for "forward", "dq" or "prefix"."""
        tile, most, values = getattr(self.config, kernel), self.lanes, self.values
        near = values["WINDOW"] and values["WINDOW_PREFIX"]
        branch = not (values["DROP"] or values["KEPT"])  # full tiles are told from others
        options = near or not values["PLAIN"]
        if options or (branch and kernel != "forward") or (kernel == "prefix" and self.may_skip(tile)):
            tile = config.lighter(tile, kernel, self.widest)
        if kernel != "prefix":  # tiles walk the own keys of their rows, too, one row after another
            # all lanes wait while one row's keys are walked: limit the others' part to half of the useful work
            most = min(most, self.row_lanes + self.row_lanes * (self.P + self.row_keys) // (2 * max(self.row_keys, 1)))
        return config.fit(tile, most)

    def may_skip(self, tile: Tile) -> bool:
        """Whether `prefix_kernel` looks for tiles that see none of its keys: rows so few that each leaves out much, so
        long that tiles hold one or two of them, and head dimensions of one piece, which leaves registers for it."""
        alone = self.row_lanes >= 2 * tile.block_m and self.rows <= FEW_ROWS
        return self.values["MASKED"] and alone and self.values["D1"] == self.values["VD1"] == 0

    def tiles(self, block_m: int) -> int:
        return tables.tile_bound(self.slots, self.group, self.G, block_m)

    def key_splits(self, tile: Tile) -> int:
        blocks = -(-self.P // tile.block_n)
        return config.split_count(self.tiles(tile.block_m) * self.Hk, blocks, KEY_BLOCKS_PER_SPLIT, tile, self.target)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes of the call, made when first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
