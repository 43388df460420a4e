"""The two figures of a sweep: score against seconds per task, and the variants of a method as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ctkernels.tuning.evaluation.sweep.report import Report, Summary
from ctkernels.tuning.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_figures(report: Report, out: Path) -> list[Path]:
    """Write OUT/score_against_seconds.png, and OUT/ablation.png if a method has several variants; returns the files."""
    written = []
    if report.summaries:
        written.append(plot_time(report.summaries, out / "score_against_seconds.png"))
    variants = {
        name: list(group)
        for name, group in groupby(
            sorted(report.summaries, key=lambda s: _method_name(s.method)), key=lambda s: _method_name(s.method)
        )
    }
    variants = {name: group for name, group in variants.items() if len(group) > 1}
    if variants:
        written.append(plot_bars(variants, out / "ablation.png"))
    return written


def plot_time(summaries: Sequence[Summary], path: Path, cpu: bool = False) -> Path:
    """Score (percent, with the spread over seeds) against the time or CPU time of tuning, one point per method."""

    def draw(axes: Axes) -> None:
        for s, marker in zip(summaries, cycle("os^vDP*X<>"), strict=False):
            spread = None if s.spread is None else 100 * s.spread
            label = f"{s.method}, {100 * s.score:.1f}"
            seconds = s.cpu_seconds if cpu else s.seconds
            axes.errorbar(seconds, 100 * s.score, spread, fmt=marker, markersize=8, capsize=3, label=label)
        axes.set_xscale("symlog", linthresh=1)  # zero-shot takes no time
        axes.set(xlabel=f"tuning, {'CPU ' if cpu else ''}seconds per task", ylabel="score, percent", xlim=(-0.1, None))
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside right upper")

    return _save(draw, path)


def plot_bars(variants: Mapping[str, Sequence[Summary]], path: Path) -> Path:
    """Score of each variant of each method, with the spread over seeds; labels name the settings that differ."""

    def draw(axes: Axes) -> None:
        place, labels, colors = 0, [], {name: number for number, name in enumerate(variants)}
        for name, group in variants.items():
            shared = set.intersection(*(set(s.method.split(":")) for s in group))
            for s in group:
                height, spread = 100 * s.score, None if s.spread is None else 100 * s.spread
                axes.bar(place, height, yerr=spread, capsize=3, color=f"C{colors[name]}")
                axes.annotate(f"{height:.1f}", (place, 0), (0, 4), textcoords="offset points", ha="center", color="w")
                own = [setting for setting in s.method.split(":") if setting not in shared]
                labels.append((place, "\n".join(filter(None, [name, *own]))))
                place += 1
            place += 1  # a gap between methods
        axes.set_xticks([place for place, _ in labels], [label for _, label in labels], fontsize=8)
        axes.set(ylabel="score, percent", ylim=(0, None))

    return _save(draw, path)


def _save(draw, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    try:
        draw(axes)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    finally:
        pyplot.close(figure)
    return path


def _method_name(label: str) -> str:
    return label.partition(":")[0]
