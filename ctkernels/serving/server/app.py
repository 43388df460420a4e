"""The routes: OpenAI's API for the model and its prefixes, health, metrics, tuning and the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from ctkernels.serving.server.engine import Busy, Closed, Engine, Failed, Finished, Piece, Request
from ctkernels.serving.server.page import render
from ctkernels.serving.server.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    TuningBody,
    error_body,
    in_words,
    usage,
)
from ctkernels.serving.server.service import Refused, Service
from ctkernels.serving.server.tuner import ENDS, Occupied, Tuning

WATCH = 0.25  # seconds between looks whether the client is still there
DONE = "data: [DONE]\n\n"
STATUS = {"timeout": 504, "error": 500, "cancelled": 499}


def make_app(service: Service, engine: Engine) -> FastAPI:
    """The app of a server. Its engine is closed by whoever made it."""
    app = FastAPI(title="ctkernels", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if engine.alive else "stopped"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": await asyncio.to_thread(service.models)}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        request = await asyncio.to_thread(service.completion, body)
        return await _answer(Form(body, "cmpl", "text_completion"), engine, request, http)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        request = await asyncio.to_thread(service.chat, body)
        return await _answer(ChatForm(body, "chatcmpl", "chat.completion"), engine, request, http)

    @app.get("/v1/prefixes")
    async def prefixes() -> Any:
        return {"object": "list", "data": await asyncio.to_thread(lambda: [{"name": name} for name in service.store])}

    @app.get("/v1/prefixes/{name:path}")
    async def prefix(name: str) -> Any:
        return await asyncio.to_thread(service.describe, name)

    @app.post("/v1/prefixes")
    async def tune(body: TuningBody, http: HttpRequest) -> Response:
        task = await asyncio.to_thread(service.task, body)
        try:
            tuning = service.tuner.start(task)
        except Occupied as occupied:
            return JSONResponse(error_body(str(occupied), "invalid_request_error", "occupied"), 409)
        if body.stream:
            return _sse(_followed(tuning, http))
        return JSONResponse({"name": task.name, "events": "/v1/tuning"}, 202)

    @app.get("/v1/tuning")
    async def tuning(http: HttpRequest) -> Response:
        if service.tuner.last is None:
            raise Refused(404, "nothing has been tuned on this server")
        return _sse(_followed(service.tuner.last, http))

    @app.delete("/v1/tuning")
    async def cancel() -> Any:
        cancelled = service.tuner.cancel()
        if cancelled is None:
            raise Refused(404, "nothing is being tuned")
        return {"name": cancelled.task.name, "cancelled": True}

    @app.get("/")
    async def page() -> Response:
        return await asyncio.to_thread(render, service)

    return app


class Form:
    """How an answer looks in JSON: that of completions."""

    def __init__(self, body: GenerationBody, prefix: str, kind: str) -> None:
        self.body, self.kind = body, kind
        self._same = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {"index": 0, **self._content(text), "logprobs": None, "finish_reason": end.why}
        counts = usage(end.prompt_tokens, end.tokens)
        return {**self._same, "object": self.kind, "choices": [choice], "usage": counts}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def piece(self, text: str, why: str | None = None) -> dict[str, Any]:
        """A part of a stream; the last one says why it ends."""
        return self._part({**self._delta(text), "logprobs": None, "finish_reason": why})

    def counts(self, end: Finished) -> dict[str, Any]:
        """The usage at the end of a stream."""
        return {**self._part(None), "usage": usage(end.prompt_tokens, end.tokens)}

    def _part(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, **choice}]
        return {**self._same, "object": self._part_kind, "choices": choices}

    @property
    def _part_kind(self) -> str:
        return self.kind

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content


class ChatForm(Form):
    """That of chats."""

    def first(self) -> list[dict[str, Any]]:
        return [self._part({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})]

    @property
    def _part_kind(self) -> str:
        return f"{self.kind}.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


async def _answer(form: Form, engine: Engine, request: Request, http: HttpRequest) -> Response:
    """The whole answer, or a stream of its pieces."""
    events, tell = _from_thread()
    try:
        ticket = engine.submit(request, tell)
    except Busy as busy:
        return JSONResponse(error_body(str(busy), "rate_limit_error", "queue_full"), 429, {"retry-after": "1"})
    except Closed as closed:
        return JSONResponse(error_body(str(closed), "server_error"), 503)

    async def watched() -> AsyncIterator[Piece | Finished | Failed]:
        """What happens to the request, as long as the client is there; then its row is free."""
        try:
            async for event in _while_connected(events, http):
                yield event
                if not isinstance(event, Piece):
                    return
        finally:
            ticket.cancel()

    if form.body.stream:
        return _sse(_stream(form, watched()))
    text = ""
    async for event in watched():
        if isinstance(event, Piece):
            text += event.text
        elif isinstance(event, Finished):
            return JSONResponse(form.whole(text, event))
        else:
            return JSONResponse(error_body(event.message, "server_error", event.why), STATUS[event.why])
    return Response(status_code=STATUS["cancelled"])  # nobody reads it


async def _followed(tuning: Tuning, http: HttpRequest) -> AsyncIterator[str]:
    """The events of a tuning from its beginning. It goes on if the client leaves."""
    events, tell = _from_thread()
    tuning.follow(tell)
    try:
        async for event in _while_connected(events, http):
            yield sse(event)
            if event["event"] in ENDS:
                yield DONE
                return
    finally:
        tuning.leave(tell)


def _from_thread() -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
    """A queue, and what puts an event into it from another thread."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def tell(event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(events.put_nowait, event)

    return events, tell


async def _while_connected(events: asyncio.Queue[Any], http: HttpRequest) -> AsyncIterator[Any]:
    """Events as they come, until the client has gone."""
    while not await http.is_disconnected():
        with contextlib.suppress(asyncio.TimeoutError):
            yield await asyncio.wait_for(events.get(), WATCH)


def _sse(events: AsyncIterator[str]) -> Response:
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _stream(form: Form, watched: AsyncIterator[Piece | Finished | Failed]) -> AsyncIterator[str]:
    async with contextlib.aclosing(watched):  # type: ignore[type-var]
        for part in form.first():
            yield sse(part)
        async for event in watched:
            if isinstance(event, Piece):
                yield sse(form.piece(event.text))
            elif isinstance(event, Finished):
                yield sse(form.piece("", event.why))
                if form.body.counts_in_stream:
                    yield sse(form.counts(event))
            else:
                yield sse(error_body(event.message, "server_error", event.why))
        yield DONE


def sse(value: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, place = in_words(error.errors())
    return JSONResponse(error_body(message, "invalid_request_error", param=place or None), 400)


async def _refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return JSONResponse(error_body(str(error), kind, error.code, error.param), error.status)


async def _unforeseen(http: HttpRequest, error: Exception) -> Response:
    """The log has the traceback."""
    return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)


async def _http(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = error_body(f"{http.method} {http.url.path}: {error.detail}", "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)
