"""The command `ctkernels serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ctkernels.cli.parse import CommandLine, UsageError


@dataclass(frozen=True)
class ServeConfig:
    """Serve the prefixes of a store over HTTP, in OpenAI's protocol: `model` is BASE:PREFIX.

    With the engine vllm, what follows `--` goes to `vllm serve`: ctkernels serve ... -- --max-model-len 4096
    """

    engine: Literal["vllm"] = "vllm"
    """What runs the model: vLLM, which must be installed."""
    model: str = ""
    """Directory or hub id of the model that the prefixes were made for (required)."""
    store: Path | None = None
    """Folder of a PrefixStore (required)."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    memory_gib: float = 1.0
    """Prefixes that each worker keeps in memory, in GiB."""
    allow_other_weights: bool = False
    """Take prefixes that were made for other weights; the model's weights are then not read at the start."""


def serve_command(argv: Sequence[str]) -> None:
    """`ctkernels serve`: stored prefixes behind an HTTP server."""
    own, rest = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    config = CommandLine("ctkernels serve", own).parse(ServeConfig)
    if not config.model:
        raise UsageError("model is required: a directory or a hub id (--model)")
    if config.store is None or not config.store.is_dir():
        found = "none" if config.store is None else f"{str(config.store)!r}, which is no folder"
        raise UsageError(f"store must be the folder of a PrefixStore (--store), got {found}")
    if config.memory_gib < 0:
        raise UsageError(f"memory_gib must be >= 0, got {config.memory_gib}")
    if find_spec("vllm") is None:
        raise UsageError("engine vllm needs vLLM, which is not installed: it comes with the extra [vllm]")

    from ctkernels.serving.vllm.launch import ServeSettings, serve

    memory = int(config.memory_gib * (1 << 30))
    serve(
        ServeSettings(
            config.model, config.store, config.host, config.port, memory, config.allow_other_weights, tuple(rest)
        )
    )
