"""How many optimiser steps a budget of CPU seconds buys: measured once per task, method and objective, and kept.

seconds of n steps = fixed + n * step        fixed: the start, such as one pass over the demonstrations

OUT/lengths/TASK/METHOD@OBJECTIVE.json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.reproduce.plan import TUNING_SEED, Plan, Setting
from ctkernels.tuning.data.suites import Task
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.methods.tune import tune
from ctkernels.tuning.storage import atomic_write_json

MORE_STEPS = 4  # that the second measurement takes
QUICKLY = 2.0  # seconds; a shorter first measurement is repeated, so that it holds no warm-up
PARTS = {"ttt+ct-kv": ("ttt", "ct-kv")}  # methods of two stages, each of which gets half of the budget


@dataclass(frozen=True)
class Timing:
    """CPU seconds of a run: those before the first step, and those of each step."""

    fixed: float
    step: float

    def steps(self, budget: float, steps_per_epoch: int, plan: Plan) -> int:
        """The most steps within the budget, but at least `plan.least_steps` and at most `plan.most_epochs`."""
        affordable = math.floor((budget - self.fixed) / self.step)
        return max(plan.least_steps, min(affordable, plan.most_epochs * steps_per_epoch))


def timings(setting: Setting, tasks: Sequence[str], words: Iterable[str]) -> dict[tuple[str, str, str], Timing]:
    """(task, method, objective) -> its timing, for all methods and objectives among the candidates `words`, shared
    among the processes."""
    wanted = dict.fromkeys((method, _objective(word)) for word in words for method in parts(word))
    jobs = [(task, method, objective) for task in tasks for method, objective in wanted]
    if not setting.reading:
        for number in setting.workers.numbers():
            if number >= len(jobs):
                break
            path = _path(setting, *jobs[number])
            if not path.is_file():
                atomic_write_json(path, asdict(_measure(setting, *jobs[number])))
        setting.workers.wait()
    return {job: Timing(**json.loads(path.read_text())) for job in jobs if (path := _path(setting, *job)).is_file()}


def parts(word: str) -> tuple[str, ...]:
    """The stages of a method, which are methods of their own."""
    name = word.partition(":")[0]
    return PARTS.get(name, (name,))


def timed(tasks: Sequence[str], words: Iterable[str], found: Mapping[tuple[str, str, str], Timing]) -> list[str]:
    """The tasks on which all candidates have timings: all of them, but for a run in progress that is only read."""
    jobs = [(method, _objective(word)) for word in words for method in parts(word)]
    return [task for task in tasks if all((task, *job) in found for job in jobs)]


def with_length(
    word: str, task: str, found: Mapping[tuple[str, str, str], Timing], plan: Plan, budget: float | None = None
) -> MethodSpec:
    """A candidate with the steps that the budget buys on a task."""
    stages = parts(word)
    lengths = []
    for stage in stages:
        rows = MethodSpec.parse(stage).settings().batch_rows or plan.shots
        timing = found[task, stage, _objective(word)]
        lengths.append(timing.steps((budget or plan.budget) / len(stages), math.ceil(plan.shots / rows), plan))
    names = ("ttt_steps", "steps")[-len(stages) :]
    return MethodSpec.parse(":".join([word, *(f"{name}={n}" for name, n in zip(names, lengths, strict=True))]))


def _measure(setting: Setting, task: str, method: str, objective: str) -> Timing:
    sweep = setting.sweep("", [task], [])
    loaded = sweep.load(task, TUNING_SEED)
    spec = MethodSpec.parse(f"{method}:objective={objective}")
    first = _seconds(setting, loaded, spec, 1)
    if first > setting.plan.budget / setting.plan.least_steps:
        return Timing(0.0, first)  # the least number of steps is taken anyway
    if first < QUICKLY:
        first = _seconds(setting, loaded, spec, 1)
    step = max(_seconds(setting, loaded, spec, 1 + MORE_STEPS) - first, 1e-3) / MORE_STEPS
    return Timing(max(0.0, first - step), step)


def _seconds(setting: Setting, task: Task, spec: MethodSpec, steps: int) -> float:
    settings = spec.settings(steps=steps, seed=TUNING_SEED)
    started = time.process_time()
    tune(setting.model, setting.tokenizer, task.train, spec.name, settings, task.text_format)
    return time.process_time() - started


def _objective(word: str) -> str:
    return MethodSpec.parse(word).overrides.get("objective", "answers")


def _path(setting: Setting, task: str, method: str, objective: str) -> Path:
    return setting.out / "lengths" / task / f"{method}@{objective}.json"
