"""`tune_many`: several tasks, each with an adapter of its own, over one model at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.demonstrations import as_demonstrations
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.methods.base import Run, require_loaded
from ctkernels.tuning.methods.table import get_method
from ctkernels.tuning.methods.tune import Pairs, TuneResult, make_run, settings_of, training_of
from ctkernels.tuning.storage import file_name, locked
from ctkernels.tuning.train.checkpoint import FILE_NAME
from ctkernels.tuning.train.distributed import is_sharded
from ctkernels.tuning.train.learners import PrefixLearner
from ctkernels.tuning.train.options import Options, layered
from ctkernels.tuning.train.together import train_together
from ctkernels.tuning.train.trainer import EpochRecord, RunControl, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnEpochOf = Callable[[str, EpochRecord, nn.Module], bool | None]


@dataclass(frozen=True)
class TuneTask:
    """One of the tasks of `tune_many`.

    demonstrations, start_from, held_out, patience: as in `tune`.
    settings: a mapping of those that differ from the others' settings, or settings in place of them.
    text_format: None is that of all tasks.
    """

    demonstrations: Pairs
    settings: Options | Mapping[str, Any] | None = None
    text_format: TextFormat | None = None
    start_from: Adapter | None = None
    held_out: Pairs = ()
    patience: int | None = None


@dataclass(frozen=True)
class ManyResult:
    """What `tune_many` returns, by the names of the tasks, in their order.

    results: of the tasks that were tuned.  errors: of those that failed.
    """

    results: dict[str, TuneResult]
    errors: dict[str, Exception]

    def __getitem__(self, name: str) -> TuneResult:
        """The result of a task. Raises the error with which it failed, or KeyError."""
        if name in self.errors:
            raise self.errors[name]
        return self.results[name]


def tune_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Pairs | TuneTask],
    method: str = "ct-kv",
    settings: Options | Mapping[str, Any] | None = None,
    text_format: TextFormat | None = None,
    *,
    memory_bytes: int = 4 << 30,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    on_epoch: OnEpochOf | None = None,
    ends: Callable[[], bool] | None = None,
) -> ManyResult:
    """Adapt a frozen model to several tasks at once: for each what `tune` returns for it.

    Methods that train a prefix (ct-kv, prefix-tuning, meta-prefix) take steps of all tasks together: rows run in common
    passes, and every prefix has the gradient, clipping, optimiser, learning rate, dropped tokens and end that it would
    have alone. So each adapter equals that of `tune`, up to the order of floating-point sums. Other methods tune one
    task after the other. A task that fails (bad data, a loss that is not finite) does not stop the others. Seconds in
    records are those of an epoch in which the other tasks took their steps, too.

    Args:
        model, tokenizer, method: as in `tune`.
        tasks: by name; what `tune` takes for demonstrations, or a `TuneTask` with more that is a task's own.
        settings, text_format: as in `tune`, of all tasks.
        memory_bytes: how much prefixes in training may take together, with gradients, the optimiser's moments and a
            copy of all of them side by side; further tasks wait until others are done. A larger one is trained alone.
            Activations are bounded by the setting `max_tokens`, which counts the rows of all tasks of a pass.
        checkpoint_dir: each task has a folder in it, as `tune` has one.
        checkpoint_every, resume: as in `tune`, for each task; finished tasks are read from their checkpoints. Sums may
            have another order than in a run that was never stopped, as other tasks may be in a pass.
        on_epoch: as in `tune`, called with the name of the task first; True ends that task.
        ends: as in `tune`; every task that has begun goes on to the end of its epoch, then `Interrupted` is raised.

    Raises:
        TypeError, ValueError, OutputError: arguments that are wrong for all tasks, such as a checkpoint that is not
            resumed, or a model that is spread over processes. What `tune` raises for one task alone is in `errors`.
    """
    require_loaded(model, tokenizer)
    how = get_method(method)
    common = settings_of(how, settings)
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must be a mapping of names to demonstrations, got {type(tasks).__name__}")
    if not tasks:
        raise ValueError("tasks must hold at least one task, got none")
    if memory_bytes < 0:
        raise ValueError(f"memory_bytes must be at least 0, got {memory_bytes}")
    if is_sharded(model):
        raise ValueError(
            f"tune_many needs a model in one piece, and the weights of this {type(model).__name__} are spread over "
            "processes; tune its tasks one after the other, with tune"
        )
    find_decoder(model)  # an unsupported class would fail with every task
    root = None if checkpoint_dir is None else Path(checkpoint_dir)
    stop = None if ends is None else _latched(ends)
    controls = {
        name: RunControl(
            checkpoint_dir=None if root is None else root / file_name(name),
            checkpoint_every=checkpoint_every,
            resume=resume,
            on_epoch=None if on_epoch is None else partial(on_epoch, name),
            ends=stop,
        )
        for name in tasks
    }
    done: dict[str, TuneResult | Exception] = {}

    def run_of(name: str) -> Run[Any]:
        task = tasks[name]
        task = task if isinstance(task, TuneTask) else TuneTask(task)
        own = common
        if isinstance(task.settings, Mapping):
            own = how.settings(**layered(asdict(common), task.settings))
        elif task.settings is not None:
            own = how.accept(task.settings)
        if how.learner is not None and getattr(own, "graph", "off") == "on":
            raise ValueError("graph='on' captures the steps of one adapter, and those of several are taken together")
        return make_run(
            model,
            tokenizer,
            as_demonstrations(task.demonstrations, "demonstrations"),
            how,
            own,
            task.text_format or text_format,
            controls[name],
            task.start_from,
            as_demonstrations(task.held_out, "held_out"),
            task.patience,
        )

    def start(name: str, make: Callable[[Run[Any]], PrefixLearner]) -> Training:
        run = run_of(name)
        learner = make(run)
        return training_of(run, controls[name], learner, result=lambda: Adapter(learner.current()))

    with nullcontext() if root is None else locked(root):
        for folder in () if resume else (control.checkpoint_dir for control in controls.values()):
            if folder is not None and any(folder.rglob(FILE_NAME)):
                raise ValueError(f"checkpoint_dir already holds {folder}; resume from it, or choose another folder")
        if how.learner is None:
            for name in tasks:
                try:
                    run = run_of(name)
                    done[name] = TuneResult(how.fit(run), run.history)
                except Exception as error:
                    done[name] = error
        else:
            starts = {name: partial(start, name, how.learner) for name in tasks}
            for name, outcome in train_together(model, starts, memory_bytes):
                done[name] = outcome if isinstance(outcome, Exception) else _result(outcome)
    return ManyResult(
        {name: x for name in tasks if isinstance(x := done[name], TuneResult)},
        {name: x for name in tasks if isinstance(x := done[name], Exception)},
    )


def _result(training: Training) -> TuneResult:
    history = training.end()
    assert isinstance(training.learner, PrefixLearner)
    return TuneResult(Adapter(training.learner.result()), history)


def _latched(ends: Callable[[], bool]) -> Callable[[], bool]:
    """`ends` that keeps to a yes, so that all tasks hear it."""
    came: list[bool] = []

    def asked() -> bool:
        if not came and ends():
            came.append(True)
        return bool(came)

    return asked
