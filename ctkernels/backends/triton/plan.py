"""A call's launches with its tensors, in order: of the set-up that layers share, of the forward and the backward pass.

What `passes.py` decides is looked up; the tensors are put in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctkernels.backends.check import check_gradients, expect
from ctkernels.backends.triton import config, passes, tables
from ctkernels.backends.triton.call import Call, call_of, looks_of, signed
from ctkernels.backends.triton.config import Target
from ctkernels.backends.triton.launch import Launch, Plan
from ctkernels.backends.triton.passes import SetUp
from ctkernels.problem import Prepared, Problem

NOTHING = Prepared()


def plan_tables(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_bias: Tensor | None, problem: Problem,
    backward: bool, target: Target = config.A100,
) -> Plan:  # fmt: skip
    """The tables of one direction in one int32 tensor, and the launches that apply the mask. The index tables in it are
    made at once, by torch."""
    call = call_of(q, k, v, prefix_k, prefix_v, prefix_bias, problem, target)
    set_up = _set_up(call, backward)
    made = torch.empty(set_up.size, dtype=torch.int32, device=q.device)
    if call.empty:
        return Plan((made,), [])
    views = set_up.views(made)
    rows = tables.build_rows(q, k, call.G, call.P, problem)
    views["ROWS"].copy_(rows.table)
    views["SLOTS"].copy_(rows.slots)
    for block_m in set_up.block_ms:
        tiles, ranges = tables.build_tiles(rows, call.group, block_m)
        views[f"TILES {block_m}"].copy_(tiles)
        if block_m == set_up.prefix_m:
            views["RANGES"].copy_(ranges)
    if backward:
        views["OWN"].copy_(tables.build_own_blocks(rows, set_up.own_n))
    tensors = {**views, **_mask_tensors(problem, views["ROWS"])}
    return Plan((made,), [template.fill(tensors) for template in set_up.launches])


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_bias: Tensor | None, problem: Problem,
    target: Target = config.A100, prepared: Prepared = NOTHING,
) -> Plan:  # fmt: skip
    """out `[B, H, S, Dv]` in q's type and lse fp32 `[B, H, S]`, and the launches that compute them.

    Shapes as in `ops.py`. The last dimension of the tensors must be contiguous.
    """
    inputs = (q, k, v, *_prefixes(prefix_k, prefix_v, prepared), _readable(prefix_bias), problem)
    call = call_of(*inputs, target)
    out, lse = empty_rows(q, call.Dv), q.new_empty(q.shape[:3], dtype=torch.float32)
    if call.empty:
        return Plan((out.zero_(), lse.fill_(-math.inf)), [])
    launches, tensors = _begin(call, inputs, prepared.forward_tables, False)
    which = call.once("forward", lambda: passes.forward(call))
    tensors |= {"OUT": out, "LSE": lse, "PART": lse, "STATS": lse, **_scratch(which, q)}
    return Plan((out, lse), launches + [template.fill(tensors) for template in which.launches])


def plan_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    prefix_bias: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], problem: Problem,
    target: Target = config.A100, prepared: Prepared = NOTHING,
) -> Plan:  # fmt: skip
    """Gradients of q, k, v, prefix_k, prefix_v, prefix_bias in their types, and the launches that compute them.

    One that `needs` does not ask for has zero elements.
    """
    inputs = (q, k, v, *_prefixes(prefix_k, prefix_v, prepared), _readable(prefix_bias), problem)
    call = call_of(*inputs, target)
    dout, lse = dout if dout.stride(-1) == 1 else dout.contiguous(), lse.contiguous()

    def decide() -> passes.Pass:
        check_gradients(q, v, dout, dlse, out, lse, prefix_bias, needs)
        return passes.backward(call, dout, dlse, out, lse, needs)

    which = call.once(("backward", *needs, looks_of(dout, dlse, out, lse)), decide)
    rows = [empty_rows(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs[:3], strict=True)]
    shared = [
        x.new_empty(x.shape if need else 0)
        for x, need in zip((prefix_k, prefix_v, q if prefix_bias is None else prefix_bias), needs[3:], strict=True)
    ]
    outputs = (*rows, *shared)
    if call.empty:
        return Plan(tuple(x.zero_() for x in outputs), [])
    launches, tensors = _begin(call, inputs, prepared.backward_tables, True)
    tensors |= {"DOUT": dout, "OUT": out, "LSE": lse, "DLSE": lse if dlse is None else dlse}
    tensors |= zip(("DQ", "DK", "DV", "DPREFIX_K", "DPREFIX_V", "DBIAS"), outputs, strict=True)
    tensors |= dict.fromkeys(("PART_Q", "PART_K", "PART_V", "PART_BIAS"), lse) | _scratch(which, q)
    return Plan(outputs, launches + [template.fill(tensors) for template in which.launches])


def empty_rows(x: Tensor, D: int) -> Tensor:
    """`[B, H, S, D]` for x `[B, H, S, ..]`, in memory order B, S, H, D."""
    B, H, S, _ = x.shape
    return x.new_empty(B, S, H, D).transpose(1, 2)


def _set_up(call: Call, backward: bool) -> SetUp:
    return call.once(("set-up", backward), lambda: SetUp(call, backward))


def _prefixes(prefix_k: Tensor, prefix_v: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The prefixes that kernels read: in the rows' type, if a step has prepared them."""
    if prepared.prefix_k is None or prepared.prefix_v is None:
        return prefix_k, prefix_v
    fits = prepared.prefix_k.shape == prefix_k.shape and prepared.prefix_v.shape == prefix_v.shape
    expect(fits, f"prepared prefixes must be {tuple(prefix_k.shape)}, got {tuple(prepared.prefix_k.shape)}")
    return prepared.prefix_k, prepared.prefix_v


def _readable(bias: Tensor | None) -> Tensor | None:
    """With keys side by side, as kernels read it."""
    return bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()


def _begin(
    call: Call, inputs: tuple[Any, ...], made: Tensor | None, backward: bool
) -> tuple[list[Launch], dict[str, Any]]:
    """What comes before the kernels of a pass, and tensors by the names of their parameters.

    made: the tables of this direction, if they are there already.
    """
    q, k, v, prefix_k, prefix_v, bias, problem = inputs
    set_up, launches = _set_up(call, backward), []
    if made is None:
        plan = plan_tables(*inputs, backward, call.target)
        (made,), launches = plan.outputs, plan.launches
    fits = made.numel() == set_up.size and made.dtype == torch.int32 and made.device == q.device
    expect(fits, f"prepared tables must be int32 [{set_up.size}] on {q.device}, got {made.dtype} {tuple(made.shape)}")
    tensors = set_up.views(made)
    rows = tensors["ROWS"]
    slopes = problem.alibi_slopes
    tensors |= _mask_tensors(problem, rows)
    tensors |= {
        "Q": q, "K": k, "V": v, "PREFIX_K": prefix_k, "PREFIX_V": prefix_v,
        "SLOPES": rows if slopes is None else slopes.float().contiguous(),
        "BIAS": bias if call.values["HAS_BIAS"] else rows,
    }  # fmt: skip
    if call.rounds:
        rounded_k, rounded_v = (q.new_empty(x.shape) for x in (prefix_k, prefix_v))
        tensors |= {"ROUNDED_K": rounded_k, "ROUNDED_V": rounded_v}
        launches.append(call.once("rounding", lambda: passes.rounding(call)).fill(tensors))
        tensors |= {"PREFIX_K": rounded_k, "PREFIX_V": rounded_v}
    return launches, tensors


def _mask_tensors(problem: Problem, absent: Tensor) -> dict[str, Any]:
    """The explicit pattern (`absent`: one that is not there is never read), and the halves of the seed: int32, or where
    they lie if the seed is in memory."""
    keep, seed = problem.keep, problem.seed_in_memory
    if seed is not None:
        low, high = seed.view(torch.int32).split(1)
    else:
        low, high = signed(problem.seed & 0xFFFFFFFF), signed((problem.seed >> 32) & 0xFFFFFFFF)
    pattern = absent if keep is None else keep.contiguous().view(torch.uint8)
    return {"KEEP": pattern, "seed_low": low, "seed_high": high}


def _scratch(which: passes.Pass, q: Tensor) -> dict[str, Tensor]:
    return {name: q.new_empty(size, dtype=torch.float32) for name, size in which.scratch.items()}
