"""Accuracy and seconds per epoch against the number of demonstrations, up to 256.

With k demonstrations of n tokens each, CT-KV runs k rows of n tokens against a prefix of k * n keys; CT-Prompt and TTT
run k rows of k * n tokens each. The model's layers, which take most of the time of a small model, thus see k * n tokens
per epoch in one case and k^2 * n in the other; CT-KV's attention grows with k^2, the others' with k^3.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.reproduce.plan import Setting
from benchmarks.reproduce.screen import load_whole
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.storage import atomic_file

GROWTH = 4  # of the time of an epoch, at most, when k doubles


@dataclass(frozen=True)
class Point:
    """A method on k demonstrations of one task: means over seeds.

    accuracy, calibrated: calibrated is None where items have options of their own.  epoch: CPU seconds; 0 untrained.
    """

    task: str
    method: str
    k: int
    seeds: int
    accuracy: float
    calibrated: float | None
    epoch: float


def measure(setting: Setting, tasks: Sequence[str], chosen: Mapping[str, str]) -> list[Point]:
    """The points of a few tasks: those with room for the most demonstrations, of these the ones with the shortest."""
    plan, epochs = setting.plan, dict(setting.plan.shot_epochs)
    rooms = {task: room(setting, task) for task in tasks}
    picked = sorted(tasks, key=lambda task: (-rooms[task][0], rooms[task][1]))[: plan.shot_tasks]
    words = {"icl": "icl", **{name: f"{chosen[name]}:epochs={n}" for name, n in epochs.items()}}
    specs = {name: MethodSpec.parse(word) for name, word in words.items()}
    names = {str(spec): name for name, spec in specs.items()}
    points: list[Point] = []
    for k in plan.shot_counts:
        by_task = {
            task: [spec for name, spec in specs.items() if expected(points, task, name, k) <= plan.shot_seconds]
            for task in picked
            if k <= rooms[task][0]
        }
        if by_task:
            seeds = plan.seeds[: plan.shot_seeds]
            results = setting.run(setting.sweep(f"shots/{k}", list(by_task), by_task, k, seeds=seeds))
            points += _points(results, names, k, epochs)
    return points


def room(setting: Setting, task: str) -> tuple[int, int]:
    """The largest k that a task's pool and the model's context allow, and the tokens of its whole pool per item."""
    whole = load_whole(setting, task)
    context = encode_context(setting.tokenizer, whole.train, whole.text_format)
    mean = len(context.input_ids) / len(whole.train)
    longest = int(context.segments.diff().max())
    most = getattr(setting.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    fitting = [k for k in setting.plan.shot_counts if k <= len(whole.train) and k * mean + 4 * longest <= most]
    return max(fitting, default=0), round(mean)


def expected(points: Sequence[Point], task: str, method: str, k: int) -> float:
    """Seconds of an epoch, at most: 0 for the first k, without end after a k that was left out."""
    if method == "icl":
        return 0.0
    mine = [point for point in points if point.task == task and point.method == method]
    earlier = [point for point in points if point.task == task and point.k < k]
    if not earlier:
        return 0.0
    last = max(mine, key=lambda point: point.k, default=None)
    if last is None or last.k < max(point.k for point in earlier):
        return math.inf
    return last.epoch * (k / last.k) ** math.log2(GROWTH)


def exponent(points: Sequence[Point]) -> float:
    """Slope of log(seconds of an epoch) against log(k) over the larger half of the points of a task and method: 1 is
    linear, 2 quadratic."""
    half = sorted(points, key=lambda point: point.k)[-max(2, (len(points) + 1) // 2) :]
    x, y = [math.log(point.k) for point in half], [math.log(point.epoch) for point in half]
    return statistics.linear_regression(x, y).slope


def markdown(points: Sequence[Point]) -> str:
    """A table per task: a row per k, accuracy and seconds per epoch of each method."""
    parts = []
    for task in dict.fromkeys(point.task for point in points):
        mine = [point for point in points if point.task == task]
        methods = list(dict.fromkeys(point.method for point in mine))
        cells = {(point.method, point.k): _cell(point) for point in mine}
        rows = [(str(k), *(cells.get((m, k), "") for m in methods)) for k in sorted({point.k for point in mine})]
        parts += [f"{task}:", harness.table(("k", *methods), rows)]
        grown = {m: [p for p in mine if p.method == m and p.epoch > 0] for m in methods}
        fits = [f"{m} {exponent(of_method):.1f}" for m, of_method in grown.items() if len(of_method) > 1]
        if fits:
            parts.append(f"Time of an epoch grows with k to the power of: {', '.join(fits)} (over the larger k).")
    return "\n\n".join(parts)


def plot(points: Sequence[Point], path: Path) -> None:
    """Accuracy against k above, CPU seconds per epoch below, a column per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(point.task for point in points))
    figure, axes = pyplot.subplots(
        2, len(tasks), figsize=(4 * len(tasks), 6), layout="constrained", squeeze=False, sharex="col"
    )
    methods = list(dict.fromkeys(point.method for point in points))
    for column, task in enumerate(tasks):
        for color, method in enumerate(methods):
            mine = [point for point in points if point.task == task and point.method == method]
            k = [point.k for point in mine]
            best = [100 * (point.accuracy if point.calibrated is None else point.calibrated) for point in mine]
            axes[0, column].semilogx(k, best, "o-", color=f"C{color}", label=method)
            timed = [point for point in mine if point.epoch > 0]
            if timed:
                axes[1, column].loglog([p.k for p in timed], [p.epoch for p in timed], "o-", color=f"C{color}")
        ticks = sorted({point.k for point in points if point.task == task})
        axes[1, column].set_xticks(ticks, list(map(str, ticks)))
        axes[1, column].minorticks_off()
        axes[0, column].set_title(task)
        axes[1, column].set_xlabel("demonstrations k")
        for row in axes[:, column]:
            row.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy (calibrated), percent")
    axes[1, 0].set_ylabel("CPU seconds per epoch")
    axes[0, 0].legend()
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    finally:
        pyplot.close(figure)


def _points(results: Sequence[CellResult], names: Mapping[str, str], k: int, epochs: Mapping[str, int]) -> list[Point]:
    grouped: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        if result.error is None:
            grouped.setdefault((result.task, names[result.method]), []).append(result)
    found = []
    for (task, name), mine in grouped.items():
        accuracy, seconds = (statistics.mean(getattr(r, n) for r in mine) for n in ("accuracy", "cpu_seconds"))
        shifted = [r.calibrated["accuracy"] for r in mine if r.calibrated is not None]
        calibrated = statistics.mean(shifted) if shifted else None
        epoch = seconds / epochs[name] if name in epochs else 0.0
        found.append(Point(task, name, k, len(mine), accuracy, calibrated, epoch))
    return found


def _cell(point: Point) -> str:
    calibrated = "" if point.calibrated is None else f" ({100 * point.calibrated:.0f})"
    seconds = f", {point.epoch:.2f} s" if point.epoch > 0 else ""
    return f"{100 * point.accuracy:.0f}{calibrated}{seconds}"
