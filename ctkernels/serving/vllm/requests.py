"""HTTP requests that choose a prefix by name, on their way into vLLM's own server.

    {"model": "base:routing", "prompt": ...}      or the header  x-ctkernels-prefix: routing

becomes a request for `base`. Its prompt, when vLLM has made tokens of it, gets the prefix's P placeholder tokens in
front and the prefix's name and content as its `cache_salt` (`salts.py`). Between the two a ticket stands in the place
of the salt: whoever does not hold one cannot choose a prefix in another way.

    prompt      of /v1/completions: what follows the prefix, as it is, without BOS
    input       of /v1/completions, in place of `prompt`: an input as in training, put into the prefix's text format
    messages    of /v1/chat/completions: the tokenizer's chat template, without BOS
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ctkernels.serving.vllm.files import PrefixFiles
from ctkernels.serving.vllm.salts import MARK
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.adapters.store import UnknownPrefixError
from ctkernels.tuning.data.formats import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER = b"x-ctkernels-prefix"
TICKET = "ctkernels-ticket-"
MOST_SALT = 128  # characters, as vLLM has it
COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class RequestError(ValueError):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Ticket:
    """What a request chose. name: of the prefix.  salt: the client's own.  drop: a token that its prompt must not begin
    with (BOS of a chat template)."""

    name: str
    salt: str = ""
    drop: int | None = None


class Prefixes:
    """The prefixes of a server, and the requests that read them.

    Args:
        files: the prefixes.
        served: names of the base model.
        tokenizer: of the model; for `input`, and for its BOS token.
    """

    def __init__(self, files: PrefixFiles, served: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.files, self.served, self.tokenizer = files, sorted(served, key=len, reverse=True), tokenizer
        self._tickets: dict[str, Ticket] = {}

    def chosen(self, model: object, header: str | None) -> tuple[str | None, str] | None:
        """The base model and the prefix that a request asks for, or None for none.

        Raises:
            RequestError: the model and the header name different ones.
        """
        named = None
        if isinstance(model, str) and model not in self.served:
            base = next((name for name in self.served if model.startswith(f"{name}:")), None)
            named = None if base is None else (base, model[len(base) + 1 :])
        if header is not None and named is not None and named[1] != header:
            raise RequestError(f"model asks for the prefix {named[1]!r}, the header {HEADER.decode()} for {header!r}")
        if named is not None:
            return named
        return None if header is None else (model if isinstance(model, str) else None, header)

    def rewritten(self, path: str, body: Mapping[str, Any], header: str | None) -> tuple[dict[str, Any], str] | None:
        """A request for the base model and the ticket in it, or None if it asks for no prefix.

        Raises:
            RequestError: what cannot be had with a prefix, an unknown prefix (404), or one of another model.
        """
        choice = self.chosen(body.get("model"), header)
        if choice is None:
            return None
        base, name = choice
        try:
            found = self.files.describe(name)
        except ValueError as error:
            raise self.refused(name, error) from None
        if body.get("echo") or body.get("prompt_logprobs") is not None:
            what = "echo" if body.get("echo") else "prompt_logprobs"
            raise RequestError(f"{what} cannot be had behind a prefix, whose tokens are placeholders")
        salt = body.get("cache_salt") or ""
        if not isinstance(salt, str) or len(salt) > MOST_SALT:
            raise RequestError(f"cache_salt must be a text of at most {MOST_SALT} characters")
        new, drop = dict(body), None
        if base is not None:
            new["model"] = base
        if path == COMPLETIONS:
            new.setdefault("add_special_tokens", False)  # BOS is in the prefix
            if "input" in new:
                new["prompt"] = self._inputs(new.pop("input"), new.get("prompt"), found.text_format)
        else:
            drop = self.tokenizer.bos_token_id
        ticket = f"{TICKET}{secrets.token_hex(16)}"
        self._tickets[ticket] = Ticket(name, salt, drop)
        new["cache_salt"] = ticket
        return new, ticket

    def _inputs(self, given: object, prompt: object, text_format: Any) -> list[list[int]]:
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise RequestError("input must be a text or a list of texts")
        if prompt:
            raise RequestError(
                "input and prompt are both given; input is put into the prefix's text format, prompt not"
            )
        return [encode_prompt(self.tokenizer, text, text_format) for text in texts]

    def refused(self, name: str, error: ValueError) -> RequestError:
        """An error about a prefix as a client may see it, who is told nothing of this machine's folders."""
        if not isinstance(error, PrefixFileError):
            return RequestError(str(error))
        unknown = isinstance(error, UnknownPrefixError)
        message = str(error).removeprefix(
            f"{self.files.folder.directory}: " if unknown else f"{self.files.folder.path(name)}: "
        )
        return RequestError(message if unknown else f"prefix {name!r}: {message}", 404 if unknown else 400)

    def close(self, ticket: str) -> None:
        """The request has ended."""
        self._tickets.pop(ticket, None)

    def placed(self, prompt: Any, params: Any) -> Any:
        """A prompt as the engine takes it, with the placeholder tokens in front and the salt of the prefix, if it holds
        a ticket; any other as it is.

        Args:
            prompt: a mapping with `prompt_token_ids` and perhaps `cache_salt`.
            params: vLLM's sampling parameters.

        Raises:
            RequestError: a prompt that cannot follow a prefix; one that has gone (404), or cannot be served.
        """
        salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
        if salt is None or not salt.startswith((TICKET, MARK)):
            return prompt
        ticket = self._tickets.get(salt)
        if ticket is None:
            raise RequestError(f"cache_salt must not begin with {MARK!r} or {TICKET!r}: name a prefix in model")
        if prompt.get("type", "token") != "token":
            raise RequestError(f"a prompt behind a prefix must be tokens, got {prompt['type']!r}")
        if getattr(params, "prompt_logprobs", None) is not None or getattr(params, "skip_reading_prefix_cache", None):
            raise RequestError("prompt_logprobs cannot be had behind a prefix, whose tokens are placeholders")
        try:
            found, ids = self.files.describe(ticket.name), list(prompt["prompt_token_ids"])
        except PrefixFileError as error:
            raise self.refused(ticket.name, error) from None
        if ticket.drop is not None and ids[:1] == [ticket.drop]:
            ids = ids[1:]
        if not ids:
            raise RequestError("prompt must have at least one token behind a prefix")
        kept = {name: value for name, value in prompt.items() if name != "prompt_token_offsets"}
        salt = str(replace(found.placed, salt=ticket.salt))
        return {**kept, "prompt_token_ids": [*found.context, *ids], "cache_salt": salt}

    def cards(self, base: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The prefixes as entries of /v1/models, like that of the base model."""
        name = base["id"]
        return [{**base, "id": f"{name}:{prefix}", "root": name, "parent": name} for prefix in self.files.folder]


class PrefixMiddleware:
    """ASGI middleware: reads the choice of a prefix off requests, and adds the prefixes to the list of models."""

    def __init__(self, app: App, prefixes: Prefixes) -> None:
        self.app, self.prefixes = app, prefixes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path") or "")
        if scope["type"] == "http" and scope["method"] == "GET" and path == MODELS:
            await self._models(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and path.startswith("/v1/"):
            await self._post(path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _post(self, path: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        data, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            data, more = data + message.get("body", b""), message.get("more_body", False)
        header = dict(scope["headers"]).get(HEADER)
        try:
            body = json.loads(data)
        except ValueError:
            body = None  # vLLM says what is wrong with it
        ticket = None
        if isinstance(body, dict):
            try:
                name = None if header is None else header.decode("utf-8")
                # a shared disk may be slow; other requests go on meanwhile
                found = await asyncio.to_thread(self.prefixes.rewritten, path, body, name)
            except (RequestError, UnicodeDecodeError) as error:
                await _refuse(send, str(error), getattr(error, "status", 400))
                return
            if found is not None:
                body, ticket = found
                data = json.dumps(body).encode()
                kept = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
                scope = {**scope, "headers": [*kept, (b"content-length", str(len(data)).encode())]}
        unread = True

        async def again() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": data, "more_body": False}
            return await receive()

        try:
            await self.app(scope, again, send)
        finally:
            if ticket is not None:
                self.prefixes.close(ticket)

    async def _models(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        start: Message = {}
        data = b""

        async def collect(message: Message) -> None:
            nonlocal data
            if message["type"] == "http.response.start":
                start.update(message)
                return
            data += message.get("body", b"")
            if message.get("more_body", False):
                return
            if start["status"] == 200:
                listed = json.loads(data)
                listed["data"] += await asyncio.to_thread(self.prefixes.cards, listed["data"][0])
                data = json.dumps(listed).encode()
            kept = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            await send({**start, "headers": [*kept, (b"content-length", str(len(data)).encode())]})
            await send({"type": "http.response.body", "body": data})

        await self.app(scope, receive, collect)


async def _refuse(send: Send, message: str, status: int) -> None:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    error = {"message": message, "type": kind, "param": "model" if status == 404 else None, "code": status}
    data = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
