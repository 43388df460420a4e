"""Running the cells of a sweep. Finished cells are kept; a cell that fails does not stop the others."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import tokenizer_hash
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.metrics import score_predictions
from ctkernels.tuning.data.suites import Suite, SuiteOptions, Task
from ctkernels.tuning.data.suites.base import Split
from ctkernels.tuning.evaluation.calibration import Calibrate, share_options
from ctkernels.tuning.evaluation.evaluate import EvalResult, ensemble
from ctkernels.tuning.evaluation.sweep.cells import Cell, CellResult, SweepError, read_cell
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.methods.auto import autotune
from ctkernels.tuning.methods.settings import SETTINGS
from ctkernels.tuning.methods.tune import adapter_fingerprint, tune
from ctkernels.tuning.storage import remove_leftovers
from ctkernels.tuning.train.checkpoint import changes, model_fingerprint
from ctkernels.tuning.train.options import RENAMED, Options, layered
from ctkernels.tuning.train.trainer import EpochRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sweep:
    """Every method on every task with every seed.

    folder: that of the suite's files, None if a package has them.  split: which items are scored.
    specs: the methods, or those of each task by its name.
    limit: score only so many items of each task, the first ones.  preset: name of a benchmark's settings.
    common: settings of all methods; those of a `MethodSpec` replace them.
    calibrate: how the offsets of the calibrated scores are found, for tasks whose items share their options.
    text_format: fields of `TextFormat` that replace those of the suite.
    start_from: another task's adapter for the methods that are `transferred`.
    """

    suite: Suite
    folder: Path | None
    tasks: Sequence[str]
    specs: Sequence[MethodSpec] | Mapping[str, Sequence[MethodSpec]]
    seeds: Sequence[int]
    out: Path
    split: Split = "test"
    limit: int | None = None
    options: SuiteOptions = field(default_factory=SuiteOptions)
    preset: str | None = None
    common: dict[str, Any] = field(default_factory=dict)
    calibrate: Calibrate = "none"
    text_format: dict[str, Any] = field(default_factory=dict)
    start_from: Adapter | None = None

    def cells(self) -> list[Cell]:
        """All cells, ordered by seed first, so that early results cover all tasks and methods."""
        specs = self.specs if isinstance(self.specs, Mapping) else dict.fromkeys(self.tasks, self.specs)
        return [Cell(task, spec, seed) for seed in self.seeds for task in self.tasks for spec in specs[task]]

    def load(self, task: str, seed: int) -> Task:
        """A task. The last ones are cached.

        Raises:
            DataError: a file is missing or has an unusable line.
        """
        loaded = _load(self.suite, self.folder, task, seed, self.options)
        return replace(loaded, text_format=replace(loaded.text_format, **self.text_format))

    def items(self, task: Task) -> tuple[Demonstration, ...]:
        """The items that are scored."""
        return task.items(self.split)[: self.limit]

    def calibration(self, task: Task) -> Calibrate:
        """How the scores of a task are calibrated."""
        generates = task.by == "generation" or task.views
        return "none" if generates or not share_options(self.items(task)) else self.calibrate

    @cached_property
    def origin(self) -> str:
        """A hash of the adapter that transferred methods start from.

        Raises:
            DataError: there is none.
        """
        if self.start_from is None:
            raise DataError("transferred=true needs start_from, another task's adapter, got none")
        return adapter_fingerprint(self.start_from)

    def settings(self, cell: Cell, task: Task) -> Options:
        """The settings of a cell. If answers are generated, methods that train also learn where an answer ends."""
        return cell.spec.settings(self.preset, **self._others(cell, task))

    def given(self, cell: Cell, task: Task) -> dict[str, Any]:
        """What of them is said, without the method's defaults and the preset."""
        return layered(cell.spec.method.pick(self._others(cell, task)), cell.spec.overrides)

    def _others(self, cell: Cell, task: Task) -> dict[str, Any]:
        others = {**self.common, "seed": cell.seed}
        if task.generates and cell.spec.method.trains != "nothing":
            others["learn_stop"] = True
        return others


class Observer(Protocol):
    """Is told about the progress of a sweep."""

    def started(self, cell: Cell) -> None:
        """A cell starts in this process."""

    def finished(self, cell: Cell, result: CellResult) -> None:
        """A cell ended in this process, perhaps with an error."""

    def refresh(self) -> None:
        """This process is waiting for others."""


def run_sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sweep: Sweep,
    workers: Workers,
    observer: Observer,
    accepted: Callable[[], None] = lambda: None,
) -> list[CellResult]:
    """Compute the missing cells. Returns the results of all cells, in order, when every process has finished.

    accepted: called after the check that finished cells belong to this sweep, before anything is computed.

    Raises:
        SweepError: a finished cell belongs to another sweep, or its file is damaged; before anything is computed.
        TypeError: a model class that is not supported.
    """
    find_decoder(model)  # an unsupported class would fail in every cell
    cells = sweep.cells()
    model_id = {"model": model_fingerprint(model), "tokenizer": tokenizer_hash(tokenizer)}
    for cell in cells:
        _check_finished(sweep, cell, model_id)
    for folder in {cell.path(sweep.out).parent for cell in cells}:
        remove_leftovers(folder)
    workers.wait()  # until every process has checked the finished cells, so that all agree on them
    accepted()
    for number in workers.numbers():
        if number >= len(cells):
            break
        cell = cells[number]
        path = cell.path(sweep.out)
        saved = read_cell(path)
        if saved is not None and saved.error is None:
            continue
        observer.started(cell)
        result = run_cell(model, tokenizer, sweep, cell, model_id)
        result.write(path)
        observer.finished(cell, result)
    workers.wait(observer.refresh)
    results = [read_cell(cell.path(sweep.out)) for cell in cells]
    return [result for result in results if result is not None]


def run_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sweep: Sweep,
    cell: Cell,
    model_id: dict[str, str],
) -> CellResult:
    """Tune and evaluate. An error (unusable data, a loss that is not finite, too little memory) becomes the result."""
    run: dict[str, Any] = {}
    try:
        task = sweep.load(cell.task, cell.seed)
        run = _identity(sweep, cell, task, model_id)
        return _fit_and_score(model, tokenizer, sweep, cell, task, run)
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return CellResult(cell.task, str(cell.spec), cell.seed, run, error=message)


def vote(predictions: Sequence[Sequence[str | None]]) -> list[str]:
    """The most frequent text at each place of several lists; of equally frequent texts the first.

    None is not counted. If all are None, the text is empty.
    """
    winners = []
    for place in zip(*predictions, strict=True):
        counts = Counter(text for text in place if text is not None)
        winners.append(max(counts, key=counts.__getitem__) if counts else "")
    return winners


def _fit_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sweep: Sweep,
    cell: Cell,
    task: Task,
    run: dict[str, Any],
) -> CellResult:
    settings = sweep.settings(cell, task)
    items = sweep.items(task)
    protocol, seed = cell.spec.protocol, cell.seed
    origin = {"start_from": sweep.start_from} if protocol.transferred else {}
    views = [(train, items, task.undo) for train in protocol.apply(task.train, seed)]
    labels = [pair.output for pair in views[0][0] if pair.options]
    for view in task.views:
        turned = view.test if sweep.split == "test" else view.validation
        views += [(train, turned[: sweep.limit], view.undo) for train in protocol.apply(view.train, seed)]
    seconds = seconds_eval = cpu_seconds = 0.0
    history: list[EpochRecord] = []
    scores: list[EvalResult] = []
    predictions: list[list[str | None]] = []
    for train, turned, undo in views:
        started, cpu_started = time.perf_counter(), time.process_time()
        if protocol.auto:
            given = sweep.given(cell, task)
            tuned = autotune(
                model, tokenizer, train, cell.spec.name, given, task.text_format, preset=sweep.preset, **origin
            )
        else:
            tuned = tune(model, tokenizer, train, cell.spec.name, settings, task.text_format, **origin)
        ready, cpu_ready = time.perf_counter(), time.process_time()
        scores.append(
            tuned.adapter.evaluate(
                model,
                tokenizer,
                turned,
                by=task.by,
                metric=task.metric,
                text_format=task.text_format,
                max_tokens=settings.max_tokens,
                max_new_tokens=task.max_new_tokens,
                backend=settings.backend,
                calibrate=sweep.calibration(task),
                validation=task.validation,
            )
        )
        seconds, seconds_eval = seconds + ready - started, seconds_eval + time.perf_counter() - ready
        cpu_seconds += cpu_ready - cpu_started
        history = history or tuned.history
        found = scores[-1].predictions
        predictions.append([undo(text) for text in found] if undo else list(found))
    first = scores[0]
    if len(views) > 1 and not task.views and first.losses is not None:
        whole = ensemble(scores, items)
        voted = whole.predictions
    else:
        whole = first if len(views) == 1 else replace(first, nll=None, ece=None, majority=None)
        voted = vote(predictions)
    return CellResult(
        task=cell.task,
        method=str(cell.spec),
        seed=cell.seed,
        run=run,
        metric=first.metric,
        score=score_predictions(first.metric, voted, items),
        accuracy=score_predictions("accuracy", voted, items),
        gold_loss=whole.gold_loss,
        items=len(items),
        predictions=voted,
        losses=[record.loss for record in history],
        labels=labels,
        steps=sum(record.steps for record in history),
        seconds=seconds,
        seconds_eval=seconds_eval,
        cpu_seconds=cpu_seconds,
        nll=whole.nll,
        ece=whole.ece,
        calibrated=None if whole.calibrated is None else asdict(whole.calibrated),
        majority=None if whole.majority is None else asdict(whole.majority),
    )


def _check_finished(sweep: Sweep, cell: Cell, model_id: dict[str, str]) -> None:
    """Raise SweepError for a finished cell of another sweep. A task whose files are missing now keeps its results."""
    saved = read_cell(cell.path(sweep.out))
    if saved is None or saved.error is not None:
        return
    try:
        task = sweep.load(cell.task, cell.seed)
        now = _identity(sweep, cell, task, model_id)
    except DataError:
        return
    # cells of an earlier version also hold settings that their method does not read, and some under other names
    named = {RENAMED.get(name, name): value for name, value in saved.run.items()}
    read = {name: value for name, value in named.items() if name in now or name not in SETTINGS}
    differing = changes({"calibrate": "none", **read}, now)  # cells of an earlier version do not say so
    if differing:
        path = cell.path(sweep.out)
        raise SweepError(f"{path} belongs to another sweep: {differing}; choose another --out, or remove the file")


def _identity(sweep: Sweep, cell: Cell, task: Task, model_id: dict[str, str]) -> dict[str, Any]:
    """Everything that the numbers of a cell depend on, by name, except the attention backend and batch sizes."""
    settings = asdict(sweep.settings(cell, task))
    seen = [pair for train in cell.spec.protocol.apply(task.train, cell.seed) for pair in train]
    data = [(d.input, d.output, d.options, d.references) for d in (*seen, *sweep.items(task))]
    return {
        **model_id,
        **{name: value for name, value in settings.items() if name not in ("backend", "max_tokens", "layout")},
        "data": hashlib.sha256(repr(data).encode()).hexdigest()[:16],
        "text_format": task.text_format.recorded,
        "views": len(task.views) + 1,
        "calibrate": sweep.calibration(task),
        **cell.spec.protocol.changed(),
        **({"start_from": sweep.origin} if cell.spec.protocol.transferred else {}),
    }


@lru_cache(maxsize=256)
def _load(suite: Suite, folder: Path | None, task: str, seed: int, options: SuiteOptions) -> Task:
    return suite.load_task(folder, task, seed, options)
