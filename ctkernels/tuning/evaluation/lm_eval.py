"""Any task of the LM Evaluation Harness with an adapter: the model "ctkernels" of its registry.

    python -m ctkernels.tuning.lm_eval run --model ctkernels --model_args pretrained=MODEL,prefix=FOLDER --tasks NAME

The command line is lm-eval's own. In Python, the import of this module registers the name. The model is the harness's
"hf" model with a prefix attached: each request sees the prefix before its own tokens. A prefix has no logits, so the
harness gets only those of a request's own tokens.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix

NAME = "ctkernels"


@register_model(NAME)
class PrefixLM(HFLM):
    """A causal language model with a tuned prefix before every request.

    A request's text directly follows the demonstrations. To get the same form as in tuning, let a task's `doc_to_text`
    begin with the delimiter of the text format (by default a space). An empty context is the harness's prefix token, as
    without a prefix.

    Offsets of options that are stored with an adapter are not used, and a warning says so: the harness is given the
    log-likelihood of one answer at a time, compares them as sums or per byte, and derives perplexities from the same
    numbers, while offsets belong to one form of the loss (`Offsets.score`). `Adapter.evaluate` uses them.

    Args:
        pretrained: hub id, folder, or a loaded model of the class and configuration that the prefix was made for.
        prefix: an `Adapter` or `KVPrefix`, or the folder of a saved one.
        add_bos_token: whether a request starts with BOS; by default not, since the prefix has it.
        allow_other_weights: as in `KVPrefix.from_pretrained`.
        kwargs: all other arguments of lm-eval's "hf" model (batch_size, device, dtype, tokenizer, max_length ...).

    Raises:
        TypeError: prefix is none of these, or no prefix can be attached to the model class.
        ValueError: the adapter shows demonstrations as text (ipt), for which raw requests have no place; or the prefix
            belongs to another model or tokenizer (PrefixFileError).
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        prefix: str | os.PathLike | Adapter | KVPrefix,
        add_bos_token: bool | None = False,
        allow_other_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        adapter = _find_adapter(prefix)
        super().__init__(pretrained, backend="causal", add_bos_token=add_bos_token, **kwargs)
        if isinstance(prefix, (str, os.PathLike)):  # read again, now with a check against the model
            adapter = Adapter.from_pretrained(prefix, self.model, self.tokenizer, allow_other_weights)
        adapter.prefix.to(self.device)
        adapter.prefix.attach(self.model).detach()  # raises an error now if the prefix does not fit
        if adapter.offsets is not None:
            warnings.warn(
                "the offsets of this adapter's options are not used by lm-eval; Adapter.evaluate uses them",
                stacklevel=2,
            )
        self.adapter = adapter

    @property
    def max_length(self) -> int:
        """Most tokens of a request: the model's positions that are left after the prefix."""
        return self._max_length or super().max_length - self.adapter.prefix.first_position

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with self.adapter.weights(self.model), self.adapter.prefix.attach(self.model):
            yield

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._attached():
            return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._attached():
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._attached():
            return super().generate_until(requests, disable_tqdm)


def _find_adapter(prefix: str | os.PathLike | Adapter | KVPrefix) -> Adapter:
    """The adapter. Called before the model is loaded, so that errors come early."""
    if isinstance(prefix, (str, os.PathLike)):
        prefix = Adapter.from_pretrained(prefix)
    elif isinstance(prefix, KVPrefix):
        prefix = Adapter(prefix)
    elif not isinstance(prefix, Adapter):
        raise TypeError(f"prefix must be a folder, an Adapter or a KVPrefix, got {type(prefix).__name__}")
    if prefix.demonstrations:
        raise ValueError(
            f"prefix: an adapter made by {prefix.method} puts demonstrations in words before each input, and the "
            "text of an lm-eval request has no separate input; evaluate it with Adapter.evaluate"
        )
    return prefix
