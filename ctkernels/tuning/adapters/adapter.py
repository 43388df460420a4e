"""Adapter: what a method leaves, whatever it trained, and how it is evaluated, saved and transferred.

Every method ends in a KV prefix: a trained soft prompt is run through the model once and amounts to one. LoRA weights
and demonstrations in words come along where the method has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctkernels.tuning.adapters.lora import Lora
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.retrieval import InWordsEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.tuning.evaluation.evaluate import EvalResult


@dataclass(frozen=True)
class Adapter:
    """A model's adaptation to one task.

    prefix: what rows read.  prompt: the soft prompt that it was made of, if there is one.
    lora: the update of the weights that the prefix belongs to, if there is one.
    pool: the demonstrations that are put in words before an input (ipt), else none.
    """

    prefix: KVPrefix
    prompt: SoftPrompt | None = None
    lora: Lora | None = None
    pool: tuple[Demonstration, ...] = ()

    @property
    def method(self) -> str:
        """Name of the method that made it."""
        return self.prefix.metadata.method

    @property
    def text_format(self) -> TextFormat:
        """How the task's pairs became tokens."""
        return TextFormat(**self.prefix.metadata.settings.get("text_format", {}))

    @contextmanager
    def weights(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the model has this adapter's weights: the LoRA update merged in, if there is one."""
        if self.lora is None:
            yield
        else:
            with self.lora.merged(model):
                yield

    def encoder(self, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat | None = None) -> InWordsEncoder:
        """Turns items into tokens, with demonstrations in words before them if the adapter has a pool."""
        made_with = self.prefix.metadata.settings
        return InWordsEncoder(
            tokenizer,
            text_format or self.text_format,
            self.pool,
            made_with.get("ipt_shots", 0),
            made_with.get("demonstrate", "similar"),
            made_with.get("seed", 0),
        )

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Demonstration], **options: Any
    ) -> EvalResult:
        """Scores on test items; `options` and errors as in `evaluate_prefix`."""
        from ctkernels.tuning.evaluation.evaluate import evaluate_prefix

        encoder = self.encoder(tokenizer, options.pop("text_format", None))
        with self.weights(model):
            return evaluate_prefix(model, tokenizer, items, self.prefix, encoder=encoder, **options)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write the adapter into `directory`, replacing one that is there (see `adapter_file.py`).

        Raises:
            OSError: the disk.
        """
        from ctkernels.tuning.adapters.adapter_file import save

        save(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Adapter:
        """Read an adapter, or a saved prefix alone. With `model` and `tokenizer` it is checked against them.

        Raises:
            PrefixFileError: missing, damaged, foreign or too new files, or those of another model or tokenizer.
        """
        from ctkernels.tuning.adapters.adapter_file import load

        return load(directory, model, tokenizer)
