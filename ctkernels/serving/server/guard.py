"""Guard: what every request must have before a route sees it.

token    with a token, `Authorization: Bearer TOKEN`, or the same as the password of HTTP Basic, which browsers ask for
host     a server that is bound to this machine is called by its names alone: other sites' names may lead here, too
origin   no page of another site may send requests
size     a body within the limit
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ctkernels.serving.server.protocol import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """An ASGI app around another one. hosts: names it may be called by; None: any."""

    def __init__(
        self, app: App, body_bytes: int, token: str | None = None, hosts: frozenset[str] | None = None
    ) -> None:
        self._app, self._body_bytes, self._token, self._hosts = app, body_bytes, token, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _parts(f"//{host}").hostname not in self._hosts:
            return await _refuse(send, 403, f"this server is not {host[:100]!r}")
        if origin is not None and _parts(origin).netloc != host:
            return await _refuse(send, 403, "a page of another site may not call this server")
        if self._token is not None and scope["path"] != "/health" and not self._known(headers.get("authorization", "")):
            scheme = b'Basic realm="ctkernels"' if scope["path"] == "/" else b"Bearer"
            return await _refuse(send, 401, "this server needs its token", (b"www-authenticate", scheme))
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._body_bytes:
            return await _refuse(send, 413, f"a body may have {self._body_bytes} bytes")
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self._body_bytes:  # in pieces, without a length
                return await _refuse(send, 413, f"a body may have {self._body_bytes} bytes")
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def read() -> Message:
            nonlocal whole
            message, whole = whole, None
            return await receive() if message is None else message

        return await self._app(scope, read, send)

    def _known(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), (self._token or "").encode())


def _parts(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


async def _refuse(send: Send, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(error_body(message, "invalid_request_error")).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": [*own, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
