"""Scoring items behind a prefix: the loss of each option, the loss of the output, or a greedy answer.

All rows read the one attached prefix, in batches by a token budget. An item's prompt is run once: options that differ
only in their last token (one-token labels, for instance) are read off one packed row, others continue the row of the
output (`hf/continuations.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from ctkernels.tuning.data.batches import make_batch, split_by_tokens
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import Choice, PairEncoder, Row, Score, Tokens
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.continuations import score_options
from ctkernels.tuning.hf.forward import Forward, row_losses
from ctkernels.tuning.hf.limits import check_row_lengths
from ctkernels.tuning.hf.protocols import PrefixLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ItemLosses:
    """Losses of an item in nats.

    options: of each option, in the form that was asked for.  output: mean over the output's tokens.
    """

    options: dict[str, float]
    output: float = float("nan")


@dataclass(frozen=True)
class Scorer:
    """A frozen model with a prefix, ready to score items.

    encoder: turns items into tokens.  max_tokens: most tokens of one batch.  backend: as in
    `ctkernels.prefix_attention`.
    """

    model: PreTrainedModel
    encoder: PairEncoder
    prefix: PrefixLike
    max_tokens: int
    backend: str | None = None

    def option_losses(self, items: Sequence[Demonstration], score: Score = "mean") -> list[ItemLosses]:
        """The losses of every item's options, and of its output, in nats.

        score: what an option's loss is: mean or sum of its tokens' cross-entropies, or that of its first token.

        Raises:
            DataError: an item without options, or with two options that are the same tokens (as far as they are read).
        """
        found, alone, continued = [], [], []  # the items that one run each scores, and those with branches
        for index, item in enumerate(items):
            if not item.options:
                raise DataError(f"{item.source or f'item {index}'}: no options to choose from; evaluate by generation")
            output = self.encoder.answer(item, item.output)
            tokens = self._prompt(item, self.encoder.longest(item, output, "required")) + output[:-1]
            options = self.encoder.options(item, score)
            answers = (*options.values(), output)
            found.append(ItemLosses(dict.fromkeys(options, float("nan"))))
            if all(answer[:-1] == output[:-1] for answer in answers):
                alone.append((index, Row(tokens, answers, source=item.source)))
            else:
                choice = Choice(0, answers[:-1], output, right=())
                continued.append((index, Row(tokens, (output,), source=item.source, choices=(choice,))))
        losses = iter(self._losses([row for _, row in alone]))
        for index, row in alone:
            size = len(row.answers[0]) if score == "sum" else 1
            for option in found[index].options:
                found[index].options[option] = size * next(losses)
            found[index].output = next(losses)
        for (index, _), (output_loss, of_options) in zip(
            continued, self._continued([row for _, row in continued], score), strict=True
        ):
            found[index] = ItemLosses(dict(zip(found[index].options, of_options, strict=True)), output_loss)
        return found

    def output_losses(self, items: Sequence[Demonstration]) -> list[float]:
        """Mean cross-entropy in nats of every item's output.

        Raises:
            DataError: an output with the delimiter in it, at which generation would stop.
        """
        rows = []
        for item in items:
            answer = self.encoder.answer(item, item.output)
            if self.encoder.delimiter in answer:
                raise DataError(
                    f"{item.source or repr(item.output)}: the output contains the delimiter "
                    f"{self.encoder.format.delimiter!r}, at which generation stops; choose another delimiter"
                )
            rows.append(Row(self._prompt(item, len(answer)) + answer[:-1], (answer,), source=item.source))
        return self._losses(rows)

    def generate(self, items: Sequence[Demonstration], max_new_tokens: int) -> list[str]:
        """Greedy answers. Each ends before EOS or the delimiter, or after `max_new_tokens` tokens.

        Prompts are cut as in training. Those of equal length share a batch, so no padding is needed.
        """
        prompts = [self._prompt(item, len(self.encoder.answer(item, item.output))) for item in items]
        longest = [Row(prompt + (0,) * max_new_tokens, ((0,),)) for prompt in prompts]
        check_row_lengths(self.model, self.prefix.first_position, longest)
        tokenizer, delimiter = self.encoder.tokenizer, self.encoder.delimiter
        stops = [delimiter] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id, delimiter]
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=stops, pad_token_id=delimiter
        )
        texts = [""] * len(items)
        with self._attached(), _only_settings(self.model, settings):
            for indices in self._equal_lengths(prompts, max_new_tokens):
                input_ids = torch.tensor([prompts[i] for i in indices], device=self.model.device)
                mask = torch.ones_like(input_ids)
                output = self.model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
                for i, tokens in zip(indices, output[:, input_ids.shape[1] :].tolist(), strict=True):
                    end = next((t for t, token in enumerate(tokens) if token in stops), len(tokens))
                    texts[i] = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return texts

    def _prompt(self, item: Demonstration, longest_answer: int) -> Tokens:
        """`_ x _` after a prefix, as in training rows; `x _` if it holds at most BOS (an instruction is more)."""
        has_context = self.prefix.length > len(self.encoder.bos)
        return ((self.encoder.delimiter,) if has_context else ()) + self.encoder.prompt(item, longest_answer)

    def _losses(self, rows: Sequence[Row]) -> list[float]:
        """Mean loss of every answer of every row, in order."""
        check_row_lengths(self.model, self.prefix.first_position, rows)
        losses: list[float] = []
        with self._attached() as attachment:
            for group in split_by_tokens(rows, self.max_tokens):
                batch = make_batch(rows, group).to(self.model.device)
                losses += row_losses(self.model, attachment, batch).tolist()
        return losses

    def _continued(self, rows: Sequence[Row], score: Score) -> list[tuple[float, list[float]]]:
        """Of every row, in order: the mean loss of its output, and those of the options that continue its prompt."""
        check_row_lengths(self.model, self.prefix.first_position, rows)
        losses: dict[int, tuple[float, list[float]]] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))  # little padding
        with self._attached() as attachment:
            for group in split_by_tokens([rows[i] for i in order], self.max_tokens, "padded"):
                picked = [order[i] for i in group]
                batch = make_batch(rows, picked, "padded").to(self.model.device)
                scored = score_options(Forward(self.model, attachment, batch), score)
                outputs = [labels.mean() for labels in scored.labels.split(batch.answer_sizes)]
                for i, output, scores in zip(picked, outputs, (-scored.scores).tolist(), strict=True):
                    losses[i] = output.item(), scores[: len(rows[i].choices[0].options)]
        return [losses[i] for i in range(len(rows))]

    def _attached(self) -> Attachment:
        return Attachment(self.prefix, self.model, backend=self.backend)

    def _equal_lengths(self, prompts: Sequence[Tokens], max_new_tokens: int) -> Iterator[list[int]]:
        """Indices of prompts of equal length, as many at a time as `max_tokens` allows with their answers."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_length[len(prompt)].append(i)
        for length, indices in sorted(by_length.items()):
            count = max(1, self.max_tokens // (length + max_new_tokens))
            for start in range(0, len(indices), count):
                yield indices[start : start + count]


@contextmanager
def _only_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Within the block `generate` takes nothing from the model's own settings, such as a repetition penalty."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
