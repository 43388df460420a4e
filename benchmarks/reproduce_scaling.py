"""Time per epoch against the number of demonstrations: linear for CT-KV, quadratic for CT-Prompt and TTT.

With k demonstrations of n tokens each, CT-KV runs k rows of n tokens against a prefix of k * n keys; CT-Prompt and TTT
run k rows of k * n tokens each. The model's layers, which take most of the time of a small model, thus see k * n tokens
per epoch in one case and k^2 * n in the other; CT-KV's attention grows with k^2, the others' with k^3.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import harness
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.data.suites import SuiteOptions, get_suite
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.methods.tune import tune
from ctkernels.tuning.storage import atomic_file, atomic_write_json

if TYPE_CHECKING:
    from benchmarks.reproduce import Setting

METHODS = ("ct-kv", "ct-prompt", "ttt")
QUICKLY = 20.0  # seconds; an epoch that should take less is measured again, after a first one to warm up
GROWTH = 4  # of the time, at most, when k doubles


@dataclass(frozen=True)
class Point:
    """Seconds of an epoch of a method on k demonstrations of P tokens together."""

    method: str
    k: int
    P: int
    seconds: float


def measure(setting: Setting, specs: Mapping[str, MethodSpec]) -> list[Point]:
    """All points; those in OUT/scaling are not measured again."""
    pool, folder = demonstrations(setting), setting.out / "scaling" / setting.tasks[0]
    points = []
    for name, spec in specs.items():
        last: Point | None = None
        for k in setting.plan.shot_counts:
            expected = GROWTH * last.seconds if last else 0.0
            if k > len(pool) or expected > setting.plan.most_seconds:
                break
            last = _kept(folder / f"{name}_{k}.json") or _point(setting, spec, pool[:k], expected)
            atomic_write_json(folder / f"{name}_{k}.json", asdict(last))
            points.append(last)
    return points


def demonstrations(setting: Setting) -> list[Demonstration]:
    """All different pairs of the first task, test items too: only time is measured."""
    suite, task = get_suite(setting.suite), setting.tasks[0]
    pairs: dict[str, Demonstration] = {}
    for seed in setting.plan.seeds:
        loaded = suite.load_task(setting.folder, task, seed, SuiteOptions())
        pairs |= {pair.input: pair for pair in (*loaded.train, *loaded.validation, *loaded.test)}
    return list(pairs.values())


def _point(setting: Setting, spec: MethodSpec, pairs: Sequence[Demonstration], expected: float) -> Point:
    epochs = 3 if expected < QUICKLY else 1
    settings = spec.method.settings(**{**spec.overrides, "epochs": epochs})
    history = tune(setting.model, setting.tokenizer, pairs, spec.name, settings).history
    seconds = statistics.median(record.seconds for record in history[epochs // 2 :])
    length = len(encode_context(setting.tokenizer, pairs).input_ids)
    return Point(spec.name, len(pairs), length, seconds)


def _kept(path: Path) -> Point | None:
    return Point(**json.loads(path.read_text())) if path.is_file() else None


def exponent(points: Sequence[Point]) -> float:
    """Slope of log(seconds) against log(k) over the larger half of the points: 1 is linear, 2 quadratic."""
    half = sorted(points, key=lambda point: point.k)[-max(2, (len(points) + 1) // 2) :]
    x, y = [math.log(point.k) for point in half], [math.log(point.seconds) for point in half]
    return statistics.linear_regression(x, y).slope


def markdown(points: Sequence[Point]) -> str:
    """A row per k, a column per method, and the exponents."""
    methods = list(dict.fromkeys(point.method for point in points))
    cells = {(point.method, point.k): f"{point.seconds:.2f}" for point in points}
    lengths = {point.k: str(point.P) for point in points}
    rows = [(str(k), lengths[k], *(cells.get((m, k), "") for m in methods)) for k in sorted(lengths)]
    fits = [
        f"{m} {exponent(mine):.1f}"
        for m in methods
        if len(mine := [point for point in points if point.method == m]) > 1
    ]
    table = harness.table(("k", "tokens", *(f"{m}, s" for m in methods)), rows)
    return f"{table}\n\nTime grows with k to the power of: {', '.join(fits)} (fit over the larger half of the points)."


def plot(points: Sequence[Point], path: Path) -> None:
    """Seconds per epoch against k, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for method in dict.fromkeys(point.method for point in points):
        mine = [point for point in points if point.method == method]
        axes.loglog([point.k for point in mine], [point.seconds for point in mine], "o-", label=method)
    axes.set_xticks(sorted({point.k for point in points}), [str(k) for k in sorted({point.k for point in points})])
    axes.set(xlabel="demonstrations k", ylabel="seconds per epoch")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    finally:
        pyplot.close(figure)
