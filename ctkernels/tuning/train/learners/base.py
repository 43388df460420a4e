"""A learner: parameters, the rows they are trained on, and the loss of a batch of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.forward import row_losses
from ctkernels.tuning.objectives import Forward


class Learner(ABC):
    """What the loop in `trainer.py` trains.

    module: owns what is trained (those of its parameters that require a gradient) and is handed to callbacks.
    lead: soft prompt positions in front of each row.
    """

    module: nn.Module
    lead: int = 0

    @abstractmethod
    def rows(self, epoch: int) -> Sequence[Row]:
        """The rows of an epoch, of the same number in each."""

    @abstractmethod
    def attached(self, backend: str | None) -> AbstractContextManager[object]:
        """The block in which `forward` is called and run; the model is as it was after it."""

    @abstractmethod
    def forward(self, batch: Batch, seed: int | Tensor) -> Forward:
        """A batch of rows, ready to run, for an objective; `seed` decides what is drawn."""

    def losses(self, batch: Batch, seed: int | Tensor) -> Tensor:
        """Mean cross-entropy of each row's answer, fp32 (or fp64) `[B]`, in nats."""
        forward = self.forward(batch, seed)
        return row_losses(forward.model, forward.attachment, forward.batch, forward.prompt)

    def identity(self) -> object:
        """What the result depends on besides settings, model and rows: something with a faithful repr."""
        return None

    def penalty(self) -> Tensor | None:
        """A term of the loss that does not depend on rows, or None."""
        return None

    def before_training(self, rows: Iterable[Batch]) -> None:  # noqa: B027 (most learners have nothing to do)
        """Called once at the start, attached, with the rows of the first epoch, one batch each."""

    def before_step(self) -> None:  # noqa: B027
        """Called with the gradients of a step, before they are clipped."""

    def after_step(self) -> None:  # noqa: B027
        """Called after every optimiser step: projections belong here."""

    def state(self) -> dict[str, Tensor]:
        """What changes with every step besides parameters, by name: a checkpoint keeps it and restores it in place."""
        return {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}
