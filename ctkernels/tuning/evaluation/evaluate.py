"""Evaluation of a prefix on test items: by the loss of each option, or by greedy generation and exact match.

As in MetaICL (scores: see `metrics.py`):

    prediction   the option with the lowest mean cross-entropy (nats) of its tokens; of equal ones the first
    gold loss    mean over items of the mean cross-entropy of the output's tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import PairEncoder, TextFormat
from ctkernels.tuning.data.metrics import Metric, accuracy, default_metric, score_predictions
from ctkernels.tuning.evaluation.scoring import Scorer
from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.hf.protocols import PrefixLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalResult:
    """Scores of one prefix on one test set.

    metric: name of the score.  score: its value.  accuracy: share of right predictions.  gold_loss: in nats.
    items: number of items.  predictions: one per item.
    """

    metric: Metric
    score: float
    accuracy: float
    gold_loss: float
    items: int
    predictions: list[str]


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

    Raises:
        DataError: there are no items, an item has no options or two options with the same tokens, an output contains
            the delimiter, or an item does not fit into the model's context.
        ValueError: an unknown `by`.
    """
    if not items:
        raise DataError("evaluation needs test items, got none")
    if by is None:
        by = "options" if all(item.options for item in items) else "generation"
    if by not in ("options", "generation"):
        raise ValueError(f"by must be 'options' or 'generation', got {by!r}")
    if text_format is None:
        text_format = TextFormat(**prefix.metadata.settings.get("text_format", {}))
    scorer = Scorer(model, encoder or PairEncoder(tokenizer, text_format), prefix, max_tokens, backend)
    with torch.no_grad(), frozen(model):
        if by == "options":
            losses = scorer.option_losses(items)
            predictions = [min(of_item, key=of_item.__getitem__) for of_item in losses]
            gold = [of_item[item.output] for of_item, item in zip(losses, items, strict=True)]
        else:
            gold = scorer.output_losses(items)
            predictions = scorer.generate(items, max_new_tokens)
        scorer.encoder.report_cuts()
    metric = metric or default_metric(items, by)
    score = score_predictions(metric, predictions, items)
    right = accuracy([p.strip() for p in predictions], [item.output.strip() for item in items])
    return EvalResult(metric, score, right, sum(gold) / len(gold), len(items), predictions)
