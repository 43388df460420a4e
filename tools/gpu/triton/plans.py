"""Plans of a call's launches for a GPU that is not here."""

from __future__ import annotations

from torch import Tensor

from ctkernels.backends.triton.config import Target
from ctkernels.backends.triton.launch import Plan
from ctkernels.backends.triton.plan import plan_backward, plan_forward
from tools.gpu.architectures import Architecture
from tools.gpu.problems import Inputs

TILE_SIZES = ("BLOCK_M", "BLOCK_N", "OWN_N", "SPLITS")  # of the compile-time values, what the tuning decides


def target(architecture: Architecture) -> Target:
    return Target(architecture.name, architecture.multiprocessors)


def forward(inputs: Inputs, architecture: Architecture) -> Plan:
    return plan_forward(*inputs.forward, target(architecture))


def backward(inputs: Inputs, out: Tensor, lse: Tensor, architecture: Architecture, dlse: Tensor | None = None) -> Plan:
    """Gradients of everything."""
    needs = [True] * 5 + [inputs.prefix_bias is not None]
    *tensors, problem = inputs.forward
    return plan_backward(inputs.dout, dlse, *tensors, out, lse, needs, problem, target(architecture))


def both(inputs: Inputs, architecture: Architecture, with_backward: bool = True) -> dict[str, Plan]:
    """Phase -> plan."""
    plans = {"forward": forward(inputs, architecture)}
    if with_backward:
        plans["backward"] = backward(inputs, *plans["forward"].outputs, architecture)
    return plans
