"""What is run: the methods and their candidate settings, the sizes, and where results are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ctkernels.cli.view import SweepView
from ctkernels.tuning.data.suites import SuiteOptions, get_suite
from ctkernels.tuning.evaluation.sweep.cells import CellResult, read_cell
from ctkernels.tuning.evaluation.sweep.run import Sweep, run_sweep
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers

DRAWS = (100, 101, 102)  # seeds of the demonstrations that choose tasks; none of them is tested
TUNING_SEED = DRAWS[0]  # and those that choose settings
OBJECTIVES = ("answers", "options")
UNCUT = 1 << 20  # more tokens than any item has: the question is often at its end
MASKS = {  # of CT-KV: what is hidden from a row, and how many of the other tokens are dropped
    "both": "leave_one_out=self:drop_p=0.05",
    "leave-one-out alone": "leave_one_out=self:drop_p=0",
    "token dropout alone": "leave_one_out=none:drop_p=0.05",
    "neither": "leave_one_out=none:drop_p=0",
}
# Learning rates to try: random tokens need larger steps than demonstrations, and weights smaller ones than both
RATES = {
    "prompt-tuning": ("lr=3e-3", "lr=1e-2", "lr=3e-2", "lr=1e-1"),
    "prefix-tuning": ("lr=1e-3", "lr=3e-3", "lr=1e-2", "lr=3e-2"),
    "ct-prompt": ("lr=1e-3", "lr=3e-3", "lr=1e-2", "lr=3e-2"),
    "ct-kv": ("lr=1e-3", "lr=3e-3", "lr=1e-2", "lr=3e-2"),
    "ttt": ("lr=1e-4", "lr=3e-4", "lr=1e-3", "lr=3e-3"),
    "ttt+ct-kv": tuple(f"ttt_lr={weights}:lr={prefix}" for weights in ("3e-4", "1e-3") for prefix in ("3e-3", "1e-2")),
}
UNTRAINED = ("zero-shot", "icl")
MOST_TASKS = {"nlp_lr": 8, "bbh": 4, "mmlu": 4}  # of a suite; all shipped ones are taken


@dataclass(frozen=True)
class Plan:
    """How much is run.

    seeds: of the test.  budget: CPU seconds of tuning, for every method on every task.
    shots: demonstrations of a task.  screen_shots: of the in-context learning that decides which tasks are taken.
    limit: test items of a task.  most_epochs, least_steps: bounds of what the budget buys.
    margin: by how much in-context learning must be above its baseline.
    most_tokens: a task whose demonstrations have more tokens on average is left out.
    shot_counts: k of the accuracy against k.  shot_seeds, shot_tasks: how many of them.
    shot_epochs: of each method there.  shot_seconds: a method's k stops growing when an epoch would take longer.
    """

    seeds: tuple[int, ...] = (13,)
    budget: float = 20.0
    shots: int = 8
    screen_shots: int = 16
    limit: int = 100
    most_epochs: int = 60
    least_steps: int = 4
    margin: float = 0.05
    most_tokens: int = 1000
    shot_counts: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    shot_seeds: int = 3
    shot_tasks: int = 3
    shot_epochs: tuple[tuple[str, int], ...] = (("ct-kv", 10), ("ct-prompt", 5), ("ttt", 4))
    shot_seconds: float = 20.0

    @staticmethod
    def candidates(method: str) -> list[str]:
        """The settings that are tried for a method, but for its length."""
        mask = f":{MASKS['both']}" if method in ("ct-kv", "ttt+ct-kv") else ""
        return [f"{method}:{rate}:objective={objective}{mask}" for objective in OBJECTIVES for rate in RATES[method]]


@dataclass(frozen=True)
class Setting:
    """Where it runs: the processes, the model, the folder of the tasks, and that of the results.

    reading: nothing is computed; the results that are there are read.
    """

    workers: Workers
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    out: Path
    plan: Plan
    reading: bool = False

    def sweep(
        self,
        name: str,
        tasks: Sequence[str],
        specs: Sequence[MethodSpec] | Mapping[str, Sequence[MethodSpec]],
        shots: int | None = None,
        **others: Any,
    ) -> Sweep:
        """A sweep over the tasks whose cells are in OUT/NAME."""
        asked = {"seeds": self.plan.seeds, "limit": self.plan.limit, **others}
        return Sweep(
            suite=get_suite("jsonl"),
            folder=self.folder,
            tasks=tasks,
            specs=specs,
            out=self.out / name,
            options=SuiteOptions(shots or self.plan.shots),
            calibrate="batch",
            text_format={"delimiter": "\n", "max_pair_tokens": UNCUT},
            **asked,
        )

    def run(self, sweep: Sweep) -> list[CellResult]:
        """The results of a sweep, computed where they are missing."""
        if self.reading:
            found = (read_cell(cell.path(sweep.out)) for cell in sweep.cells())
            return [result for result in found if result is not None]
        with SweepView(sweep, self.workers) as view:
            return run_sweep(self.model, self.tokenizer, sweep, self.workers, view)
