"""What a sweep gives to a method: demonstrations with wrong answers, in other orders, in several orders at once.

    ct-kv:noise=0.2           one in five demonstrations has a wrong answer
    ct-kv:order=3             the third of some random orders
    ct-kv:ensemble=4          four orders are tuned and evaluated, and their losses averaged
    ct-kv:transferred=true    behind the prefix of another task, that of the sweep's `start_from`
    ct-kv:auto=true           learning rate, epochs and objective are found on the demonstrations (`methods/auto.py`)

Each is part of a method's word, so that it is a row of the report and has cells of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.perturb import noisy, ordered


@dataclass(frozen=True)
class Protocol:
    """What is done to the demonstrations of a cell, and what the method starts from.

    Args:
        noise: share of the demonstrations that get a wrong answer, in [0, 1].
        order: number of a random order of the demonstrations; 0 is the task's own.
        ensemble: orders that are tuned and evaluated; the option losses are averaged, generated answers vote.
        transferred: start from the sweep's adapter of another task.
        auto: settings that the method's word does not give are searched for.

    Raises:
        ValueError: a value out of its range; an order for an ensemble, which has several.
    """

    noise: float = 0.0
    order: int = 0
    ensemble: int = 1
    transferred: bool = False
    auto: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], got {self.noise}")
        if self.order < 0:
            raise ValueError(f"order must be at least 0, got {self.order}")
        if self.ensemble < 1:
            raise ValueError(f"ensemble must be at least 1, got {self.ensemble}")
        if self.order and self.ensemble > 1:
            raise ValueError(
                f"order and ensemble exclude each other: an ensemble takes the orders 0 to {self.ensemble - 1}"
            )

    def changed(self) -> dict[str, Any]:
        """What is not at its default, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def apply(self, demonstrations: Sequence[Demonstration], seed: int) -> list[tuple[Demonstration, ...]]:
        """What a method sees of the demonstrations, once for each order that is evaluated.

        Raises:
            DataError: no wrong answer can be had.
        """
        worse = noisy(demonstrations, self.noise, seed)
        first = self.order
        return [ordered(worse, order, seed) for order in range(first, first + self.ensemble)]


NAMES = tuple(f.name for f in fields(Protocol))


@dataclass(frozen=True)
class OrderSpread:
    """How much a method depends on the order of its demonstrations.

    method: without its order.  orders: how many.  mean: of its scores.  spread: standard deviation over orders, the
    mean over tasks and seeds.  worst, best: mean over tasks and seeds of the lowest and the highest score.
    """

    method: str
    orders: int
    mean: float
    spread: float
    worst: float
    best: float


def noise_scores(scores: dict[str, dict[tuple[str, int], float]]) -> dict[str, dict[float, float]]:
    """method without its noise -> share of wrong answers -> mean score, where there are several shares.

    scores: method -> (task, seed) -> score, the same tasks and seeds for all.
    """
    found: dict[str, dict[float, float]] = {}
    for method, of_cells in scores.items():
        base, value = without(method, "noise")
        found.setdefault(base, {})[float(value or 0)] = statistics.mean(of_cells.values())
    return {base: dict(sorted(levels.items())) for base, levels in found.items() if len(levels) > 1}


def order_spreads(scores: dict[str, dict[tuple[str, int], float]]) -> list[OrderSpread]:
    """One line for each method that was run in several orders; `scores` as in `noise_scores`."""
    grouped: dict[str, list[dict[tuple[str, int], float]]] = {}
    for method, of_cells in scores.items():
        grouped.setdefault(without(method, "order")[0], []).append(of_cells)
    found = []
    for base, runs in grouped.items():
        if len(runs) > 1:
            by_cell = [[run[key] for run in runs] for key in runs[0]]
            mean, spread, worst, best = (
                statistics.mean(how(values) for values in by_cell)
                for how in (statistics.mean, statistics.stdev, min, max)
            )
            found.append(OrderSpread(base, len(runs), mean, spread, worst, best))
    return found


def markdown(noise: dict[str, dict[float, float]], orders: Iterable[OrderSpread]) -> list[str]:
    """The tables of both, with scores in percent; nothing where a sweep has none."""
    parts = []
    if noise:
        levels = sorted({level for of_method in noise.values() for level in of_method})
        lines = [
            f"| method | {' | '.join(f'{100 * level:g}%' for level in levels)} |",
            "|" + " --- |" * (len(levels) + 1),
        ]
        for method, of_method in noise.items():
            shown = (f"{100 * of_method[level]:.1f}" if level in of_method else "" for level in levels)
            lines.append(f"| {method} | {' | '.join(shown)} |")
        note = "Mean score by the share of demonstrations with a wrong answer."
        parts.append("\n\n".join(["## Noisy answers", "\n".join(lines), note]))
    orders = list(orders)
    if orders:
        lines = ["| method | orders | mean | ± over orders | worst | best |", "|" + " --- |" * 6]
        for o in orders:
            numbers = " | ".join(f"{100 * x:.1f}" for x in (o.mean, o.spread, o.worst, o.best))
            lines.append(f"| {o.method} | {o.orders} | {numbers} |")
        note = "Standard deviation, worst and best are over the orders of a task and seed, then means over these."
        parts.append("\n\n".join(["## Order of the demonstrations", "\n".join(lines), note]))
    return parts


def without(method: str, name: str) -> tuple[str, str | None]:
    """A method's word without one of its settings, and the value of that setting."""
    words = method.split(":")
    kept = [word for word in words if not word.startswith(f"{name}=")]
    values = [word.partition("=")[2] for word in words if word not in kept]
    return ":".join(kept), values[0] if values else None
