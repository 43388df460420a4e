"""Any task of the LM Evaluation Harness with an adapter: the model "ctkernels" of its registry.

    python -m ctkernels.tuning.lm_eval run --model ctkernels --model_args pretrained=MODEL,prefix=FOLDER --tasks NAME

The command line is lm-eval's own. From Python, importing this module registers the name. It is the harness's "hf" model
in everything but the prefix: rows see it as a context in front of theirs, and no logits of it are returned, since it
has none; what the harness gets are those of a request's own tokens.
"""

from __future__ import annotations

import os
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
    """A causal language model with a tuned prefix in front of every request.

    A request's text follows the demonstrations as it is. To see what tuning saw, a task's `doc_to_text` begins with the
    delimiter of the text format, a space unless another was chosen. An empty context is the harness's prefix token, as
    without a prefix.

    Args:
        pretrained: hub id, folder, or a loaded model of the class and configuration the prefix was made for.
        prefix: folder of a saved `Adapter` or `KVPrefix`, or one of the two.
        add_bos_token: whether a request starts with BOS; no by default, since the prefix has it.
        kwargs: everything else that lm-eval's "hf" model takes (batch_size, device, dtype, tokenizer, max_length ...).

    Raises:
        TypeError: prefix is neither; a model class that no prefix can be attached to.
        ValueError: an adapter that puts demonstrations in words (ipt), which raw requests have no place for; a prefix
            of another model or tokenizer (PrefixFileError).
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        prefix: str | os.PathLike | Adapter | KVPrefix,
        add_bos_token: bool | None = False,
        **kwargs: Any,
    ) -> None:
        adapter = _find_adapter(prefix)
        super().__init__(pretrained, backend="causal", add_bos_token=add_bos_token, **kwargs)
        if isinstance(prefix, (str, os.PathLike)):  # once more, checked against the model
            adapter = Adapter.from_pretrained(prefix, model=self.model, tokenizer=self.tokenizer)
        adapter.prefix.to(self.device)
        adapter.prefix.attach(self.model).detach()  # refuses a prefix that does not fit, before the first request
        self.adapter = adapter

    @property
    def max_length(self) -> int:
        """Most tokens of a request: what the prefix leaves of the model's positions."""
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
    """The adapter, before a model is loaded for it."""
    if isinstance(prefix, (str, os.PathLike)):
        prefix = Adapter.from_pretrained(prefix)
    elif isinstance(prefix, KVPrefix):
        prefix = Adapter(prefix)
    elif not isinstance(prefix, Adapter):
        raise TypeError(f"prefix must be a folder, an Adapter or a KVPrefix, got {type(prefix).__name__}")
    if prefix.pool:
        raise ValueError(
            f"prefix: an adapter made by {prefix.method} puts demonstrations in words before each input, and a request "
            "of lm-eval is text that has no such place; evaluate it with Adapter.evaluate"
        )
    return prefix
