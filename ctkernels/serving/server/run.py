"""Running the server: a socket, signals, and an end that leaves no request without its answer."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import uvicorn

from ctkernels.serving.server.app import make_app
from ctkernels.serving.server.engine import Engine
from ctkernels.serving.server.guard import LOOPBACK, Guard
from ctkernels.serving.server.metrics import Metrics
from ctkernels.serving.server.protocol import Limits
from ctkernels.serving.server.servable import require_servable
from ctkernels.serving.server.service import Service
from ctkernels.serving.server.tuner import Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.tuning.adapters.store import PrefixStore


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, who may call it, and how much it takes.

    name: of the model without a prefix.  token: that every request must have, or None.  open_to_all: listen beyond this
    machine although there is no token.  rows: requests that are answered together.  queue: requests that may wait.
    drain_seconds: how long requests may go on after SIGTERM.

    Raises:
        ValueError: an address that others can reach without a token; a number out of its range.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    open_to_all: bool = False
    rows: int = 16
    queue: int = 64
    drain_seconds: int = 60
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.token is None and not self.open_to_all and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines; give a token, or say that none is needed"
            )
        if self.token is not None and (not self.token.isascii() or self.token != self.token.strip() or not self.token):
            raise ValueError("token must be ASCII characters without spaces around them")
        for name, least in (("rows", 1), ("queue", 1), ("drain_seconds", 0), ("port", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: PrefixStore,
    options: ServerOptions,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGTERM or SIGINT, in the main thread. Then requests that were taken are answered, and no others.

    Args:
        model: in eval mode; it belongs to the server meanwhile.
        ready: called with the server's address when it listens.

    Raises:
        TypeError: a model that cannot be served in a batch, named.
        OSError: the address is in use.
    """
    require_servable(model)
    model.requires_grad_(False)
    metrics = Metrics()
    tuner = Tuner(model, tokenizer, store, metrics)
    service = Service(model, tokenizer, store, options.name, tuner, options.limits)
    engine = Engine(model, tokenizer, options.rows, options.queue, metrics)

    def drain() -> None:
        engine.refuse()
        tuner.cancel()

    app = make_app(service, engine)
    hosts = LOOPBACK | {options.host} if is_loopback(options.host) else None
    config = uvicorn.Config(
        Guard(app, options.limits.body_bytes, options.token, hosts),
        options.host,
        options.port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=options.drain_seconds,
    )
    try:
        listening = _bound(config)
        with contextlib.closing(listening):
            host, port = listening.getsockname()[:2]
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            _Server(config, drain).run(sockets=[listening])
    finally:
        tuner.close()
        engine.close()


def _bound(config: uvicorn.Config) -> socket.socket:
    try:
        return config.bind_socket()
    except SystemExit:  # which uvicorn raises, after a message
        raise OSError(f"cannot listen on {config.host}:{config.port}") from None


class _Server(uvicorn.Server):
    """uvicorn's, which ends normally after a signal. (The original raises the signal again.)"""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain()
        await super().shutdown(sockets)
