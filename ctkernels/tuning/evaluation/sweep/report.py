"""From cells to tables: means, spread over seeds, paired significance, missing cells; as Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ctkernels.tuning.evaluation.sweep import protocols
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.protocols import OrderSpread
from ctkernels.tuning.evaluation.sweep.significance import Interval, hierarchical_bootstrap, holm, sign_flip_test
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json


@dataclass(frozen=True)
class Summary:
    """A method over the tasks that every method finished with every seed.

    score, accuracy, gold_loss: means over tasks and seeds.  spread: standard deviation over seeds of the mean score
    over tasks; None with a single seed.  seconds: mean time of tuning.  cpu_seconds: mean CPU time of tuning, of all
    threads. finished: number of all cells with a result, also of other tasks.  interval: of the score, over tasks and
    seeds.
    nll, ece: means, None where a cell has none (generated answers, cells of an earlier version).
    calibrated, calibrated_accuracy, calibrated_nll, calibrated_ece: the same after calibration, with the plain numbers
        of tasks that have no calibration; None if no task has one.
    """

    method: str
    score: float
    spread: float | None
    accuracy: float
    gold_loss: float
    seconds: float
    cpu_seconds: float
    finished: int
    interval: Interval
    nll: float | None = None
    ece: float | None = None
    calibrated: float | None = None
    calibrated_accuracy: float | None = None
    calibrated_nll: float | None = None
    calibrated_ece: float | None = None


@dataclass(frozen=True)
class Baseline:
    """What the most frequent answer of each task alone would score: means over tasks and seeds."""

    score: float
    accuracy: float


@dataclass(frozen=True)
class Comparison:
    """Method `a` minus method `b`, paired by task and seed.

    difference: mean difference of the scores.  better, worse: number of pairs where a is above or below b.
    p: p value of the sign-flip test over the pairs.  p_holm: corrected for the number of comparisons.
    p_tasks: p value of the same test over the means of the tasks. (Seeds of a task share its test items.)
    interval: of the difference, over tasks and seeds.
    """

    a: str
    b: str
    difference: float
    better: int
    worse: int
    pairs: int
    p: float
    p_holm: float
    p_tasks: float
    interval: Interval


@dataclass(frozen=True)
class Report:
    """The results of a sweep.

    tasks: those that every method finished with every seed.  summaries, comparisons: over these tasks.
    left_out: tasks where a method lacks a result.  failures: why, one line per cell.  planned: number of cells of each
    method.  scores: method -> task -> mean score over the seeds that it finished.
    majority: of the tasks in `tasks`, or None if the items of one do not share their options.
    majority_scores: task -> score.  calibrate: how scores were calibrated.  uncalibrated: tasks that have no
    calibration, since their items do not share their options, although others have.
    noise, orders: as `noise_scores` and `order_spreads` in `protocols.py` give them, over these tasks.
    """

    title: str
    tasks: list[str]
    seeds: list[int]
    summaries: list[Summary]
    comparisons: list[Comparison]
    left_out: list[str]
    failures: list[str]
    planned: int
    scores: dict[str, dict[str, float]]
    majority: Baseline | None = None
    majority_scores: dict[str, float] = field(default_factory=dict)
    calibrate: str = "none"
    uncalibrated: list[str] = field(default_factory=list)
    noise: dict[str, dict[float, float]] = field(default_factory=dict)
    orders: list[OrderSpread] = field(default_factory=list)

    def markdown(self) -> str:
        """All tables, with scores in percent."""
        parts = [f"# {self.title}", self.overview()]
        if self.comparisons:
            parts.append(self.pairs())
        parts += [*protocols.markdown(self.noise, self.orders), self.by_task()]
        if self.failures:
            parts.append("## Cells without a result\n\n" + "\n".join(f"- {line}" for line in self.failures))
        return "\n\n".join(parts) + "\n"

    def write(self, out: Path) -> None:
        """Write OUT/report.md and OUT/report.json."""
        atomic_write_bytes(out / "report.md", self.markdown().encode())
        atomic_write_json(out / "report.json", asdict(self))

    def overview(self) -> str:
        """The table of the methods, and what its columns mean."""
        lines = [
            "| method | score | 95% interval | calibrated | accuracy | NLL | calibrated | ECE | calibrated | gold loss "
            "| tuning, s per task | CPU s | cells |",
            "|" + " --- |" * 13,
        ]
        for s in self.summaries:
            spread = "" if s.spread is None else f" ± {100 * s.spread:.1f}"
            bounds = f"{100 * s.interval.low:.1f} to {100 * s.interval.high:.1f}"
            scores = f"{100 * s.score:.1f}{spread} | {bounds} | {_percent(s.calibrated)} | {100 * s.accuracy:.1f}"
            worth = f"{_nats(s.nll)} | {_nats(s.calibrated_nll)} | {_percent(s.ece)} | {_percent(s.calibrated_ece)}"
            times = f"{s.gold_loss:.3f} | {s.seconds:.1f} | {s.cpu_seconds:.1f}"
            lines.append(f"| {s.method} | {scores} | {worth} | {times} | {s.finished}/{self.planned} |")
        if self.majority is not None:
            numbers = f"{100 * self.majority.score:.1f} | - | - | {100 * self.majority.accuracy:.1f}"
            lines.append(f"| majority class | {numbers} |" + " - |" * 8)
        seeds = ", ".join(map(str, self.seeds))
        notes = [
            f"Means over tasks ({len(self.tasks)}) and seeds ({seeds}), ± the standard deviation over seeds. "
            "Interval: of the mean score, by a bootstrap over tasks and the seeds of each. Score in "
            "percent: macro-F1 for classification, BLEU or exact match for generation, accuracy otherwise. NLL: "
            "-log of the right options' probability, normalised over options, nats. ECE: expected calibration error of "
            "the choices, percent, ten bins. Gold loss: cross-entropy of the correct answer, nats per token. CPU s: of "
            "all threads together, for the same tuning. Majority class: always the most frequent answer."
        ]
        if self.calibrate != "none":
            plain = f" Not calibrated: {', '.join(self.uncalibrated)}." if self.uncalibrated else ""
            notes.append(f"Calibrated ({self.calibrate}): an offset is subtracted from the loss of each option.{plain}")
        if self.left_out:
            notes.append(f"Left out, since a method lacks a result: {', '.join(self.left_out)}.")
        return "\n\n".join(["\n".join(lines), *notes])

    def pairs(self) -> str:
        """The table of paired differences."""
        lines = [
            "| a | b | a - b | 95% interval | a above / below b | p | p, Holm | p over tasks |",
            "|" + " --- |" * 8,
        ]
        for c in self.comparisons:
            counts = f"{c.better} / {c.worse} of {c.pairs}"
            p_values = f"{c.p:.4f} | {c.p_holm:.4f} | {c.p_tasks:.4f}"
            bounds = f"{100 * c.interval.low:+.1f} to {100 * c.interval.high:+.1f}"
            lines.append(f"| {c.a} | {c.b} | {100 * c.difference:+.1f} | {bounds} | {counts} | {p_values} |")
        note = (
            "Two-sided sign-flip permutation test on the differences of the scores, paired over tasks and seeds; Holm "
            f"corrects for the number of comparisons ({len(self.comparisons)}). The last column tests the means of the "
            f"tasks ({len(self.tasks)}) instead, since seeds of a task share its test items. Interval: of the mean "
            "difference, by a bootstrap over tasks and the seeds of each."
        )
        return "\n\n".join(["## Paired differences", "\n".join(lines), note])

    def by_task(self) -> str:
        """The table of scores by task."""
        columns = {**self.scores, **({"majority class": self.majority_scores} if self.majority_scores else {})}
        lines = [f"| task | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for task in dict.fromkeys(task for scores in self.scores.values() for task in scores):
            cells = (scores.get(task) for scores in columns.values())
            shown = " | ".join("" if score is None else f"{100 * score:.1f}" for score in cells)
            lines.append(f"| {task} | {shown} |")
        return "\n\n".join(["## By task", "\n".join(lines), "Mean score over the seeds that have a result."])


def make_report(title: str, results: Sequence[CellResult], planned: int) -> Report:
    """The report of the cells of a sweep, in the order of its methods, tasks and seeds.

    planned: number of cells of each method.
    """
    methods = list(dict.fromkeys(r.method for r in results))
    tasks = list(dict.fromkeys(r.task for r in results))
    seeds = list(dict.fromkeys(r.seed for r in results))
    finished = {(r.method, r.task, r.seed): r for r in results if r.error is None}
    compared = [m for m in methods if any(method == m for method, _, _ in finished)]
    common = [t for t in tasks if compared and all((m, t, s) in finished for m in compared for s in seeds)]
    by_method = {m: {(t, s): finished[m, t, s] for t in common for s in seeds} for m in compared}
    scores: dict[str, dict[str, float]] = {}
    for m in compared:
        found = {t: [finished[m, t, s].score for s in seeds if (m, t, s) in finished] for t in tasks}
        scores[m] = {t: statistics.mean(values) for t, values in found.items() if values}
    baselines = {
        t: {s: r.majority for (_, task, s), r in finished.items() if task == t and r.majority is not None}
        for t in tasks
    }
    always = {t: [baselines[t][s] for s in seeds if s in baselines[t]] for t in tasks}
    whole = [one for t in common for one in always[t]]
    hows = {r.calibrated["offsets"]["calibrate"] for r in finished.values() if r.calibrated is not None}
    values = {m: {key: r.score for key, r in of_method.items()} for m, of_method in by_method.items() if common}
    return Report(
        title=title,
        tasks=common,
        seeds=seeds,
        summaries=[_summary(m, by_method[m], seeds, sum(key[0] == m for key in finished)) for m in compared if common],
        comparisons=_compare(by_method, common, seeds) if common else [],
        left_out=[t for t in tasks if t not in common],
        failures=[f"{r.method} on {r.task}, seed {r.seed}: {r.error}" for r in results if r.error is not None],
        planned=planned,
        scores=scores,
        majority=_baseline(whole) if common and len(whole) == len(common) * len(seeds) else None,
        majority_scores={t: _baseline(of_task).score for t, of_task in always.items() if of_task},
        calibrate=", ".join(sorted(hows)) or "none",
        uncalibrated=[
            t for t in common if hows and not any(finished[m, t, s].calibrated for m in compared for s in seeds)
        ],
        noise=protocols.noise_scores(values),
        orders=protocols.order_spreads(values),
    )


def _baseline(cells: Sequence[dict[str, Any]]) -> Baseline:
    return Baseline(*(statistics.mean(cell[name] for cell in cells) for name in ("score", "accuracy")))


def _summary(method: str, results: dict[tuple[str, int], CellResult], seeds: Sequence[int], finished: int) -> Summary:
    def mean(name: str) -> float:
        return statistics.mean(getattr(r, name) for r in results.values())

    by_seed = [statistics.mean(r.score for (_, seed), r in results.items() if seed == s) for s in seeds]
    spread = statistics.stdev(by_seed) if len(seeds) > 1 else None

    def mean_of_all(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.mean(known) if len(known) == len(results) else None

    def calibrated(name: str) -> float | None:
        if not any(r.calibrated for r in results.values()):
            return None
        return mean_of_all((r.calibrated or vars(r))[name] for r in results.values())

    times = mean("seconds"), mean("cpu_seconds")
    return Summary(
        method,
        mean("score"),
        spread,
        mean("accuracy"),
        mean("gold_loss"),
        *times,
        finished,
        hierarchical_bootstrap(by_task({key: r.score for key, r in results.items()})),
        *(mean_of_all(getattr(r, name) for r in results.values()) for name in ("nll", "ece")),
        *(calibrated(name) for name in ("score", "accuracy", "nll", "ece")),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _compare(
    by_method: dict[str, dict[tuple[str, int], CellResult]], tasks: Sequence[str], seeds: Sequence[int]
) -> list[Comparison]:
    found = []
    for a, b in combinations(by_method, 2):
        differences = {key: r.score - by_method[b][key].score for key, r in by_method[a].items()}
        values = list(differences.values())
        means = [statistics.mean(differences[t, s] for s in seeds) for t in tasks]
        better, worse = sum(d > 0 for d in values), sum(d < 0 for d in values)
        p, p_tasks = sign_flip_test(values), sign_flip_test(means)
        interval = hierarchical_bootstrap(by_task(differences))
        found.append((a, b, statistics.mean(values), better, worse, len(values), p, p_tasks, interval))
    corrected = holm([entry[6] for entry in found])
    return [Comparison(*entry[:7], adjusted, *entry[7:]) for entry, adjusted in zip(found, corrected, strict=True)]


def by_task(values: Mapping[tuple[str, int], float]) -> dict[str, list[float]]:
    """(task, seed) -> value, as task -> values."""
    found: dict[str, list[float]] = {}
    for (task, _), value in values.items():
        found.setdefault(task, []).append(value)
    return found
