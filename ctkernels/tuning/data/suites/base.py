"""What a suite is: where its tasks are, and how a task becomes demonstrations, validation items and test items."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.metrics import Metric

Split = Literal["validation", "test"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class View:
    """A task with its texts transformed, for instance with its grids turned.

    undo: turns a prediction for the view into one for the task, or into None if it cannot be read.
    """

    train: tuple[Demonstration, ...]
    validation: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    undo: Callable[[str], str | None]


@dataclass(frozen=True)
class Task:
    """One task, ready to be tuned on and evaluated.

    Args:
        name: within its suite.
        train: the demonstrations.
        validation: items for choosing settings, disjoint from `test`; may be empty.
        test: the items whose score is reported.
        metric: the score; None takes macro-F1 for classification, accuracy for other choices, exact match otherwise.
        by: "options" or "generation"; None takes options if every item has some.
        text_format: how pairs become tokens.
        max_new_tokens: longest generated answer.
        views: further views of the task. The most frequent prediction wins; of equally frequent ones the first.
        undo: as in `View`, for the task itself: returns the prediction, perhaps tidied up. None is not a vote.
    """

    name: str
    train: tuple[Demonstration, ...]
    validation: tuple[Demonstration, ...]
    test: tuple[Demonstration, ...]
    metric: Metric | None = None
    by: Literal["options", "generation"] | None = None
    text_format: TextFormat = field(default_factory=TextFormat)
    max_new_tokens: int = 32
    views: tuple[View, ...] = ()
    undo: Callable[[str], str | None] | None = None

    def items(self, split: Split) -> tuple[Demonstration, ...]:
        """The items of a split.

        Raises:
            DataError: the task has none.
        """
        items = self.test if split == "test" else self.validation
        if not items:
            raise DataError(f"{self.name}: the task has no {split} items")
        return items

    @property
    def generates(self) -> bool:
        """Whether answers are generated. Then training should also teach where an answer ends."""
        return self.by == "generation" or (self.by is None and not all(item.options for item in self.test))


@dataclass(frozen=True)
class SuiteOptions:
    """What a user can choose for a suite.

    shots: demonstrations per task, drawn by class where all items share their options; None takes the suite's own
        number as the suite draws them.
    views: number of geometric views of a grid task (suites with `has_views`): 1, 2, 4 or 8.
    preset: benchmark whose text format is taken where the suite has one for it (bbh), or None.
    """

    shots: int | None = None
    views: int = 1
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"shots must be at least 1, got {self.shots}")
        if self.views not in (1, 2, 4, 8):
            raise ValueError(f"views must be 1, 2, 4 or 8, got {self.views}")


@dataclass(frozen=True)
class Suite:
    """A row of the suite table.

    Args:
        name: as users write it, and the name of its folder within a data directory.
        summary: the layout, in one line.
        list_tasks: folder -> names of the tasks there.
        load_task: (folder, task, seed, options) -> the task. Equal arguments give equal tasks.
        needs_folder: False if a package has the data.
        has_views: whether its tasks have geometric views (`SuiteOptions.views`).
        shots, score, source: for the documents: its demonstrations, how it is scored, and the address of the data.
    """

    name: str
    summary: str
    list_tasks: Callable[[Path | None], list[str]]
    load_task: Callable[[Path | None, str, int, SuiteOptions], Task]
    needs_folder: bool = True
    has_views: bool = False
    shots: str = "all, or `--shots`"
    score: str = "as the items are"
    source: str = ""

    def folder(self, data_dir: Path | None) -> Path | None:
        """The suite's folder: `data_dir/NAME` if there is one, else `data_dir` itself.

        Raises:
            DataError: there is no such directory, or `data_dir` is None and the suite needs one.
        """
        if data_dir is None:
            if self.needs_folder:
                raise DataError(f"the suite {self.name} needs data_dir, the folder of its files: {self.summary}")
            return None
        if not data_dir.is_dir():
            raise DataError(f"data_dir must be a folder, got {data_dir}")
        return data_dir / self.name if (data_dir / self.name).is_dir() else data_dir

    def pick_tasks(self, folder: Path | None, names: Sequence[str] = ()) -> list[str]:
        """`names`, or all tasks if there are no names.

        Raises:
            DataError: an unknown task, or a folder without tasks; the message lists what there is.
        """
        found = self.list_tasks(folder)
        if not found:
            raise DataError(f"{folder} holds no task of the suite {self.name}: {self.summary}")
        unknown = [name for name in names if name not in found]
        if unknown:
            raise DataError(f"the suite {self.name} has no task {', '.join(unknown)}; it has {', '.join(found)}")
        return list(dict.fromkeys(names)) or found


def draw(items: Sequence[Item], seed: int, *counts: int, by_class: bool = False) -> list[tuple[Item, ...]]:
    """Disjoint random samples of `counts` items each, then the remaining items in their order.

    The result depends only on the arguments. A sample that is larger than what remains gets what remains. With
    `by_class`, the first sample has the classes in the proportions of the items (`stratified`).
    """
    order = random.Random(seed).sample(range(len(items)), len(items))
    if by_class and counts:
        chosen = set(stratified([items[i] for i in order], counts[0]))
        order = [i for n, i in enumerate(order) if n in chosen] + [i for n, i in enumerate(order) if n not in chosen]
    parts, start = [], 0
    for count in counts:
        parts.append(tuple(items[i] for i in order[start : start + count]))
        start += count
    return [*parts, tuple(items[i] for i in sorted(order[start:]))]


def stratified(items: Sequence[Any], count: int) -> list[int]:
    """Indices of the first items of each class, `count` in all and in order, where all items share their options: those
    of the first `count` items otherwise.

    A class gets its share of `count`, rounded down, and at least one item if there are so many; what is left goes to
    the largest remainders, of equal ones to the class that comes first.
    """
    options = {frozenset(getattr(item, "options", None) or ()) for item in items}
    if len(options) != 1 or not all(options):
        return list(range(min(count, len(items))))
    classes: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        classes.setdefault(item.output, []).append(index)
    count = min(count, len(items))
    shares = {label: count * len(members) / len(items) for label, members in classes.items()}
    least = 1 if count >= len(classes) else 0
    taken = {label: max(least, int(share)) for label, share in shares.items()}
    while sum(taken.values()) != count:
        step = 1 if sum(taken.values()) < count else -1
        movable = [c for c in taken if (taken[c] < len(classes[c]) if step > 0 else taken[c] > least)]
        taken[max(movable, key=lambda c: step * (shares[c] - taken[c]))] += step
    return sorted(index for label, members in classes.items() for index in members[: taken[label]])
