"""Scores of predictions, all within [0, 1], and the cross-entropy of choices.

accuracy     share of items whose prediction is right: their output, or another one of several right options
macro-F1     mean of 2 * precision * recall / (precision + recall) over the labels that occur as outputs, 0 for 0 / 0;
             as in MetaICL. A prediction that is another right option counts as the output.
exact match  accuracy of generated answers
BLEU         corpus BLEU of sacrebleu (Post, arXiv 1804.08771) divided by 100, against output and further references
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ctkernels.tuning.data.demonstrations import Demonstration

Metric = Literal["macro_f1", "accuracy", "exact_match", "bleu"]


def default_metric(items: Sequence[Demonstration], by: Literal["options", "generation"]) -> Metric:
    """Exact match for generation, macro-F1 for classification (all items have the same options), otherwise accuracy."""
    if by == "generation":
        return "exact_match"
    return "macro_f1" if len({frozenset(item.options or ()) for item in items}) == 1 else "accuracy"


def score_predictions(metric: Metric, predictions: Sequence[str], items: Sequence[Demonstration]) -> float:
    """The score of one prediction per item. White space around a text is ignored.

    Raises:
        ValueError: an unknown metric.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
    predictions = [prediction.strip() for prediction in predictions]
    if metric == "bleu":
        return bleu(predictions, [(item.output.strip(), *item.references) for item in items])
    outputs = []
    for prediction, item in zip(predictions, items, strict=True):
        right = {text.strip() for text in item.right}
        outputs.append(prediction if prediction in right else item.output.strip())
    return macro_f1(predictions, outputs) if metric == "macro_f1" else accuracy(predictions, outputs)


def accuracy(predictions: Sequence[str], outputs: Sequence[str]) -> float:
    """Share of predictions equal to their output."""
    return sum(p == o for p, o in zip(predictions, outputs, strict=True)) / len(outputs)


def macro_f1(predictions: Sequence[str], outputs: Sequence[str]) -> float:
    """Unweighted mean F1 over the labels that occur in `outputs`."""
    scores = []
    for label in sorted(set(outputs)):
        hits = sum(p == o == label for p, o in zip(predictions, outputs, strict=True))
        scores.append(2 * hits / (predictions.count(label) + outputs.count(label)))
    return sum(scores) / len(scores)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU divided by 100. An item may have any number of references.

    Raises:
        ValueError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError:
        raise ValueError("metric bleu needs the package sacrebleu (pip install 'ctkernels[suites]')") from None
    longest = max(map(len, references))
    # sacrebleu expects one list per reference number, with None for items that have fewer references
    streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(longest)]
    return sacrebleu.corpus_bleu(list(predictions), streams).score / 100


def choice_losses(scores: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy of choices: -log of the right options' share of exp(score), `[C]` of `[C, O]` each."""
    return scores.logsumexp(dim=1) - scores.masked_fill(~right, -torch.inf).logsumexp(dim=1)
