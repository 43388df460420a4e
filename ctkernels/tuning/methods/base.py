"""What a method is: a few answers that the one loop in `trainer.py` and the one evaluation in `evaluate.py` ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from ctkernels.mask import ContextMask
from ctkernels.tuning.batches import Batch
from ctkernels.tuning.settings import TrainSettings

# (settings, segments [K+1], batch, dropout seed of this step) -> what each row of the batch sees of the context
MaskRule = Callable[[TrainSettings, Tensor, Batch, int], ContextMask | None]


def sees_all(settings: TrainSettings, segments: Tensor, batch: Batch, seed: int) -> None:
    """Every row sees the whole context."""
    return None


@dataclass(frozen=True)
class Method:
    """A row of the method table.

    Args:
        name: as users write it.
        summary: one line for help texts.
        trains: "prefix" if its keys and values are optimised, "nothing" otherwise.
        starts_from: "context": the KV of the demonstrations after one forward pass; "nothing": no prefix at all.
        mask: what a training row sees of the context.
        defaults: the method's own values of `TrainSettings` fields.
    """

    name: str
    summary: str
    trains: Literal["nothing", "prefix"]
    starts_from: Literal["nothing", "context"]
    mask: MaskRule = sees_all
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def settings(self, **overrides: Any) -> TrainSettings:
        """The method's default settings with some of them replaced."""
        return TrainSettings(**{**self.defaults, **overrides})
