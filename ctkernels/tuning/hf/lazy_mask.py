"""A mask that says in a few numbers what it hides, and becomes a tensor when anybody else wants one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ctkernels import ContextMask


class Rule:
    """Query i of S sees key j of T iff `j <= i + T - S`, j is less than `window` positions back, and j is no padding.

    padding: over the row's own T keys, or None.  window: positions, or None.  build: transformers' mask of the same
    rule; it takes `allow_is_causal_skip`, and may return None where that is true.
    """

    def __init__(
        self, S: int, T: int, padding: ContextMask | None, window: int | None, build: Callable[..., Tensor | None]
    ) -> None:
        self.S, self.T, self.padding, self.window, self._build = S, T, padding, window, build
        self.shown = False  # whether somebody else has had the mask as a tensor, and may have changed it

    @cached_property
    def stock(self) -> Tensor | None:
        """What transformers' own attention takes: its mask, or None where the causal rule alone says it all."""
        return self._build()

    @cached_property
    def tensor(self) -> Tensor:
        """The mask `[B, 1, S, T]`, in any case."""
        built = self._build(allow_is_causal_skip=False) if self.stock is None else self.stock
        assert built is not None
        return built


class LazyMask(Tensor):
    """Looks like the mask `[B, 1, S, T]` that transformers would build, which is built when an operation reads it. A
    model may slice, combine or change it like any other mask."""

    rule: Rule

    @staticmethod
    def __new__(cls, rule: Rule, batch: int, dtype: torch.dtype, device: torch.device) -> LazyMask:
        mask = Tensor._make_wrapper_subclass(cls, (batch, 1, rule.S, rule.T), dtype=dtype, device=device)
        mask.rule = rule
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # what a reentrant checkpoint does with its inputs
            mask = args[0]
            return LazyMask(mask.rule, mask.shape[0], mask.dtype, mask.device)
        return func(*tree_map_only(LazyMask, _shown, args), **tree_map_only(LazyMask, _shown, kwargs or {}))


def _shown(mask: LazyMask) -> Tensor:
    mask.rule.shown = True
    return mask.rule.tensor
