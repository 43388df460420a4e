"""`tune`: a task, a model and the name of a method become an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ctkernels import dispatch
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import Demonstration, as_demonstrations
from ctkernels.tuning.data.formats import PairEncoder, TextFormat
from ctkernels.tuning.methods.base import (
    Method,
    Run,
    require_demonstrations,
    require_loaded,
    require_transferable,
    require_weights,
)
from ctkernels.tuning.methods.held_out import held_out_loss, require_epochs
from ctkernels.tuning.methods.table import get_method
from ctkernels.tuning.storage import locked
from ctkernels.tuning.train.checkpoint import fingerprint, model_fingerprint
from ctkernels.tuning.train.distributed import Ranks, is_sharded
from ctkernels.tuning.train.graphs import require_capture
from ctkernels.tuning.train.learners import Learner
from ctkernels.tuning.train.loop import train_learner
from ctkernels.tuning.train.options import LoopOptions, Options
from ctkernels.tuning.train.trainer import EpochRecord, OnEpoch, RunControl, Training, Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


S = TypeVar("S", bound=Options)
Pairs = Iterable[Demonstration | Mapping[str, Any]] | str | Path


@dataclass(frozen=True)
class TuneResult:
    """An adapter and how it came to be (`history` is empty for methods that train nothing)."""

    adapter: Adapter
    history: list[EpochRecord]

    @property
    def prefix(self) -> KVPrefix:
        """The adapter's prefix. For methods that also change weights, use the adapter."""
        return self.adapter.prefix

    @property
    def held_out(self) -> list[float]:
        """Loss of the held-out pairs before the first epoch of the last loop and after each; empty without any."""
        last = [record for record in self.history if not record.stage]
        curve = [last[0].held_out_start, *(record.held_out for record in last)] if last else []
        return [loss for loss in curve if loss is not None]


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Pairs,
    method: str = "ct-kv",
    settings: Options | Mapping[str, Any] | None = None,
    text_format: TextFormat | None = None,
    *,
    start_from: Adapter | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 5,
    resume: bool = False,
    on_epoch: OnEpoch | None = None,
    group: ProcessGroup | None = None,
    held_out: Pairs = (),
    patience: int | None = None,
    ends: Callable[[], bool] | None = None,
) -> TuneResult:
    """Adapt a frozen model to a task: the adapter of `method` for these demonstrations, trained if the method trains.

    Args:
        model: a supported causal language model; its weights and its mode are left as they were.
        tokenizer: the model's.
        demonstrations: the task's pairs; also mappings with their fields, such as the rows of a `datasets.Dataset`, or
            the path of a JSONL file.
        method: a name of `methods.METHODS`.
        settings: of the method (`METHODS[method].settings()`, the default), `TrainSettings`, or a mapping of those that
            differ from the defaults.
        text_format: how pairs become tokens.
        start_from: another task's adapter of the same model to start from: methods that start from demonstrations
            put its prefix or prompt in front of them, others take it in place of their own; ttt takes its LoRA.
        checkpoint_dir, checkpoint_every: where to keep a checkpoint, and after how many epochs to replace it.
        resume: continue from the checkpoint, if there is one; the run ends with the same bits as if never stopped.
        on_epoch: called with the record and what is trained after every epoch, before its checkpoint, on every process;
            nothing is attached then, so that it may evaluate. True (from any process) ends the stage with this epoch.
        group: a `torch.distributed` process group whose processes all make this call and share the rows of each step;
            all of them return the result of one process, the first one writes checkpoints, which all of them must be
            able to read. None: this process alone.
        held_out: pairs that are not trained. The result is what had their lowest loss (`held_out_loss`), before the
            first epoch or after one; records and checkpoints have the curve.
        patience: end a loop after so many epochs without a lower loss of the held-out pairs; None runs all epochs.
        ends: asked after every epoch, for instance whether a signal came; True (from any process) writes a checkpoint
            and raises `train.trainer.Interrupted`, a KeyboardInterrupt, so that the run can be resumed.

    Raises:
        DataError: too few demonstrations, or more tokens than the model takes.
        OutputError: another run holds `checkpoint_dir`.
        ValueError: an unknown method; settings that it does not read; an adapter it cannot start from; an unknown or
            unavailable backend; graph="on" where steps cannot be captured; sharded or offloaded weights that the method
            needs in one piece; held-out pairs for a method that trains nothing.
        TypeError: a model class that is not supported; the name of a model or tokenizer instead of itself.
        CheckpointError: `resume` with other settings, data or model than the checkpoint's.
        TrainingError: the loss is not finite, or has no gradient.
        PeerError: another process of the group failed.
    """
    require_loaded(model, tokenizer)
    demonstrations, held_out = (
        as_demonstrations(demonstrations, "demonstrations"),
        as_demonstrations(held_out, "held_out"),
    )
    ranks = Ranks(group, model.device, sharded=is_sharded(model))
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    with ranks.together(), locked(folder) if folder is not None and ranks.writes else nullcontext():
        how = get_method(method)
        own = settings_of(how, settings)
        control = RunControl(folder, checkpoint_every, resume, on_epoch, ranks, ends)
        run = make_run(model, tokenizer, demonstrations, how, own, text_format, control, start_from, held_out, patience)
        return TuneResult(how.fit(run), run.history)


def make_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    method: Method,
    settings: Options,
    text_format: TextFormat | None,
    control: RunControl,
    start_from: Adapter | None,
    held_out: Sequence[Demonstration],
    patience: int | None,
) -> Run[Any]:
    """A run, after what can be refused before the model runs. Arguments and errors as those of `tune`."""

    def train(
        learner: Learner,
        of_stage: LoopOptions | None = None,
        stage: str = "",
        result: Callable[[], Adapter] | None = None,
    ) -> None:
        run.history.extend(train_learner(training_of(run, control, learner, of_stage, stage, result)))

    text_format = text_format or TextFormat()
    settings = with_objective(settings, demonstrations)
    run = Run(
        model,
        tokenizer,
        tuple(demonstrations),
        method.name,
        settings,
        text_format,
        start_from,
        train,
        tuple(held_out),
        patience,
    )
    require_demonstrations(method, len(demonstrations), settings)
    require_transferable(method, start_from, model)
    require_weights(method, model)
    require_epochs(method, held_out, patience)
    if settings.backend is not None:
        dispatch.choose(settings.backend, model.device)  # refuses an unusable one
    if isinstance(settings, LoopOptions):
        require_capture(model, settings, control.ranks)
    report_delimiters(tokenizer, demonstrations, text_format)
    return run


def settings_of(method: Method, settings: Options | Mapping[str, Any] | None) -> Options:
    """What `tune` takes for settings, as the method's own. Raises ValueError, TypeError."""
    return method.settings(**(settings or {})) if isinstance(settings, Mapping | None) else method.accept(settings)


def training_of(
    run: Run[Any],
    control: RunControl,
    learner: Learner,
    settings: LoopOptions | None = None,
    stage: str = "",
    result: Callable[[], Adapter] | None = None,
) -> Training:
    """The training of a learner of a run; the last three arguments are those of `run.train`."""
    origin = None if run.start_from is None else adapter_fingerprint(run.start_from)
    identity = {"method": run.method, "stage": stage, "start_from": origin}
    watch = None
    if run.held_out and result is not None:
        pairs = [(d.input, d.output, d.options, d.references) for d in run.held_out]
        identity["held_out"] = fingerprint([*pairs, run.patience])
        watch = Watch(lambda: held_out_loss(run, result(), run.held_out), run.patience)
    return Training(run.model, learner, settings or run.settings, control, stage=stage, identity=identity, watch=watch)


def with_objective(settings: S, demonstrations: Sequence[Demonstration]) -> S:
    """The settings with the objective that None takes for these demonstrations. On validation items every method chose
    better when it was trained on the choice (docs/methods.md, the reproduction)."""
    if not isinstance(settings, LoopOptions) or settings.objective is not None:
        return settings
    return replace(settings, objective="options" if all(pair.options for pair in demonstrations) else "answers")


def report_delimiters(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], text_format: TextFormat
) -> None:
    """Warn of outputs to generate that contain the delimiter, where generation would end."""
    encoder = PairEncoder(tokenizer, text_format)
    free = [pair for pair in demonstrations if not pair.options]
    cut = [pair for pair in free if encoder.delimiter in encoder.answer(pair, pair.output)]
    if cut:
        first = cut[0].source or repr(cut[0].output[:40])
        warnings.warn(
            f"{len(cut)} of {len(demonstrations)} outputs contain the delimiter {text_format.delimiter!r}, at which "
            f"generation stops, the first is {first}; choose another delimiter, such as '\\n'",
            stacklevel=4,
        )


def adapter_fingerprint(adapter: Adapter) -> str:
    """A short hash of what a run that starts from an adapter takes of it."""
    parts = [model_fingerprint(module) for module in (adapter.prefix, adapter.prompt) if module is not None]
    weights = {} if adapter.lora is None else adapter.lora.tensors
    parts += [(name, tensor.flatten()[:16].tolist()) for name, tensor in weights.items()]
    return fingerprint(parts)
