"""Evaluation of a prefix on test items: by the loss of each option, or by greedy generation and exact match.

As in MetaICL (scores: see `metrics.py`):

    prediction   the option with the lowest loss, of equal ones the first; the loss is the mean cross-entropy (nats) of
                 the option's tokens, or as `score` says
    gold loss    mean over items of the mean cross-entropy of the output's tokens
    calibrated   the same with an offset subtracted from the loss of each option (`calibration.py`)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ctkernels.tuning.data.demonstrations import DataError, Demonstration, as_demonstrations
from ctkernels.tuning.data.formats import PairEncoder, Score, TextFormat
from ctkernels.tuning.data.metrics import Metric, default_metric, score_predictions
from ctkernels.tuning.evaluation import calibration
from ctkernels.tuning.evaluation.calibration import Calibrate, Losses, Offsets
from ctkernels.tuning.evaluation.scoring import Scorer
from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.hf.protocols import PrefixLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Calibrated:
    """Scores after an offset was subtracted from the loss of each option; as in `EvalResult`."""

    offsets: Offsets
    score: float
    accuracy: float
    nll: float
    ece: float
    predictions: list[str]


@dataclass(frozen=True)
class Majority:
    """What always answering the most frequent right option of the scored items would score; of equal ones the first."""

    option: str
    score: float
    accuracy: float


@dataclass(frozen=True)
class EvalResult:
    """Scores of one prefix on one test set.

    metric: name of the score.  score: its value.  accuracy: share of right predictions.  gold_loss: in nats.
    items: number of items.  predictions: one per item.

    Of items with options alone, else None: losses of each option of each item; nll and ece as in
    `calibration.Reliability`; calibrated: the same with offsets; majority: where all items share their options.
    """

    metric: Metric
    score: float
    accuracy: float
    gold_loss: float
    items: int
    predictions: list[str]
    nll: float | None = None
    ece: float | None = None
    calibrated: Calibrated | None = None
    majority: Majority | None = None
    losses: Sequence[Losses] | None = None


def evaluate_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Demonstration],
    prefix: PrefixLike,
    *,
    by: Literal["options", "generation"] | None = None,
    metric: Metric | None = None,
    text_format: TextFormat | None = None,
    encoder: PairEncoder | None = None,
    max_tokens: int = 4096,
    max_new_tokens: int = 32,
    backend: str | None = None,
    score: Score | None = None,
    calibrate: Calibrate | None = None,
    validation: Sequence[Demonstration] = (),
    offsets: Offsets | None = None,
) -> EvalResult:
    """Evaluate `prefix`, such as a `KVPrefix`, on test items.

    Args:
        by: "options" or "generation"; None takes "options" if every item has options.
        metric: the score; None takes macro-F1 for classification, accuracy for other choices, exact match otherwise.
        text_format: how items become tokens; default: that of the prefix's demonstrations.
        encoder: turns items into tokens, instead of a `PairEncoder` for `text_format`.
        max_tokens: most tokens of one batch.
        max_new_tokens: most tokens of a generated answer.
        backend: as in `ctkernels.prefix_attention`.
        score: form of an option's loss; None takes that of the prefix's settings, which trained it where an objective
            reads options.
        calibrate: how the offsets of the calibrated scores are found, or "none"; None takes `offsets` if they fit.
        validation: labelled items, none of them scored, for calibrate="dev".
        offsets: stored ones.

    Raises:
        DataError: there are no items, an item has no options or two options with the same tokens, an output contains
            the delimiter, or an item does not fit into the model's context; calibration of items that do not share
            their options, or without the validation items that it needs.
        ValueError: an unknown `by`, `score` or `calibrate`; a prefix that was made for other weights.
        ArithmeticError: the loss of an option is not a number: the weights or the prefix are not finite.
    """
    items = as_demonstrations(items, "items")
    if not items:
        raise DataError("evaluation needs test items, got none")
    if by is None:
        by = "options" if all(item.options for item in items) else "generation"
    if by not in ("options", "generation"):
        raise ValueError(f"by must be 'options' or 'generation', got {by!r}")
    if text_format is None:
        text_format = TextFormat(**prefix.metadata.settings.get("text_format", {}))
    score = score or prefix.metadata.settings.get("score", "mean")
    _check_choice("score", score, Score)
    _check_choice("calibrate", calibrate or "none", Calibrate)
    if by == "generation" and calibrate not in (None, "none"):
        raise DataError(f"calibrate={calibrate!r} needs options to choose from, and answers are generated here")
    scorer = Scorer(model, encoder or PairEncoder(tokenizer, text_format), prefix, max_tokens, backend)
    metric = metric or default_metric(items, by)
    with torch.no_grad(), frozen(model):
        if by == "generation":
            gold, predictions = scorer.output_losses(items), scorer.generate(items, max_new_tokens)
            losses, found = None, None
        else:
            scored = scorer.option_losses(items, score)
            gold, losses = [of_item.output for of_item in scored], [of_item.options for of_item in scored]
            _require_numbers(items, losses)
            predictions = [calibration.choose(of_item) for of_item in losses]
            found = _find_offsets(scorer, items, losses, score, calibrate, validation, offsets)
        scorer.encoder.report_cuts()
    plain = score_predictions(metric, predictions, items), score_predictions("accuracy", predictions, items)
    result = EvalResult(metric, *plain, sum(gold) / len(gold), len(items), predictions)
    if losses is None:
        return result
    worth = calibration.reliability(losses, items)
    calibrated = None if found is None else _calibrated(found, losses, items, metric)
    always = majority(items, metric)
    return replace(result, nll=worth.nll, ece=worth.ece, calibrated=calibrated, majority=always, losses=losses)


def ensemble(results: Sequence[EvalResult], items: Sequence[Demonstration]) -> EvalResult:
    """Several evaluations of the same items as one: the losses of each option are averaged (a geometric mean of the
    likelihoods), and so are the offsets.

    Raises:
        ValueError: no results, or one without the losses of options.
    """
    if not results or any(result.losses is None for result in results):
        raise ValueError(f"an ensemble averages the losses of options, and not all of {len(results)} results have some")
    first = results[0]
    losses = [
        {option: statistics.fmean(of_item[option] for of_item in of_all) for option in of_all[0]}
        for of_all in zip(*(result.losses or () for result in results), strict=True)
    ]
    predictions = [calibration.choose(of_item) for of_item in losses]
    scores = (score_predictions(name, predictions, items) for name in (first.metric, "accuracy"))
    worth = calibration.reliability(losses, items)
    shifts = [result.calibrated.offsets for result in results if result.calibrated is not None]
    calibrated = None
    if len(shifts) == len(results):
        values = {o: statistics.fmean(shift.values[o] for shift in shifts) for o in shifts[0].values}
        calibrated = _calibrated(replace(shifts[0], values=values), losses, items, first.metric)
    gold = statistics.fmean(result.gold_loss for result in results)
    return EvalResult(
        first.metric,
        *scores,
        gold,
        first.items,
        predictions,
        worth.nll,
        worth.ece,
        calibrated,
        first.majority,
        losses,
    )


def option_probabilities(
    scorer: Scorer, inputs: Sequence[str], options: Sequence[str], score: Score, offsets: Offsets | None
) -> list[dict[str, float]]:
    """The probability of each option for each input: exp(-loss), less the offset if it fits, normalised over options.

    Raises:
        DataError, ValueError, TypeError: inputs or options that are no texts of tokens, or too long.
    """
    items = [Demonstration(text, options[0], tuple(options)) for text in inputs]
    with torch.no_grad(), frozen(scorer.model):
        losses: Sequence[Losses] = [of_item.options for of_item in scorer.option_losses(items, score)]
        scorer.encoder.report_cuts()
    if offsets is not None and offsets.fits(items, score):
        losses = [calibration.shifted(of_item, offsets.values) for of_item in losses]
    return [calibration.probabilities(of_item) for of_item in losses]


def majority(items: Sequence[Demonstration], metric: Metric) -> Majority | None:
    """The score of the most frequent right option; None if items do not share their options."""
    if not calibration.share_options(items):
        return None
    counts = {option: sum(option in item.right for item in items) for option in items[0].options or ()}
    option = max(counts, key=counts.__getitem__)
    always = [option] * len(items)
    return Majority(option, score_predictions(metric, always, items), score_predictions("accuracy", always, items))


def _find_offsets(
    scorer: Scorer,
    items: Sequence[Demonstration],
    losses: Sequence[Losses],
    score: Score,
    calibrate: Calibrate | None,
    validation: Sequence[Demonstration],
    stored: Offsets | None,
) -> Offsets | None:
    if calibrate is None:
        return stored if stored is not None and stored.fits(items, score) else None
    if calibrate == "none":
        return None
    if calibrate == "dev" and not validation:
        raise DataError("calibrate='dev' needs validation items, got none")
    others = validation if calibrate == "dev" else ()
    calibration.require_shared_options(calibrate, [*items, *others])
    if calibrate == "batch":
        return Offsets(calibrate, score, calibration.mean_offsets(losses))
    others = others or calibration.content_free(items[0].options or ())
    theirs = [of_item.options for of_item in scorer.option_losses(others, score)]
    if calibrate == "content-free":
        return Offsets(calibrate, score, calibration.mean_offsets(theirs))
    return Offsets(calibrate, score, calibration.fitted_offsets(theirs, others))


def _calibrated(
    offsets: Offsets, losses: Sequence[Losses], items: Sequence[Demonstration], metric: Metric
) -> Calibrated:
    shifted = [calibration.shifted(of_item, offsets.values) for of_item in losses]
    predictions = [calibration.choose(of_item) for of_item in shifted]
    scores = score_predictions(metric, predictions, items), score_predictions("accuracy", predictions, items)
    worth = calibration.reliability(shifted, items)
    return Calibrated(offsets, *scores, worth.nll, worth.ece, predictions)


def _require_numbers(items: Sequence[Demonstration], losses: Sequence[Losses]) -> None:
    for index, (item, of_item) in enumerate(zip(items, losses, strict=True)):
        for option, loss in of_item.items():
            if math.isnan(loss):
                raise ArithmeticError(
                    f"{item.source or f'item {index}'}: the loss of option {option!r} is not a number; the model's "
                    "weights or the prefix hold values that are not finite"
                )


def _check_choice(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
