"""Which tasks are taken. The rule reads validation items alone:

    in-context learning with 16 demonstrations (mean accuracy over 3 draws; calibrated where items share their options)
    is at least 5 points above the majority class (above chance, the mean of 1 / number of options, where they do not)

Of the tasks that pass, the first ones by name are taken: the best ones would favour in-context learning. The shipped
tasks are always taken.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.reproduce.plan import DRAWS, MOST_TASKS, Plan, Setting
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.data.suites import Task
from ctkernels.tuning.evaluation.calibration import share_options
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.storage import atomic_write_json


@dataclass(frozen=True)
class Screened:
    """A task and the rule.

    tokens: mean tokens of k demonstrations, k those of the test.  accuracy: of in-context learning, or None where it
    was not run.  baseline: that of the majority class, or chance.  taken: whether the task is tested.
    reason: why it is not, or by what it is.
    """

    task: str
    tokens: int
    accuracy: float | None
    baseline: float | None
    taken: bool
    reason: str

    @property
    def suite(self) -> str:
        return self.task.partition(".")[0]


def screen(setting: Setting, names: Sequence[str]) -> list[Screened]:
    """Every task with its numbers, in the order of the names."""
    plan = setting.plan
    how = {"seeds": DRAWS, "split": "validation", "shots": plan.screen_shots}
    sweep = setting.sweep("screen", names, [MethodSpec("icl")], **how)
    tasks = {name: load_whole(setting, name) for name in names}
    tokens = {name: mean_tokens(setting, task) for name, task in tasks.items()}
    why = {name: unfit(plan, len(tasks[name].train), tokens[name]) for name in names}
    fit = [name for name in names if not why[name]]
    results = setting.run(replace(sweep, tasks=fit)) if fit else []
    screened = []
    for name in names:
        mine = [result for result in results if result.task == name]
        errors = [result.error for result in mine if result.error is not None]
        if why[name] or errors or not mine:
            reason = why[name] or "; ".join(errors[:1]) or "not run yet"
            screened.append(Screened(name, tokens[name], None, None, False, reason))
            continue
        accuracy, base = statistics.mean(map(accuracy_of, mine)), baseline(tasks[name])
        passed = accuracy - base >= plan.margin
        screened.append(Screened(name, tokens[name], accuracy, base, passed, "" if passed else "below the margin"))
    screened = limited(screened)
    if not setting.reading and setting.workers.rank == 0:
        atomic_write_json(setting.out / "screen.json", [asdict(one) for one in screened])
    return screened


def load_whole(setting: Setting, name: str) -> Task:
    """A task whose demonstrations are its whole pool, in the text format of the run."""
    sweep = setting.sweep("", [name], [])
    whole = sweep.suite.load_task(setting.folder, name, 0, replace(sweep.options, shots=None))
    return replace(whole, text_format=replace(whole.text_format, **sweep.text_format))


def mean_tokens(setting: Setting, task: Task) -> int:
    """Of as many demonstrations of the pool as are tested."""
    whole = encode_context(setting.tokenizer, task.train, task.text_format)
    return round(setting.plan.shots * len(whole.input_ids) / len(task.train))


def unfit(plan: Plan, pool: int, tokens: int) -> str:
    """Why a task cannot be screened; empty if it can."""
    if pool < plan.screen_shots:
        return f"{pool} demonstrations to draw from, fewer than {plan.screen_shots}"
    if tokens > plan.most_tokens:
        return f"{plan.shots} demonstrations have more than {plan.most_tokens} tokens"
    return ""


def accuracy_of(result: CellResult) -> float:
    """Calibrated where the items share their options."""
    return result.accuracy if result.calibrated is None else result.calibrated["accuracy"]


def baseline(task: Task) -> float:
    """Accuracy on the validation items of the majority class, or of chance where items have options of their own."""
    items = task.validation
    if share_options(items):
        return max(Counter(item.output for item in items).values()) / len(items)
    return statistics.mean(1 / len(item.options or ("",)) for item in items)


def limited(screened: Sequence[Screened]) -> list[Screened]:
    """The same with at most `MOST_TASKS` of a suite taken, the first ones, and every shipped task."""
    found, counts = [], Counter[str]()
    for one in screened:
        if one.suite not in MOST_TASKS:
            one = replace(one, taken=True, reason="shipped")
        elif one.taken and counts[one.suite] == MOST_TASKS[one.suite]:
            one = replace(one, taken=False, reason=f"passed, but {MOST_TASKS[one.suite]} of the suite come before it")
        counts[one.suite] += one.taken
        found.append(one)
    return found
