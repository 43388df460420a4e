"""`ctkernels tune --holdout`: which run that is, and the file that keeps the trials of a search."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctkernels.cli.parse import UsageError
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.methods.auto import Trial, autotune
from ctkernels.tuning.methods.held_out import folds
from ctkernels.tuning.methods.tune import TuneResult, tune
from ctkernels.tuning.storage import atomic_write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.cli.options import TuneConfig
    from ctkernels.tuning.train.options import Options


def check(config: TuneConfig) -> None:
    """Refuse what cannot go together, before a model is loaded. Raises UsageError."""
    if config.holdout is None and config.budget is not None:
        raise UsageError("budget is for a search on held-out demonstrations; add --holdout auto or a number")
    if config.patience is not None and (config.holdout in (None, "auto") or config.budget is not None):
        raise UsageError(
            "patience is for a run with demonstrations held out and no search: --holdout N without --budget"
        )


def run(
    config: TuneConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    settings: Options,
    show: Callable[[str], None],
    **others: Any,
) -> TuneResult:
    """The run that `config` asks for; `others` are arguments of `tune`, `show` gets a line for each trial."""
    if config.holdout is None:
        return tune(model, tokenizer, demonstrations, config.method, settings, config.text_format(), **others)
    if isinstance(config.holdout, int) and config.budget is None:
        ((train, held_out),) = folds(demonstrations, config.holdout, settings.seed)
        chosen = {"held_out": held_out, "patience": config.patience}
        return tune(model, tokenizer, train, config.method, settings, config.text_format(), **chosen, **others)
    path = Path(config.out or "") / "search.json"
    kept = read_trials(path) if config.resume else {}

    def on_trial(key: str, trial: Trial) -> None:
        kept[key] = trial
        group = others.get("group")
        if group is None or group.rank() == 0:
            atomic_write_json(path, {name: asdict(one) for name, one in kept.items()})
        show(one_line(trial))

    return autotune(
        model,
        tokenizer,
        demonstrations,
        config.method,
        config.given(),
        config.text_format(),
        preset=config.preset,
        holdout=config.holdout,
        budget=config.budget,
        known=dict(kept),
        on_trial=on_trial,
        **others,
    )


def one_line(trial: Trial) -> str:
    """What a trial found, for people."""
    rates = ", ".join(f"{name} {rate:.2g}" for name, rate in trial.rates.items())
    return f"{rates}, {trial.epochs} epochs: held-out loss {trial.loss:.4f} after epoch {trial.best_epoch}"


def read_trials(path: Path) -> dict[str, Trial]:
    """The trials of a file by their keys; none if there is no file.

    Raises:
        UsageError: a file that is not one of a search.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: Trial(**{**one, "curve": tuple(one["curve"])}) for key, one in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} holds no trials of a search ({error}); remove it to search again") from None
