"""Decoders that number tokens themselves and look their positions up in a table: BART and its relatives.

Their forward takes no position ids, but the module with the table does: it gets those of the rows behind the prefix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def own_table(base: PreTrainedModel) -> nn.Module | None:
    """The module that turns numbers of tokens into positions, if `base` takes no position ids and it does."""
    table = getattr(base, "embed_positions", None)
    if table is None or "position_ids" in inspect.signature(base.forward).parameters:
        return None
    return table if "position_ids" in inspect.signature(table.forward).parameters else None


def number(table: nn.Module, positions: Callable[[], Tensor | None]) -> tuple[RemovableHandle, RemovableHandle]:
    """Let `table` look up `positions()`, int64 `[B or 1, S]`, instead of what its model gives it."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        found = positions()
        return None if found is None else (args, {**kwargs, "position_ids": found.flatten()})

    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        found = positions()
        return output if found is None else output.reshape(*found.shape, output.shape[-1])

    return table.register_forward_pre_hook(before, with_kwargs=True), table.register_forward_hook(after)


@contextmanager
def numbered(base: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within the block a decoder with a table of its own looks up these positions; others are left alone."""
    table = own_table(base)
    handles = () if table is None else number(table, lambda: positions)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
