"""Training a LoRA update on in-context sequences: the demonstrations in random orders, each as one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ctkernels.tuning.adapters.lora import ADAPTER, lora_parameters
from ctkernels.tuning.data.batches import Batch
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import PairEncoder, Row
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.objectives import Forward
from ctkernels.tuning.train.checkpoint import fingerprint
from ctkernels.tuning.train.learners.base import Learner
from ctkernels.tuning.train.learners.prompt import empty_prefix
from ctkernels.tuning.train.options import LoopOptions

if TYPE_CHECKING:
    from peft import LoraModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraOptions(LoopOptions):
    """The LoRA update, and what it is trained on.

    Args:
        lora_rank: rank of the LoRA update of the weights.
        lora_alpha: the update is scaled by lora_alpha / lora_rank.
        lora_targets: names of the modules that LoRA updates; none takes those of the model's family.
        lora_dropout: probability in [0, 1) that LoRA does not see an entry of its input, drawn anew for each
            micro-batch.
        answers: which answers of an in-context sequence ttt trains: "all" or the "last".
    """

    lora_rank: int = 64
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    answers: Literal["all", "last"] = "all"

    def check(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # a YAML file has a list
        self.at_least(1, "lora_rank")
        self.positive("lora_alpha")
        self.require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)")


class LoraLearner(Learner):
    """Trains the A and B that `wrapped` (of `Lora.injected`) carries.

    Row i of an epoch is a random order of all demonstrations that ends with demonstration i, drawn anew each epoch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wrapped: LoraModel,
        encoder: PairEncoder,
        demonstrations: Sequence[Demonstration],
        settings: LoraOptions,
    ) -> None:
        self.model, self.settings = model, settings
        self.module: nn.Module = wrapped
        self._start, self._delimiter, self._leads = encoder.start, encoder.delimiter, encoder.leads
        self._sources = [d.source for d in demonstrations]
        self._pairs = []  # (tokens of `x _`, tokens of y, the choice among options if the objective reads it)
        choices = settings.minimised.choices
        for d in demonstrations:
            answer = encoder.answer(d, d.output)
            prompt = encoder.prompt(d, encoder.longest(d, answer, choices))
            self._pairs.append((prompt, answer, encoder.choice(d, answer, 0, choices, settings.score)))
        encoder.report_cuts()

    def rows(self, epoch: int) -> Sequence[Row]:
        generator = torch.Generator().manual_seed(self.settings.dropout_seed(epoch))
        count = len(self._pairs)
        rows = []
        for last in range(count):
            others = [i for i in range(count) if i != last]
            order = [others[i] for i in torch.randperm(count - 1, generator=generator).tolist()]
            rows.append(self._row([*order, last]))
        return rows

    @contextmanager
    def attached(self, backend: str | None) -> Iterator[None]:
        with Attachment(empty_prefix(self.model), self.model, backend=backend) as self._attachment, self._dropout():
            yield

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Within the block LoRA drops entries of its input, and what that draws from is not seen outside."""
        if not self.settings.lora_dropout:
            yield
            return
        modules = [module for name, module in self.module.named_modules() if name.endswith(f".lora_dropout.{ADAPTER}")]
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                for module in modules:
                    module.train()
                yield
            finally:
                for module in modules:
                    module.eval()

    def forward(self, batch: Batch, seed: int | Tensor) -> Forward:
        if self.settings.lora_dropout:  # a resumed run draws what the whole one drew
            drawn = int(fingerprint((seed, batch.row_ids.tolist())), 16)
            torch.default_generator.manual_seed(drawn)
            if self.model.device.type == "cuda":
                with torch.cuda.device(self.model.device):
                    torch.cuda.manual_seed(drawn)
        return Forward(self.model, self._attachment, batch)

    def parameters(self) -> dict[str, nn.Parameter]:
        return lora_parameters(self.module)

    def _row(self, order: Sequence[int]) -> Row:
        """`x _ y _ x _ y ...` in that order; the labels are all answers, or the last one."""
        tokens, labels, predicted_at, choices = list(self._start), [], [], []
        for place, i in enumerate(order):
            prompt, answer, choice = self._pairs[i]
            tokens += ((self._delimiter,) if place or self._leads else ()) + prompt
            if self.settings.answers == "all" or place == len(order) - 1:
                target = (*answer, self._delimiter) if self.settings.learn_stop else answer
                predicted_at += range(len(tokens) - 1, len(tokens) - 1 + len(target))
                choices += [replace(one, at=len(labels)) for one in choice]
                labels += target
            tokens += answer
        last = predicted_at[-1] + 1  # what follows the last token that predicts something is not needed
        source = self._sources[order[-1]]
        return Row(tuple(tokens[:last]), (tuple(labels),), -1, source, tuple(predicted_at), tuple(choices))
