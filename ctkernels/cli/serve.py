"""`ctkernels serve`: a model and a store of prefixes behind OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ctkernels.cli.model import load_model
from ctkernels.cli.options import ModelOptions
from ctkernels.cli.parse import CommandLine, UsageError

TOKEN = "CTKERNELS_TOKEN"  # environment variable; a command line can be read by other users
SHARED = ("model", "store", "engine", "host", "port", "memory_gib", "allow_other_weights")  # options of every engine
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "jinja2")


@dataclass(frozen=True)
class ServeConfig(ModelOptions):
    """Serve a model and a store of prefixes behind OpenAI's API.

    `model` in a request is the name of the model, or NAME:PREFIX for one of the prefixes in the store. Requests for
    different prefixes are answered in one batch. SIGTERM ends the server when the requests that it has taken are
    answered. GET / of the engine own is a page to tune and try prefixes.

    With the engine vllm, what follows `--` goes to `vllm serve`: ctkernels serve ... -- --max-model-len 4096
    """

    store: Path | None = None
    """Folder of a PrefixStore (required)."""
    engine: Literal["own", "vllm"] = "own"
    """Which server: own is this package's (extra [serve]), vllm is vLLM's, which must be installed."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    memory_gib: float = 1.0
    """Memory for the prefixes that were used most recently, in GiB; with vllm, in each worker."""
    name: str = ""
    """Name of the model without a prefix (own); default: the last part of --model."""
    token: str | None = None
    """What requests must have: Authorization: Bearer TOKEN (own); default: the environment variable CTKERNELS_TOKEN."""
    open_to_all: bool = False
    """Listen beyond this machine although there is no token (own)."""
    rows: int = 16
    """Requests that are answered together (own)."""
    queue: int = 64
    """Requests that may wait; more get status 429 (own)."""
    max_tokens: int = 1024
    """Most tokens of an answer (own)."""
    timeout: float = 300.0
    """Seconds that a request may take, its time in the queue included (own)."""
    drain_seconds: int = 60
    """How long requests may go on after SIGTERM (own)."""


def serve_command(argv: Sequence[str]) -> None:
    """`ctkernels serve`: until a signal ends it."""
    own, rest = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    config = CommandLine("ctkernels serve", own).parse(ServeConfig)
    if config.store is None:
        raise UsageError("store is required: the folder of a PrefixStore (--store)")
    if config.memory_gib < 0:
        raise UsageError(f"memory_gib must be >= 0, got {config.memory_gib}")
    memory = int(config.memory_gib * (1 << 30))
    if config.engine == "vllm":
        _serve_vllm(config, config.store, memory, rest)
    elif rest:
        raise UsageError(f"options behind -- are for the engine vllm, got {' '.join(rest)!r} with the engine own")
    else:
        _serve_own(config, config.store, memory)


def _serve_own(config: ServeConfig, folder: Path, memory: int) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"engine own needs {', '.join(missing)}, which the extra [serve] installs")

    from ctkernels.serving.server import Limits, ServerOptions, serve
    from ctkernels.tuning.adapters.store import PrefixStore
    from ctkernels.tuning.storage import check_target

    options = ServerOptions(
        name=config.name or Path(config.model).name,
        host=config.host,
        port=config.port,
        token=config.token if config.token is not None else os.environ.get(TOKEN),
        open_to_all=config.open_to_all,
        rows=config.rows,
        queue=config.queue,
        drain_seconds=config.drain_seconds,
        limits=Limits(max_tokens=config.max_tokens, seconds=config.timeout),
    )
    check_target(folder, folder=True)
    model, tokenizer = load_model(config)
    store = PrefixStore(folder, model, memory, allow_other_weights=config.allow_other_weights)
    count = len(store)

    def ready(address: str) -> None:
        print(f"serving {options.name} and {count} prefixes on {address}", flush=True)

    serve(model, tokenizer, store, options, ready)
    print("stopped", flush=True)


def _serve_vllm(config: ServeConfig, folder: Path, memory: int, rest: Sequence[str]) -> None:
    for field in fields(config):
        if field.name not in SHARED and getattr(config, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise UsageError(f"--{name} is for the engine own; options of `vllm serve` follow --")
    if not folder.is_dir():
        raise UsageError(f"store must be the folder of a PrefixStore (--store), got {str(folder)!r}: no folder")
    if find_spec("vllm") is None:
        raise UsageError("the engine vllm needs vLLM, which is not installed: it comes with the extra [vllm]")

    if not config.model:
        raise UsageError("model is required: a directory or a hub id (--model)")

    from ctkernels.serving.vllm.launch import ServeSettings, serve

    serve(
        ServeSettings(config.model, folder, config.host, config.port, memory, config.allow_other_weights, tuple(rest))
    )
