"""Service: what the routes of the server call. It knows names, prompts and limits, and nothing of HTTP but statuses."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from ctkernels.serving.server.engine import Request
from ctkernels.serving.server.protocol import ChatBody, CompletionBody, GenerationBody, Limits, TuningBody
from ctkernels.serving.server.sampling import Sampling
from ctkernels.serving.server.tuner import Task, Tuner
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.store import PrefixStore
from ctkernels.tuning.data.demonstrations import DataError, parse_jsonl
from ctkernels.tuning.data.formats import TextFormat, encode_prompt
from ctkernels.tuning.hf.models import find_decoder, rope_switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("ctkernels.serving")
COMPLETION_TOKENS = 16  # of an answer whose length is not given, as in OpenAI's API


class Refused(Exception):
    """A request that cannot be answered. status: of HTTP.  param: the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Service:
    """One model, its store of prefixes, and what requests mean for them.

    name: of the model without a prefix; `NAME:PREFIX` and `PREFIX` are with one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: PrefixStore,
        name: str,
        tuner: Tuner,
        limits: Limits | None = None,
    ) -> None:
        import torch

        self.model, self.tokenizer, self.store, self.name = model, tokenizer, store, name
        self.tuner, self.limits, self.began = tuner, limits or Limits(), int(time.time())
        tokenizer("")  # a first call may change settings of truncation, which two threads must not do at once
        nothing = torch.zeros(0, dtype=torch.int64)
        self._plain = KVPrefix.from_tokens(model, nothing, torch.zeros(1, dtype=torch.int64)).requires_grad_(False)
        decoder = find_decoder(model)
        limits_of_model = (decoder.context_limit, decoder.position_limit, rope_switch(decoder.config, 0))
        self._positions = min((limit for limit in limits_of_model if limit is not None), default=None)
        self._ends = _end_tokens(model, tokenizer)

    def models(self) -> list[dict[str, Any]]:
        """The model without a prefix, and with each one in the store."""
        names = [self.name, *(f"{self.name}:{prefix}" for prefix in self.store)]
        return [{"id": name, "object": "model", "created": self.began, "owned_by": "ctkernels"} for name in names]

    def prefix(self, model: str) -> KVPrefix:
        """The prefix that a model's name stands for; may read a file.

        Raises:
            Refused: no such model, or a file that cannot be used.
        """
        if model == self.name:
            return self._plain
        own = f"{self.name}:"
        names = [model.removeprefix(own), model] if model.startswith(own) else [model]
        for name in names:
            try:
                if name in self.store:
                    return self.store.get(name)
            except PrefixFileError as error:
                log.error("%s", error)
                raise Refused(500, f"the stored prefix {name!r} cannot be used; the server's log says why") from None
            except ValueError:  # no name of a prefix
                continue
        raise Refused(404, f"there is no model {model!r}; GET /v1/models lists them", "model", "model_not_found")

    def describe(self, name: str) -> dict[str, Any]:
        """What there is to know of a stored prefix; reads its file. Raises Refused."""
        prefix = self.prefix(f"{self.name}:{name}")
        made = prefix.metadata
        text_format = TextFormat(**made.settings.get("text_format", {}))
        return {
            "name": name,
            "model": f"{self.name}:{name}",
            "tokens": prefix.length,
            "demonstrations": prefix.num_demonstrations,
            "method": made.method,
            "delimiter": text_format.delimiter,
        }

    def task(self, body: TuningBody) -> Task:
        """What is to be tuned. Raises Refused."""
        self._check_new_name(body.name, body.replace)
        limits = self.limits
        if body.epochs is not None and body.epochs > limits.epochs:
            raise Refused(400, f"epochs must be at most {limits.epochs} on this server, got {body.epochs}", "epochs")
        try:
            pairs = parse_jsonl(body.demonstrations.encode(errors="replace"), "demonstrations")
            if len(pairs) > limits.demonstrations:
                raise DataError(f"demonstrations: at most {limits.demonstrations} on this server, got {len(pairs)}")
            given = {name: getattr(body, name) for name in ("epochs", "lr", "seed")}
            settings = {name: value for name, value in given.items() if value is not None}
            return self.tuner.task(body.name, pairs, settings, TextFormat(delimiter=body.delimiter))
        except ValueError as error:
            raise Refused(400, str(error), "demonstrations" if isinstance(error, DataError) else None) from None

    def _check_new_name(self, name: str, replace: bool) -> None:
        if not name.isprintable() or name != name.strip():
            raise Refused(400, f"name must be printable, without spaces around it, got {name!r}", "name")
        if name == self.name or name.startswith(f"{self.name}:"):
            raise Refused(400, f"name must not be that of the model, got {name!r}", "name")
        try:
            there = name in self.store
        except ValueError as error:
            raise Refused(400, str(error), "name") from None
        if there and not replace:
            raise Refused(409, f"there is a prefix {name!r} already; replace=true replaces it", "name")

    def completion(self, body: CompletionBody) -> Request:
        """What the engine is to answer; may read a file. Raises Refused."""
        prefix = self.prefix(body.model)
        ends = self._ends
        if isinstance(body.prompt, list):
            size = self.model.get_input_embeddings().num_embeddings
            if any(not 0 <= token < size for token in body.prompt):
                raise Refused(400, f"tokens of prompt must lie in [0, {size})", "prompt")
            tokens = body.prompt
        elif body.input is not None:
            text_format = TextFormat(**prefix.metadata.settings.get("text_format", {}))
            tokens = encode_prompt(self.tokenizer, body.input, text_format)
            ends |= {tokens[0]}  # the delimiter
            if prefix is self._plain:
                tokens = tokens[1:]
        else:
            tokens = self.tokenizer(body.prompt, add_special_tokens=prefix is self._plain).input_ids
        return self._request(body, prefix, tokens, body.max_tokens or COMPLETION_TOKENS, ends)

    def chat(self, body: ChatBody) -> Request:
        """As `completion`."""
        if not self.tokenizer.chat_template:
            raise Refused(400, f"the tokenizer of {self.name} has no chat template; use /v1/completions", "messages")
        prefix = self.prefix(body.model)
        messages = [message.plain() for message in body.messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes about roles and their order
            raise Refused(400, f"the chat template refuses the messages: {error}", "messages") from None
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        if prefix is not self._plain and tokens[:1] == [self.tokenizer.bos_token_id]:
            tokens = tokens[1:]  # the prefix has it
        return self._request(body, prefix, tokens, body.max_completion_tokens or body.max_tokens, self._ends)

    def _request(
        self, body: GenerationBody, prefix: KVPrefix, tokens: list[int], wanted: int | None, ends: frozenset[int]
    ) -> Request:
        if not tokens:
            raise Refused(400, "prompt must have at least one token, got none", "prompt")
        most = self.limits.max_tokens
        if wanted is not None and wanted > most:
            raise Refused(400, f"max_tokens must be at most {most} on this server, got {wanted}", "max_tokens")
        if self._positions is not None:
            left = self._positions - prefix.first_position - len(tokens)
            if left < (wanted or 1):
                raise Refused(
                    400,
                    f"a prefix of {prefix.first_position} positions, a prompt of {len(tokens)} tokens and an answer of "
                    f"{wanted or 1} do not fit into the {self._positions} positions of {self.name}",
                    "prompt",
                    "context_length_exceeded",
                )
            most = min(most, left)
        sampling = Sampling(body.temperature, body.top_p, body.seed)
        return Request(prefix, tuple(tokens), wanted or most, sampling, ends, body.stops, self.limits.seconds)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What ends an answer, as in `generate`; where the model does not say, the tokenizer does."""
    said = model.generation_config.eos_token_id if model.can_generate() else None
    if said is None:
        said = tokenizer.eos_token_id
    return frozenset(() if said is None else [said] if isinstance(said, int) else said)
