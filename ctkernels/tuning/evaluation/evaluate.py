"""Evaluation of a prefix on test items: by the loss of each option, or by greedy generation and exact match.

All items read the one attached prefix; they are packed into batches by a token budget, and options that differ in
their last token alone (one-token labels, say) share one run of their item.

Definitions, as in MetaICL (scores: see `metrics.py`):

    prediction   the option with the lowest mean cross-entropy (nats) of its tokens; the first of equals
    gold loss    mean over items of the mean cross-entropy of the output's tokens
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.batches import make_batch, split_by_tokens
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import PairEncoder, Row, TextFormat
from ctkernels.tuning.data.metrics import Metric, accuracy, default_metric, score_predictions
from ctkernels.tuning.hf.limits import check_row_lengths
from ctkernels.tuning.train.forward import frozen, row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalResult:
    """Scores of one prefix on one test set.

    metric: the score to report.  score: its value.  accuracy: share of right predictions.  gold_loss: nats.
    predictions: one per item.  items: how many.
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
    prefix: KVPrefix,
    *,
    by: Literal["options", "generation"] | None = None,
    metric: Metric | None = None,
    text_format: TextFormat | None = None,
    encoder: PairEncoder | None = None,
    max_tokens: int = 4096,
    max_new_tokens: int = 32,
    backend: str | None = None,
) -> EvalResult:
    """Evaluate `prefix` (of `tune`, or saved) on test items.

    Args:
        by: "options" or "generation"; None takes options if every item has some.
        metric: the score; None takes macro-F1 for classification, accuracy for other choices, exact match otherwise.
        text_format: how items become tokens; default: as the prefix's demonstrations did.
        encoder: turns items into tokens, instead of a plain one for `text_format`.
        max_tokens: most tokens of one batch.  max_new_tokens: longest generated answer.

    Raises:
        DataError: no items, an item without options, options or outputs that the tokenizer cannot tell apart, an item
            that does not fit into the model's context.
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
    encoder = encoder or PairEncoder(tokenizer, text_format)
    with torch.no_grad(), frozen(model):
        if by == "options":
            losses = _option_losses(model, encoder, items, prefix, max_tokens, backend)
            predictions = [min(scores, key=scores.get) for scores in losses]
            gold = [scores[item.output] for scores, item in zip(losses, items, strict=True)]
        else:
            gold = _gold_losses(model, encoder, items, prefix, max_tokens, backend)
            predictions = _generate(model, encoder, items, prefix, max_tokens, max_new_tokens, backend)
        encoder.report_cuts()
    metric = metric or default_metric(items, by)
    score = score_predictions(metric, predictions, items)
    right = accuracy([p.strip() for p in predictions], [item.output.strip() for item in items])
    return EvalResult(metric, score, right, sum(gold) / len(gold), len(items), predictions)


def _option_losses(
    model: PreTrainedModel,
    encoder: PairEncoder,
    items: Sequence[Demonstration],
    prefix: KVPrefix,
    max_tokens: int,
    backend: str | None,
) -> list[dict[str, float]]:
    """Mean answer loss of every option of every item."""
    rows: list[Row] = []
    owners: list[tuple[int, str]] = []  # (item, option) of each answer, in the order of the rows' answers
    for index, item in enumerate(items):
        if not item.options:
            raise DataError(f"{item.source or f'item {index}'}: no options to choose from; evaluate by generation")
        answers = {option: encoder.answer(item, option) for option in item.options}
        _refuse_equal_answers(item, answers)
        prompt = _prompt(encoder, prefix, item, max(map(len, answers.values())))
        shared: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for option, answer in answers.items():
            shared[answer[:-1]].append(option)
        for start, options in shared.items():
            rows.append(Row(prompt + start, tuple(answers[o] for o in options), source=item.source))
            owners += [(index, option) for option in options]
    result: list[dict[str, float]] = [{} for _ in items]
    losses = _losses(model, rows, prefix, max_tokens, backend)
    for (index, option), loss in zip(owners, losses.tolist(), strict=True):
        result[index][option] = loss
    # in the order of the item's own options, which decides between equals
    return [{o: scores[o] for o in item.options or ()} for scores, item in zip(result, items, strict=True)]


def _gold_losses(
    model: PreTrainedModel,
    encoder: PairEncoder,
    items: Sequence[Demonstration],
    prefix: KVPrefix,
    max_tokens: int,
    backend: str | None,
) -> list[float]:
    """Mean loss of every item's output."""
    rows = []
    for item in items:
        answer = encoder.answer(item, item.output)
        if encoder.delimiter in answer:
            raise DataError(
                f"{item.source or repr(item.output)}: the output contains the delimiter {encoder.format.delimiter!r}, "
                "at which generation stops; choose another delimiter"
            )
        rows.append(Row(_prompt(encoder, prefix, item, len(answer)) + answer[:-1], (answer,), source=item.source))
    return _losses(model, rows, prefix, max_tokens, backend).tolist()


def _losses(
    model: PreTrainedModel, rows: Sequence[Row], prefix: KVPrefix, max_tokens: int, backend: str | None
) -> Tensor:
    """Mean loss of every answer of every row, in order."""
    check_row_lengths(model, prefix.first_position, rows)
    losses = []
    with prefix.attach(model, backend=backend) as attachment:
        for group in split_by_tokens(rows, max_tokens):
            losses.append(row_losses(model, attachment, make_batch(rows, group).to(model.device)).cpu())
    return torch.cat(losses)


def _generate(
    model: PreTrainedModel,
    encoder: PairEncoder,
    items: Sequence[Demonstration],
    prefix: KVPrefix,
    max_tokens: int,
    max_new_tokens: int,
    backend: str | None,
) -> list[str]:
    """Greedy continuations, each up to EOS, the delimiter, or `max_new_tokens`.

    Prompts are cut as in training. Those of equal length share a batch, so that no padding is needed.
    """
    prompts = [_prompt(encoder, prefix, item, len(encoder.answer(item, item.output))) for item in items]
    check_row_lengths(model, prefix.first_position, [Row(p + (0,) * max_new_tokens, ((0,),)) for p in prompts])
    eos = encoder.tokenizer.eos_token_id
    stops = [encoder.delimiter] if eos is None else [eos, encoder.delimiter]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops,
        pad_token_id=encoder.delimiter,
    )
    texts = [""] * len(items)
    with prefix.attach(model, backend=backend), _only_settings(model, settings):
        for indices in _equal_lengths(prompts, max_tokens, max_new_tokens):
            input_ids = torch.tensor([prompts[i] for i in indices], device=model.device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
            )
            for i, tokens in zip(indices, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((t for t, token in enumerate(tokens) if token in stops), len(tokens))
                texts[i] = encoder.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
    return texts


@contextmanager
def _only_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Within the block `generate` fills in nothing from the model's own settings, such as a repetition penalty."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _prompt(encoder: PairEncoder, prefix: KVPrefix, item: Demonstration, longest_answer: int) -> tuple[int, ...]:
    """`_ x _` behind a prefix, as in training rows; `x _` behind nothing but BOS."""
    behind_prefix = prefix.length > len(encoder.start)
    return ((encoder.delimiter,) if behind_prefix else ()) + encoder.prompt(item, longest_answer)


def _equal_lengths(prompts: Sequence[tuple[int, ...]], max_tokens: int, max_new_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of the same length, at most `max_tokens` at a time with what they may grow by."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    for length, indices in sorted(by_length.items()):
        count = max(1, max_tokens // (length + max_new_tokens))
        for start in range(0, len(indices), count):
            yield indices[start : start + count]


def _refuse_equal_answers(item: Demonstration, answers: dict[str, tuple[int, ...]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for option, tokens in answers.items():
        if tokens in seen:
            raise DataError(
                f"{item.source or repr(item.input[:30])}: the options {seen[tokens]!r} and {option!r} are the same "
                "tokens under this tokenizer"
            )
        seen[tokens] = option
