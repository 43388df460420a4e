"""Progress over epochs: a bar on a terminal, lines elsewhere, and a file with a line for each."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ctkernels.tuning.storage import atomic_write_bytes

if TYPE_CHECKING:
    from torch import nn

    from ctkernels.tuning.train.options import Options
    from ctkernels.tuning.train.trainer import EpochRecord

    Show = Callable[[EpochRecord, nn.Module], None]

EVERY = 5.0  # seconds between lines in a log


class EpochLog:
    """The file `history.jsonl` of a run: a line of JSON for each epoch, written when it ends.

    A resumed run first drops the lines of the epochs after its checkpoint, which it runs again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = False
        self._count = 0

    def add(self, record: EpochRecord) -> int:
        """Write the line of an epoch. Returns its number, from 1. Raises OSError."""
        line = json.dumps(asdict(record)) + "\n"
        if not self._started:
            self._started = True
            kept = [one for one in self._lines() if (one["stage"], one["epoch"]) != (record.stage, record.epoch)]
            before = kept[: next((i for i, one in enumerate(kept) if _comes_later(one, record)), len(kept))]
            atomic_write_bytes(self.path, "".join(json.dumps(one) + "\n" for one in before).encode())
            self._count = len(before)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._count += 1
        return self._count

    def _lines(self) -> list[dict]:
        """What is there, without a last line that was cut off."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _comes_later(line: dict, record: EpochRecord) -> bool:
    """Whether a line is of an epoch that comes after a record's; the stage "" is the last one of a run."""
    if line["stage"] == record.stage:
        return line["epoch"] > record.epoch
    return not line["stage"]


@contextlib.contextmanager
def epoch_bar(settings: Options, enabled: bool | None = None) -> Iterator[Show]:
    """Yield an `on_epoch` callback that shows progress on stderr: as a bar on a terminal, elsewhere as a line for the
    first and the last epoch and one every 5 seconds. `enabled=False` shows nothing."""
    epochs = getattr(settings, "epochs", 0)  # a method that trains nothing has none
    if getattr(settings, "steps", None) is not None:
        epochs = None  # as many as the steps need, which depends on the number of rows
    if enabled is False:
        yield lambda record, module: None
    elif not (sys.stderr.isatty() or enabled):
        yield _lines(epochs)
    else:
        with _bar(epochs) as show:
            yield show


def _lines(epochs: int | None) -> Show:
    shown = [0.0]

    def on_epoch(record: EpochRecord, module: nn.Module) -> None:
        of = f"/{epochs}" if epochs and not record.stage else ""
        last = record.stopped or (bool(of) and record.epoch == epochs)
        if record.epoch > 1 and not last and time.monotonic() - shown[0] < EVERY:
            return
        shown[0] = time.monotonic()
        name = record.stage or "tuning"
        print(
            f"{name} epoch {record.epoch}{of}: loss {record.loss:.4f}{_held_out(record)}", file=sys.stderr, flush=True
        )

    return on_epoch


@contextlib.contextmanager
def _bar(epochs: int | None) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tuning", total=epochs, loss="-")

        def on_epoch(record: EpochRecord, module: nn.Module) -> None:
            # a stage before the last one has epochs of its own number
            shown = {"description": record.stage or "tuning", "total": None if record.stage else epochs}
            progress.update(task, completed=record.epoch, loss=f"{record.loss:.4f}{_held_out(record)}", **shown)

        yield on_epoch


def _held_out(record: EpochRecord) -> str:
    return "" if record.held_out is None else f", held out {record.held_out:.4f}"
