"""The settings are chosen on validation items, then all methods are tested, and the ablation of CT-KV."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.reproduce.lengths import timed, timings, with_length
from benchmarks.reproduce.plan import MASKS, RATES, TUNING_SEED, UNTRAINED, Plan, Setting
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.storage import atomic_write_json

ANSWERS, HALF = "ct-kv, answers", "ct-kv, half the time"


@dataclass(frozen=True)
class Candidate:
    """Settings of a method: the mean over the tuning tasks of the NLL over options on their validation items, of the
    accuracy and of the CPU seconds."""

    word: str
    nll: float
    accuracy: float
    cpu_seconds: float


def tuning_tasks(tasks: Sequence[str]) -> list[str]:
    """The first task of each suite."""
    return list({task.partition(".")[0]: task for task in reversed(tasks)}.values())[::-1]


def choose(setting: Setting, tasks: Sequence[str]) -> tuple[dict[str, str], list[Candidate]]:
    """The candidate with the lowest NLL of every method, that of CT-KV with the answers' loss, and all that were tried.

    What was chosen is written to OUT/chosen.json. Nothing is chosen while a run that is only read is not as far.
    """
    used = tuning_tasks(tasks)
    words = [word for method in RATES for word in Plan.candidates(method)]
    found = timings(setting, used, words)
    if timed(used, words, found) != used:
        return {}, []
    specs = {task: {with_length(word, task, found, setting.plan): word for word in words} for task in used}
    by_task = {task: list(of_task) for task, of_task in specs.items()}
    results = setting.run(setting.sweep("choose", used, by_task, seeds=(TUNING_SEED,), split="validation", limit=None))
    named = {task: {str(spec): word for spec, word in of_task.items()} for task, of_task in specs.items()}
    cells: dict[str, list[CellResult]] = {word: [] for word in words}
    for result in results:
        if result.error is None:
            cells[named[result.task][result.method]].append(result)
    tried = [
        Candidate(word, *(statistics.mean(getattr(r, n) for r in mine) for n in ("nll", "accuracy", "cpu_seconds")))
        for word, mine in cells.items()
        if len(mine) == len(used)
    ]
    chosen = {}
    for method in RATES:
        mine = [one for one in tried if one.word.partition(":")[0] == method]
        if not mine and setting.reading:
            return {}, tried
        if not mine:
            sys.exit(f"no candidate of {method} has a result on all of {', '.join(used)}")
        chosen[method] = min(mine, key=lambda one: one.nll).word
    answers = [one for one in tried if one.word.startswith("ct-kv:") and "objective=answers" in one.word]
    chosen[ANSWERS] = min(answers, key=lambda one: one.nll).word
    if not setting.reading and setting.workers.rank == 0:
        atomic_write_json(
            setting.out / "chosen.json",
            {
                "chosen": {label: MethodSpec.parse(word).overrides for label, word in chosen.items()},
                "tasks": used,
                "candidates": [asdict(one) for one in tried],
            },
        )
    return chosen, tried


def test(setting: Setting, tasks: Sequence[str], chosen: Mapping[str, str]) -> list[CellResult]:
    """The results of all methods on the test items."""
    plan = setting.plan
    found = timings(setting, tasks, chosen.values())
    labelled: dict[str, dict[str, MethodSpec]] = {}
    for task in timed(tasks, chosen.values(), found):
        specs = {label: with_length(word, task, found, plan) for label, word in chosen.items()}
        half = with_length(chosen["ct-kv"], task, found, plan, plan.budget / 2)
        labelled[task] = {**{name: MethodSpec(name) for name in UNTRAINED}, **specs, HALF: half}
    return _labelled(setting, labelled)


def ablation(setting: Setting, tasks: Sequence[str], chosen: Mapping[str, str]) -> list[CellResult]:
    """The results of CT-KV with each mask on the test items, with the steps of the chosen one."""
    found = timings(setting, tasks, [chosen["ct-kv"]])
    labelled = {}
    for task in timed(tasks, [chosen["ct-kv"]], found):
        spec = with_length(chosen["ct-kv"], task, found, setting.plan)
        labelled[task] = {label: masked(spec, mask) for label, mask in MASKS.items()}
    return _labelled(setting, labelled)


def masked(spec: MethodSpec, mask: str) -> MethodSpec:
    """CT-KV with another mask; equal to itself where the mask is the same."""
    return MethodSpec(spec.name, {**spec.overrides, **MethodSpec.parse(f"{spec.name}:{mask}").overrides})


def _labelled(setting: Setting, labelled: Mapping[str, Mapping[str, MethodSpec]]) -> list[CellResult]:
    """The results of methods that have a name and, on each task, a length of their own. Methods of equal settings share
    a cell."""
    specs = {task: list(dict.fromkeys(of_task.values())) for task, of_task in labelled.items()}
    results = setting.run(setting.sweep("test", list(labelled), specs))
    cells = {(r.task, r.method, r.seed): r for r in results}
    return [
        replace(cells[task, str(spec), seed], method=label)
        for seed in setting.plan.seeds
        for task, of_task in labelled.items()
        for label, spec in of_task.items()
        if (task, str(spec), seed) in cells
    ]
