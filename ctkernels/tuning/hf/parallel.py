"""Models that are spread over processes.

With tensor parallelism each process runs some KV heads of every layer, and reads the same heads of the prefix:

    prefix [4, P, D]     heads 0 1 2 3   a parameter of every process, with the same values and gradient
    rank 0               heads 0 1       all that its layers read, in place
    rank 1               heads     2 3

No other process reads these heads, so their gradient is complete: backward gathers the heads of all processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def head_group(attention: nn.Module) -> ProcessGroup | None:
    """The processes that share an attention module's weights: those of a mesh's only dimension, or of its "tp"."""
    for parameter in attention.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            if mesh.ndim == 1:
                return mesh.get_group()
            return mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else None
    return None


def own_heads(x: Tensor, heads: int, group: ProcessGroup | None) -> Tensor:
    """The `heads` KV heads of x `[..., Hk, P, D]` that this process runs: a view `[..., heads, P, D]`.

    Raises:
        ValueError: the heads are not spread evenly over the processes.
    """
    if x.shape[-3] == heads:
        return x
    if group is None:
        raise ValueError(f"the prefix has {x.shape[-3]} KV heads and this layer {heads}")
    size = dist.get_world_size(group)
    if x.shape[-3] != heads * size:
        raise ValueError(
            f"the prefix has {x.shape[-3]} KV heads and this layer {heads} in each of {size} processes; tensor "
            "parallelism must spread KV heads evenly"
        )
    return _OwnHeads.apply(x, heads, group)


def all_heads(x: Tensor, heads: int, group: ProcessGroup | None) -> Tensor:
    """The `[own heads, P, D]` of all processes as one `[heads, P, D]`."""
    return x if x.shape[-3] == heads or group is None else _gather(x, group)


def reshard(model: nn.Module) -> None:
    """Put FSDP2's sharded weights back, if a forward pass has left gathered ones: `requires_grad` belongs to them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class _OwnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, heads: int, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.narrow(-3, dist.get_rank(group) * heads, heads)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.group), None, None


def _gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    own = x.movedim(-3, 0).contiguous()
    gathered = own.new_empty(len(own) * dist.get_world_size(group), *own.shape[1:])
    dist.all_gather_into_tensor(gathered, own, group=group)
    return gathered.movedim(0, -3)
