"""Triton kernels of the op, for every GPU that Triton reaches. Reading order: tables.py (who attends to what, on the
device) -> tile.py (mask rule, tile helpers) -> rounding.py, forward.py, backward.py, backward_prefix.py -> config.py
(tile sizes) -> plan.py (which kernels a call launches) -> launch.py."""

from ctkernels.triton_kernels.config import Target
from ctkernels.triton_kernels.launch import Launch, Plan, run
from ctkernels.triton_kernels.plan import plan_backward, plan_forward

__all__ = ["Launch", "Plan", "Target", "plan_backward", "plan_forward", "run"]
