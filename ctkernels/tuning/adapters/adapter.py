"""Adapter: what a method leaves, whatever it trained, and how it is evaluated, saved and transferred.

Every method ends in a KV prefix: a trained soft prompt is run through the model once and amounts to one. LoRA weights
and demonstrations in words come along where the method has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ctkernels.tuning.adapters.file import faults, read_file, write_folder
from ctkernels.tuning.adapters.lora import Lora
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.retrieval import InWordsEncoder
from ctkernels.tuning.evaluation.calibration import Offsets
from ctkernels.tuning.hf.embeddings import mean_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.tuning.evaluation.evaluate import EvalResult

LORA = "lora."  # what the names of the update's tensors begin with in a file


@dataclass(frozen=True)
class Adapter:
    """A model's adaptation to one task.

    prefix: what rows read.  prompt: the soft prompt that it was made of, if there is one.
    lora: the update of the weights that the prefix belongs to, if there is one.
    demonstrations: those that are put in words before an input (ipt, icl-words), else none.
    offsets: what is subtracted from the losses of the task's options, or None; an evaluation finds them.
    """

    prefix: KVPrefix
    prompt: SoftPrompt | None = None
    lora: Lora | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    offsets: Offsets | None = None

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

    def encoder(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_format: TextFormat | None = None,
        model: PreTrainedModel | None = None,
    ) -> InWordsEncoder:
        """Turns items into tokens, with demonstrations in words before them if the adapter has any.

        Raises:
            ValueError: demonstrations are chosen by embeddings, and there is no `model` to make them.
        """
        made_with = self.prefix.metadata.settings
        return InWordsEncoder(
            tokenizer,
            text_format or self.text_format,
            self.demonstrations,
            made_with.get("shown", made_with.get("ipt_shots", 0)),  # its name in earlier versions
            made_with.get("demonstrate", "similar"),
            made_with.get("seed", 0),
            None if model is None else partial(mean_states, model),
        )

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Demonstration], **options: Any
    ) -> EvalResult:
        """Scores on test items; `options` and errors as in `evaluate_prefix`. The adapter's own offsets are used where
        `calibrate` is not given and they fit the items."""
        from ctkernels.tuning.evaluation.evaluate import evaluate_prefix

        encoder = self.encoder(tokenizer, options.pop("text_format", None), model)
        with self.weights(model):
            return evaluate_prefix(
                model, tokenizer, items, self.prefix, encoder=encoder, **{"offsets": self.offsets, **options}
            )

    def option_probabilities(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Sequence[str],
        options: Sequence[str],
        max_tokens: int = 4096,
        backend: str | None = None,
    ) -> list[dict[str, float]]:
        """The probability of each option as the answer to each input, with the adapter's offsets if they are of these
        options; the choice is the most probable one.

        Raises:
            DataError, ValueError, TypeError: inputs or options that cannot be used, named.
        """
        from ctkernels.tuning.evaluation.evaluate import option_probabilities
        from ctkernels.tuning.evaluation.scoring import Scorer

        scorer = Scorer(model, self.encoder(tokenizer, model=model), self.prefix, max_tokens, backend)
        score = self.prefix.metadata.settings.get("score", "mean")
        with self.weights(model):
            return option_probabilities(scorer, inputs, options, score, self.offsets)

    def save_pretrained(self, directory: str | os.PathLike, card: bool = False) -> None:
        """Write the adapter into `directory`, as one file that replaces what is there in one step (see `file.py`).

            keys.0 values.0 ...     the prefix
            prompt                  the soft prompt's embeddings
            lora.NAME               A and B of the update, by their names in peft's files

        card: also write a model card, README.md.

        Raises:
            PrefixFileError: a value that is not finite.
            TypeError: settings that JSON cannot hold.
            OSError: the disk.  What was there before is unharmed and nothing half-written remains.
        """
        description, tensors = self.prefix.parts()
        if self.prompt is not None:
            description["prompt"] = {"segments": self.prompt.segments.tolist()}
            tensors["prompt"] = self.prompt.embeddings
        if self.lora is not None:
            description["lora"] = {
                "rank": self.lora.rank,
                "alpha": self.lora.alpha,
                "targets": sorted(self.lora.targets),
            }
            tensors |= {LORA + name: tensor for name, tensor in self.lora.tensors.items()}
        if self.demonstrations:
            description["demonstrations"] = [asdict(pair) for pair in self.demonstrations]
        if self.offsets is not None:
            description["offsets"] = asdict(self.offsets)
        write_folder(directory, description, tensors, with_card=card)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        allow_other_weights: bool = False,
    ) -> Adapter:
        """Read an adapter, or a saved prefix alone, from a folder or its file. With `model` and `tokenizer` it is
        checked against them, and put on the model's device. Other weights: as in `KVPrefix.from_pretrained`.

        Raises:
            PrefixFileError: a missing, damaged, foreign or too new file, or one of another model, other weights or
                another tokenizer.
        """
        path, description, tensors = saved = read_file(directory, "adapter")
        prefix = KVPrefix.from_parts(saved, model, tokenizer, allow_other_weights)
        device = prefix.keys[0].device
        with faults(path):
            prompt = lora = None
            if "prompt" in description:
                segments = torch.tensor(description["prompt"]["segments"])
                prompt = SoftPrompt(tensors["prompt"], segments).to(device)
                if model is not None:
                    prompt.to(prefix.keys[0].dtype)
            if "lora" in description:
                update = description["lora"]
                own = {name.removeprefix(LORA): x.to(device) for name, x in tensors.items() if name.startswith(LORA)}
                lora = Lora(update["rank"], update["alpha"], tuple(update["targets"]), tensors=own)
                lora.check(model)
            demonstrations = tuple(Demonstration(**pair) for pair in description.get("demonstrations", ()))
            adapter = cls(prefix, prompt, lora, demonstrations, Offsets.of(description))
            _ = adapter.text_format  # raises what is wrong with it here, where the file is known
        return adapter
