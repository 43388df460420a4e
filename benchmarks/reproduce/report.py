"""The tables: means with confidence intervals, differences to CT-KV, wins by task, costs; also of a run in progress."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.reproduce import shots
from benchmarks.reproduce.screen import Screened
from benchmarks.reproduce.shots import Point
from benchmarks.reproduce.stages import ANSWERS, HALF, Candidate
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.significance import Interval, hierarchical_bootstrap
from ctkernels.tuning.storage import atomic_file, atomic_write_bytes, atomic_write_json

OURS = "ct-kv"
TIE = 0.01  # accuracy: a smaller mean difference on a task is a tie


@dataclass
class Found:
    """What the stages gave, each empty if it was not run."""

    screened: list[Screened]
    chosen: dict[str, str] = field(default_factory=dict)
    tried: list[Candidate] = field(default_factory=list)
    tuning_tasks: list[str] = field(default_factory=list)
    test: list[CellResult] = field(default_factory=list)
    ablation: list[CellResult] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Gap:
    """CT-KV's accuracy minus a method's, and on how many tasks CT-KV wins, ties and loses."""

    difference: Interval
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Line:
    """A method over the tasks and seeds that all methods finished, plain and calibrated (plain where a task has no
    calibration).

    accuracy, score, nll, ece: means over tasks of the means over seeds; score is macro-F1 where items share options.
    cpu_seconds, slowest: of tuning, mean and maximum over the cells.  gap, calibrated_gap: None for CT-KV itself.
    """

    method: str
    accuracy: Interval
    calibrated: Interval
    score: float
    nll: float
    calibrated_nll: float
    ece: float
    calibrated_ece: float
    cpu_seconds: float
    slowest: float
    gap: Gap | None
    calibrated_gap: Gap | None


def compared(results: Sequence[CellResult]) -> tuple[list[str], list[tuple[str, int]]]:
    """The methods, and the (task, seed) that all of them finished."""
    methods = list(dict.fromkeys(r.method for r in results))
    finished = {(r.method, r.task, r.seed) for r in results if r.error is None}
    keys = dict.fromkeys((r.task, r.seed) for r in results)
    return methods, [key for key in keys if all((method, *key) in finished for method in methods)]


def compare(results: Sequence[CellResult], ours: str = OURS) -> list[Line]:
    """A line per method; none before every method has finished a task."""
    methods, keys = compared(results)
    cells = {(r.method, r.task, r.seed): r for r in results if r.error is None}

    def numbers(method: str, name: str, calibrated: bool = False) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for task, seed in keys:
            cell = cells[method, task, seed]
            of = cell.calibrated if calibrated and cell.calibrated is not None else vars(cell)
            found.setdefault(task, []).append(of[name])
        return found

    def mean(method: str, name: str, calibrated: bool = False) -> float:
        return statistics.mean(map(statistics.mean, numbers(method, name, calibrated).values()))

    def gap(method: str, calibrated: bool) -> Gap | None:
        if method == ours or ours not in methods:
            return None
        mine, theirs = (numbers(m, "accuracy", calibrated) for m in (ours, method))
        differences = {t: [a - b for a, b in zip(mine[t], theirs[t], strict=True)] for t in mine}
        by_task = [statistics.mean(of_task) for of_task in differences.values()]
        wins, losses = sum(d > TIE for d in by_task), sum(d < -TIE for d in by_task)
        return Gap(hierarchical_bootstrap(differences), wins, len(by_task) - wins - losses, losses)

    return [
        Line(
            method,
            hierarchical_bootstrap(numbers(method, "accuracy")),
            hierarchical_bootstrap(numbers(method, "accuracy", True)),
            mean(method, "score"),
            mean(method, "nll"),
            mean(method, "nll", True),
            mean(method, "ece"),
            mean(method, "ece", True),
            mean(method, "cpu_seconds"),
            max(map(max, numbers(method, "cpu_seconds").values())),
            gap(method, False),
            gap(method, True),
        )
        for method in methods
        if keys
    ]


def write(found: Found, about: dict[str, Any], results: Path, docs: Path | None) -> str:
    """Write RESULTS/reproduce_NAME.json, .md and figures, and the tables of the documentation; returns the page."""
    lines, ablation = compare(found.test), compare(found.ablation, ours="both")
    name = f"reproduce_{about['name']}"
    parts = _summary(found, about, lines, ablation)
    if found.points:
        shots.plot(found.points, results / f"{name}_shots.png")
        parts.append(f"![accuracy against k]({name}_shots.png)")
    if lines:
        plot(lines, results / f"{name}.png")
        parts += [f"![accuracy against seconds]({name}.png)", "## By task", _by_task(found.test)]
    parts += ["## How the settings were chosen", _candidates(found)] if found.tried else []
    parts += ["## Which tasks were taken", _screened(found, about["plan"])]
    failed = [f"- {r.method} on {r.task}, seed {r.seed}: {r.error}" for r in found.test + found.ablation if r.error]
    parts += ["## Cells without a result", "\n".join(failed)] if failed else []
    text = "\n\n".join(["# Reproduction", *parts]) + "\n"
    record = {
        **about,
        **asdict(found),
        "lines": list(map(asdict, lines)),
        "ablation_lines": list(map(asdict, ablation)),
    }
    for stage in ("test", "ablation"):  # the cells themselves, without what is in their files
        record[stage] = [_short(cell) for cell in getattr(found, stage)]
    atomic_write_json(results / f"{name}.json", record)
    atomic_write_bytes(results / f"{name}.md", text.encode())
    if docs:
        marker = f"reproduce {about['name']}"
        harness.replace_between_markers(docs, marker, "\n\n".join(_summary(found, about, lines, ablation)))
    return text


def plot(lines: Sequence[Line], path: Path) -> None:
    """Accuracy with its interval against CPU seconds, plain and calibrated."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for side, name in zip(axes, ("accuracy", "calibrated"), strict=True):
        for line, marker in zip(lines, "os^vDP*X<>", strict=False):
            value: Interval = getattr(line, name)
            error = [[100 * (value.mean - value.low)], [100 * (value.high - value.mean)]]
            label = line.method if name == "accuracy" else None
            side.errorbar(line.cpu_seconds, 100 * value.mean, error, fmt=marker, markersize=8, capsize=3, label=label)
        side.set_xscale("symlog", linthresh=1)  # zero-shot takes no time
        side.set(title=name, xlabel="tuning, CPU seconds per task", xlim=(-0.1, None))
        side.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, percent")
    figure.legend(loc="outside right upper")
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    finally:
        pyplot.close(figure)


def _summary(found: Found, about: dict[str, Any], lines: Sequence[Line], ablation: Sequence[Line]) -> list[str]:
    """What a page of documentation shows."""
    plan = about["plan"]
    parts = [
        f"`{about['command']}`, commit {about['commit']}: {about['model']}, {about['dtype']}; "
        f"{harness.machine_line(about['machine'])}"
    ]
    if lines:
        _, keys = compared(found.test)
        tasks = dict.fromkeys(task for task, _ in keys)
        planned = len(dict.fromkeys(one.task for one in found.screened if one.taken)) * len(plan["seeds"])
        parts += [
            _means(lines),
            f"Means over {len(tasks)} tasks and their seeds ({len(keys)} of {planned} pairs of task and seed are "
            f"finished), {plan['shots']} demonstrations, at most {plan['limit']} test items, {plan['budget']:g} CPU "
            f"seconds of tuning for each method and task, but at least {plan['least_steps']} steps and at most "
            f"{plan['most_epochs']} epochs; {HALF}: half of them; {ANSWERS}: the answers' loss. Brackets: 95% interval "
            "of a bootstrap over tasks and their seeds. Calibrated (batch): each option's mean loss is subtracted; "
            "plain where a task's options differ by item. Score: macro-F1 where items share their options, else "
            "accuracy. NLL over the options in nats, ECE in percent.",
            _gaps(lines),
            f"Paired differences of the accuracy in points. Wins, ties, losses: tasks where ct-kv is above, within "
            f"{100 * TIE:g} point, below.",
        ]
    if ablation:
        _, keys = compared(found.ablation)
        parts += [f"CT-KV with other masks ({len(keys)} pairs of task and seed):", _means(ablation)]
        parts += [_gaps(ablation, ours="both")]
    if found.points:
        epochs = ", ".join(f"{name} {n} epochs" for name, n in plan["shot_epochs"])
        parts += [
            f"Accuracy in percent (calibrated), CPU seconds per epoch; {plan['shot_seeds']} seeds at most; {epochs}. "
            f"A method stops before an epoch of more than {plan['shot_seconds']:g} s.",
            shots.markdown(found.points),
        ]
    return parts


def _means(lines: Sequence[Line]) -> str:
    header = (
        "method", "accuracy", "calibrated", "score", "NLL", "calibrated", "ECE", "calibrated", "CPU s", "slowest, CPU s"
    )  # fmt: skip
    rows = [
        (
            line.method,
            _interval(line.accuracy),
            _interval(line.calibrated),
            f"{100 * line.score:.1f}",
            f"{line.nll:.3f}",
            f"{line.calibrated_nll:.3f}",
            f"{100 * line.ece:.1f}",
            f"{100 * line.calibrated_ece:.1f}",
            f"{line.cpu_seconds:.1f}",
            f"{line.slowest:.0f}",
        )
        for line in lines
    ]
    return harness.table(header, rows)


def _gaps(lines: Sequence[Line], ours: str = OURS) -> str:
    header = (f"{ours} minus", "accuracy", "wins/ties/losses", "calibrated", "wins/ties/losses")
    rows = [
        (
            line.method,
            *(x for gap in gaps for x in (_interval(gap.difference, "+"), f"{gap.wins}/{gap.ties}/{gap.losses}")),
        )
        for line in lines
        if all(gaps := (line.gap, line.calibrated_gap))
    ]
    return harness.table(header, rows)


def _by_task(results: Sequence[CellResult]) -> str:
    methods, keys = compared(results)
    cells = {(r.method, r.task, r.seed): r for r in results if r.error is None}
    rows = []
    for task in dict.fromkeys(task for task, _ in keys):
        seeds = [seed for of, seed in keys if of == task]
        row = []
        for method in methods:
            mine = [cells[method, task, seed] for seed in seeds]
            plain = statistics.mean(r.accuracy for r in mine)
            shifted = [r.calibrated["accuracy"] for r in mine if r.calibrated is not None]
            row.append(f"{100 * plain:.0f}" + (f" ({100 * statistics.mean(shifted):.0f})" if shifted else ""))
        always = cells[methods[0], task, seeds[0]].majority
        rows.append((task, str(len(seeds)), *row, "-" if always is None else f"{100 * always['accuracy']:.0f}"))
    table = harness.table(("task", "seeds", *methods, "majority class"), rows)
    return f"{table}\n\nAccuracy in percent (calibrated)."


def _candidates(found: Found) -> str:
    words = set(found.chosen.values())
    rows = [
        (
            f"**{c.word}**" if c.word in words else c.word,
            f"{c.nll:.3f}",
            f"{100 * c.accuracy:.1f}",
            f"{c.cpu_seconds:.1f}",
        )
        for c in found.tried
    ]
    table = harness.table(("candidate", "NLL over options", "accuracy", "CPU s"), rows)
    return (
        f"{table}\n\nMeans over the validation items of {', '.join(found.tuning_tasks)}, with demonstrations that are "
        "not tested. Bold: taken, the lowest NLL of a method (of ct-kv also among those with the answers' loss)."
    )


def _screened(found: Found, plan: dict[str, Any]) -> str:
    rows = []
    for one in found.screened:
        numbers = ["-"] * 3
        if one.accuracy is not None and one.baseline is not None:
            numbers = [f"{100 * x:.1f}" for x in (one.accuracy, one.baseline, one.accuracy - one.baseline)]
        rows.append((one.task, str(one.tokens), *numbers, "yes" if one.taken else "no", one.reason))
    header = ("task", f"tokens of {plan['shots']}", "in context", "baseline", "difference", "taken", "because")
    return (
        f"{harness.table(header, rows)}\n\nOn validation items: accuracy of in-context learning with "
        f"{plan['screen_shots']} demonstrations, mean of 3 draws, calibrated where items share their options, and that "
        f"of the majority class or of chance. A task passes from {100 * plan['margin']:g} points on."
    )


def _short(cell: CellResult) -> dict[str, Any]:
    left_out = ("run", "predictions", "losses", "labels")
    found = {name: value for name, value in asdict(cell).items() if name not in left_out}
    if cell.calibrated is not None:
        found["calibrated"] = {name: cell.calibrated[name] for name in ("score", "accuracy", "nll", "ece")}
    return found


def _interval(value: Interval, sign: str = "") -> str:
    return f"{100 * value.mean:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"
