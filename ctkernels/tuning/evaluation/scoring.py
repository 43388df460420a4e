"""Scoring items behind a prefix: the loss of each option, the loss of the output, or a greedy answer.

All rows read the one attached prefix. They are packed into batches by a token budget. Options that differ only in their
last token (one-token labels, for instance) share one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig

from ctkernels.tuning.data.batches import make_batch, split_by_tokens
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import PairEncoder, Row, Score, Tokens
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.forward import row_losses
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
        rows: list[Row] = []
        owners: list[tuple[int, str | None]] = []  # (item, option) of each answer of the rows; None: the output
        sizes: list[int] = []  # what its mean loss is multiplied by
        for index, item in enumerate(items):
            if not item.options:
                raise DataError(f"{item.source or f'item {index}'}: no options to choose from; evaluate by generation")
            output = self.encoder.answer(item, item.output)
            prompt = self._prompt(item, self.encoder.longest(item, output, "required"))
            answers: dict[str | None, Tokens] = dict(self.encoder.options(item, score).items())
            answers[None] = output
            shared: dict[Tokens, list[str | None]] = defaultdict(list)
            for option, answer in answers.items():
                shared[answer[:-1]].append(option)
            for start, options in shared.items():
                rows.append(Row(prompt + start, tuple(answers[o] for o in options), source=item.source))
                owners += [(index, option) for option in options]
                sizes += [len(answers[o]) if score == "sum" else 1 for o in options]
        found = [ItemLosses(dict.fromkeys(item.options or (), float("nan"))) for item in items]
        for (index, option), size, loss in zip(owners, sizes, self._losses(rows).tolist(), strict=True):
            if option is not None:
                found[index].options[option] = size * loss
            else:
                found[index].output = loss
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
        return self._losses(rows).tolist()

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

    def _losses(self, rows: Sequence[Row]) -> Tensor:
        """Mean loss of every answer of every row, in order."""
        check_row_lengths(self.model, self.prefix.first_position, rows)
        losses = []
        with self._attached() as attachment:
            for group in split_by_tokens(rows, self.max_tokens):
                batch = make_batch(rows, group).to(self.model.device)
                losses.append(row_losses(self.model, attachment, batch).cpu())
        return torch.cat(losses)

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
