"""Progress of a running sweep: a live table on a terminal, otherwise one line per finished cell."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ctkernels.tuning.evaluation.sweep.cells import Cell, CellResult, read_cell
from ctkernels.tuning.evaluation.sweep.run import Sweep
from ctkernels.tuning.evaluation.sweep.workers import Workers


class SweepView:
    """Progress of a sweep, shown by the first process for all processes; a context manager and an `Observer`."""

    def __init__(self, sweep: Sweep, workers: Workers) -> None:
        self.sweep, self.workers = sweep, workers
        self.cells = sweep.cells()
        self.done: dict[Cell, CellResult] = {}
        self.now: Cell | None = None
        self._look_for_results()
        self.console = Console(stderr=True)
        live = sys.stderr.isatty() and workers.rank == 0
        self.live = Live(self.table(), console=self.console, refresh_per_second=2) if live else None
        if workers.rank == 0 and self.done:
            self.console.print(f"{len(self.done)} of {len(self.cells)} cells are there already", highlight=False)

    def __enter__(self) -> SweepView:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def started(self, cell: Cell) -> None:
        """Show the cell that runs."""
        self.now = cell
        self._show()

    def finished(self, cell: Cell, result: CellResult) -> None:
        """Show a result, and those of other processes."""
        self.done[cell] = result
        if self.live is None:
            self.console.print(one_line(cell, result), highlight=False, soft_wrap=True)
        self.refresh()

    def refresh(self) -> None:
        """Look for results of other processes."""
        if self.workers.rank == 0 and self.workers.size > 1:
            self._look_for_results()
        self._show()

    def table(self) -> Table:
        """A row per method: cells with a result and without, means so far."""
        caption = f"{len(self.done)} of {len(self.cells)} cells" + (f"; now {self.now}" if self.now else "")
        table = Table("method", "cells", "failed", "score", "gold loss", "s per cell", caption=caption)
        for spec in dict.fromkeys(cell.spec for cell in self.cells):
            mine = [cell for cell in self.cells if cell.spec == spec]
            results = [self.done[cell] for cell in mine if cell in self.done]
            good = [r for r in results if r.error is None]
            numbers = ("", "", "")
            if good:
                seconds = _mean([r.seconds + r.seconds_eval for r in good])
                score, loss = _mean([100 * r.score for r in good]), _mean([r.gold_loss for r in good])
                numbers = (f"{score:.1f}", f"{loss:.3f}", f"{seconds:.1f}")
            failed = len(results) - len(good)
            table.add_row(str(spec), f"{len(good)}/{len(mine)}", str(failed) if failed else "", *numbers)
        return table

    def _look_for_results(self) -> None:
        for cell in self.cells:
            if cell not in self.done:
                result = read_cell(cell.path(self.sweep.out))
                # an error is from an earlier attempt, which will be repeated, or its own process reports it
                if result is not None and result.error is None:
                    self.done[cell] = result

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(self.table())


def one_line(cell: Cell, result: CellResult) -> str:
    """The result of a cell in one line."""
    if result.error is not None:
        return f"{cell}: no result: {result.error}"
    metric = result.metric.replace("_", " ")
    after = "" if result.calibrated is None else f" (calibrated {100 * result.calibrated['score']:.1f})"
    numbers = f"{metric} {100 * result.score:.1f}{after}, gold loss {result.gold_loss:.3f}"
    return f"{cell}: {numbers}, {result.seconds:.1f} s + {result.seconds_eval:.1f} s"


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)
