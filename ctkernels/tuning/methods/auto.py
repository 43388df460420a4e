"""Tuning without knobs: objective, learning rate and number of epochs are found on the demonstrations themselves.

    objective      options where all demonstrations have some, else answers
    rate, epochs   successive halving (Jamieson and Talwalkar, arXiv 1502.07943) over four rates around the method's
                   own; every rung trains all that are left, with twice the epochs of the rung before, and keeps the
                   half with the lowest loss of the held-out demonstrations (`held_out_loss`, at the best epoch of the
                   smoothed curve)
    result         all demonstrations, trained with the best rate up to its best epoch; epoch 0, what a run starts from,
                   is one of them

Cost is counted in forward passes of a row: a trained row counts three times (its backward pass costs two more), a
held-out one once each time it is looked at. The epochs of the last rung are as many as the budget allows, at most the
method's own. A rung of fewer epochs is a whole run with its own cosine, not the start of a longer one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ctkernels.tuning.data.demonstrations import Demonstration, as_demonstrations
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.methods.base import Method, require_loaded
from ctkernels.tuning.methods.held_out import Fold, Holdout, folds
from ctkernels.tuning.methods.table import get_method
from ctkernels.tuning.methods.tune import Pairs, TuneResult, tune
from ctkernels.tuning.train.checkpoint import fingerprint
from ctkernels.tuning.train.options import LoopOptions
from ctkernels.tuning.train.trainer import EpochRecord, OnEpoch, TrainingError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTORS = (1 / 3, 1, 10 / 3, 10)  # of the method's own learning rates
RATES = ("lr", "ttt_lr")
BUDGET = 500  # forward passes for each demonstration, where none is given


@dataclass(frozen=True)
class Trial:
    """One candidate on one rung.

    rates: its learning rates by name.  epochs: of its training.  curve: loss of the held-out demonstrations before the
    first epoch and after each, the mean over folds; infinite where training failed.  forwards: what it cost.
    """

    rates: dict[str, float]
    epochs: int
    curve: tuple[float, ...]
    forwards: int

    @property
    def smooth(self) -> tuple[float, ...]:
        """The start, then the mean of each epoch and its neighbours: a rate that is too high has a jagged curve, whose
        lowest point is luck."""
        start, *epochs = self.curve
        return start, *(fmean(epochs[max(0, i - 1) : i + 2]) for i in range(len(epochs)))

    @property
    def best_epoch(self) -> int:
        """The first epoch with the lowest smoothed loss; 0 is the start."""
        return self.smooth.index(self.loss)

    @property
    def loss(self) -> float:
        """The lowest smoothed loss."""
        return min(self.smooth)


@dataclass(frozen=True)
class Plan:
    """What a search will run: the candidates, the epochs of each rung, and what all of it costs with the last run."""

    candidates: tuple[dict[str, float], ...]
    rungs: tuple[int, ...]
    forwards: int


@dataclass(frozen=True)
class AutoResult(TuneResult):
    """As `TuneResult`, with what was found.

    trials: all candidates that were tried, in order.  settings: those of the last run, whose cosine is of
    `settings.epochs` and which ended after `epochs`.  forwards: passes that were spent, all together.
    """

    trials: tuple[Trial, ...]
    settings: LoopOptions
    epochs: int
    forwards: int


def make_plan(
    method: Method, settings: LoopOptions, given: Mapping[str, Any], split: Sequence[Fold], budget: int
) -> Plan:
    """The largest search within a budget: as many epochs as fit, at most those of the settings.

    given: settings that are kept as they are; a given `lr` leaves one candidate, given `epochs` stay.

    Raises:
        ValueError: the budget is too small for a single epoch, or for the given epochs.
    """
    names = [name for name in RATES if name in method.reads]
    factors = (1,) if any(name in given for name in names) else FACTORS
    candidates = tuple({name: getattr(settings, name) * factor for name in names} for factor in factors)
    extra = getattr(settings, "ttt_epochs", 0)
    rows, out = len(split[0][0]) + len(split[0][1]), sum(len(held) for _, held in split)
    trained = sum(len(train) for train, _ in split)

    def rungs(epochs: int) -> tuple[int, ...]:
        count = math.ceil(math.log2(len(candidates)))
        return tuple(sorted({math.ceil(epochs / 2**left) for left in range(count + 1)}))  # equal ones would be one run

    def cost(epochs: int) -> int:
        total, left = 3 * (epochs + extra) * rows, len(candidates)
        for length in rungs(epochs):
            total += left * (3 * (length + extra) * trained + (length + 1) * out)
            left = math.ceil(left / 2)
        return total

    least = settings.epochs if "epochs" in given else 1
    if cost(least) > budget:
        raise ValueError(
            f"budget must be at least {cost(least)} forward passes for {least} epoch{'s' if least > 1 else ''} of "
            f"{len(candidates)} learning rate{'s' if len(candidates) > 1 else ''}, got {budget}"
        )
    epochs = max(epochs for epochs in range(least, settings.epochs + 1) if cost(epochs) <= budget)
    return Plan(candidates, rungs(epochs), cost(epochs))


def autotune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Pairs,
    method: str = "ct-kv",
    given: Mapping[str, Any] | None = None,
    text_format: TextFormat | None = None,
    *,
    preset: str | None = None,
    holdout: Holdout = "auto",
    budget: int | None = None,
    known: Mapping[str, Trial] | None = None,
    on_trial: Callable[[str, Trial], None] | None = None,
    on_epoch: OnEpoch | None = None,
    **others: Any,
) -> AutoResult:
    """Adapt a frozen model to a task, without settings: see the head of this file.

    Args:
        model, tokenizer, demonstrations, method, text_format: as in `tune`.
        given: settings that are kept as they are. A learning rate among them is the only candidate; `epochs` is the
            length of the last rung.
        preset: as in `Method.settings`; counts as given.
        holdout: how many demonstrations are held out at a time: see `folds`.
        budget: most forward passes of a row; None: 500 for each demonstration, or what one epoch of the search needs.
        known: trials of a run that was stopped, by their key; they are not run again.
        on_trial: called with the key and the outcome of each new trial.
        on_epoch: as in `tune`, of the last run alone.
        others: further arguments of `tune`: `start_from`, `group`, `ends`, and the checkpoint of the last run.

    Raises:
        DataError: fewer than three demonstrations, and as in `tune`.
        ValueError: a method that trains nothing; a budget that is too small; and as in `tune`.
        TrainingError: training failed with every learning rate.
    """
    require_loaded(model, tokenizer)
    demonstrations = as_demonstrations(demonstrations, "demonstrations")
    how = get_method(method)
    if how.trains == "nothing":
        raise ValueError(f"there is nothing to search for {method}, which trains nothing; use tune")
    given = {**_of_preset(how, preset), **(given or {})}
    if given.get("steps") is not None:
        raise ValueError(f"steps must be None, since the search counts epochs, got {given['steps']}")
    settings = how.settings(preset, **{**_table(demonstrations), **given})
    assert isinstance(settings, LoopOptions)  # of a method that trains
    split = folds(demonstrations, holdout, settings.seed)
    plan = _plan(how, settings, given, split, budget, len(demonstrations))
    common = {name: others.get(name) for name in ("start_from", "group", "ends")}
    trials: list[Trial] = []
    data = [(pair.input, pair.output, pair.options, pair.references) for pair in demonstrations]

    def run(rates: dict[str, float], epochs: int) -> Trial:
        now = replace(settings, **rates, epochs=epochs)
        key = fingerprint((sorted(asdict(now).items()), method, holdout, data, text_format))
        found = (known or {}).get(key)
        if found is None:
            found = _tried(model, tokenizer, split, method, now, text_format, rates, common)
            if on_trial is not None:
                on_trial(key, found)
        trials.append(found)
        return found

    left = list(plan.candidates)
    for epochs in plan.rungs:
        rung = sorted((run(rates, epochs) for rates in left), key=lambda trial: trial.loss)
        left = [trial.rates for trial in rung[: math.ceil(len(rung) / 2)]]
    best = rung[0]
    if not math.isfinite(best.loss):
        raise TrainingError(f"training failed with every learning rate: {[trial.rates for trial in trials]}")
    settings = replace(settings, **best.rates, epochs=best.epochs if best.best_epoch else 0)

    def stop(record: EpochRecord, module: nn.Module) -> bool:
        asked = on_epoch is not None and bool(on_epoch(record, module))
        return asked or (not record.stage and record.epoch >= best.best_epoch)

    last = tune(model, tokenizer, demonstrations, method, settings, text_format, on_epoch=stop, **others)
    spent = sum(trial.forwards for trial in trials) + 3 * len(demonstrations) * len(last.history)
    return AutoResult(last.adapter, last.history, tuple(trials), settings, best.best_epoch, spent)


def _table(demonstrations: Sequence[Demonstration]) -> dict[str, Any]:
    """Settings that depend on the demonstrations, as the reproduction found them (docs/methods.md)."""
    return {"objective": "options"} if all(pair.options for pair in demonstrations) else {}


def _of_preset(method: Method, preset: str | None) -> dict[str, Any]:
    """The settings that a preset changes."""
    plain, asked = asdict(method.settings()), asdict(method.settings(preset))
    return {name: value for name, value in asked.items() if value != plain[name]}


def _plan(
    method: Method,
    settings: LoopOptions,
    given: Mapping[str, Any],
    split: Sequence[Fold],
    budget: int | None,
    count: int,
) -> Plan:
    if budget is not None:
        return make_plan(method, settings, given, split, budget)
    try:
        return make_plan(method, settings, given, split, BUDGET * count)
    except ValueError:  # the given epochs are more
        return make_plan(method, settings, given, split, 10**12)


def _tried(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Sequence[Fold],
    method: str,
    settings: LoopOptions,
    text_format: TextFormat | None,
    rates: dict[str, float],
    common: dict[str, Any],
) -> Trial:
    curves: list[list[float]] = []
    forwards = 0
    for train, held_out in split:
        try:
            found = tune(model, tokenizer, train, method, settings, text_format, held_out=held_out, **common)
        except ArithmeticError:  # of training, or of the held-out losses
            curves.append([math.inf])
            continue
        curves.append(found.held_out)
        forwards += len(found.history) * (3 * len(train) + len(held_out)) + len(held_out)
    failed = any(curve == [math.inf] for curve in curves)
    mean = (math.inf,) if failed else tuple(fmean(values) for values in zip(*curves, strict=True))
    return Trial(rates, settings.epochs, mean, forwards)
