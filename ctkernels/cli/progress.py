"""A progress bar over epochs, shown on a terminal alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ctkernels.tuning.train.options import Options
    from ctkernels.tuning.train.trainer import EpochRecord


@contextlib.contextmanager
def epoch_bar(settings: Options, enabled: bool | None = None) -> Iterator[Callable[[EpochRecord, nn.Module], None]]:
    """Yield an `on_epoch` callback that moves a bar on stderr; `enabled=None` shows it if stderr is a terminal."""
    epochs = getattr(settings, "epochs", 0)  # a method that trains nothing has none
    if getattr(settings, "steps", None) is not None:
        epochs = None  # as many as the steps need, which depends on the number of rows
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield lambda record, module: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}{task.fields[held_out]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tuning", total=epochs, loss="-", held_out="")

        def on_epoch(record: EpochRecord, module: nn.Module) -> None:
            # a stage before the last one has epochs of its own number
            shown = {"description": record.stage or "tuning", "total": None if record.stage else epochs}
            shown["held_out"] = "" if record.held_out is None else f", held out {record.held_out:.4f}"
            progress.update(task, completed=record.epoch, loss=f"{record.loss:.4f}", **shown)

        yield on_epoch
