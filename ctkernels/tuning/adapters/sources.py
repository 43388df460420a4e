"""Where a saved prefix is read from: a folder, a checkpoint of Trainer or accelerate, or a repository of the hub."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from ctkernels.tuning.adapters.file import FILE_NAME, PrefixFileError, Saved, faults, read_file, read_tensors

STATE_FILE = "model.safetensors"  # into which Trainer and accelerate write the state of a module
PATIENCE = 5  # seconds to reach the hub
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")  # behind one the hub has no address
EXTRA = "_extra_state"  # torch's name for what `get_extra_state` returns


def located(source: str | os.PathLike, subfolder: str, revision: str | None, token: str | bool | None) -> Path:
    """The folder or file of a saved prefix, fetched from the hub unless it is here.

    Raises:
        PrefixFileError: it is not here, and the hub does not have it.
    """
    path = Path(source, subfolder)
    if Path(source).exists() or isinstance(source, os.PathLike):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    away = unreachable_hub()
    where = {"subfolder": subfolder or None, "revision": revision, "local_files_only": away is not None}
    try:
        return Path(hf_hub_download(source, FILE_NAME, **where, token=token))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        why = " ".join(str(away or error).split())
        raise PrefixFileError(f"{path}: no such folder here, and nothing from the hub: {why}") from error


def unreachable_hub() -> str | None:
    """Why the hub cannot be reached, or None if it can or if that cannot be told: its client would try for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(os.environ.get(name) for name in PROXIES):
        return None
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=PATIENCE).close()
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached ({error})"
    return None


def read_prefixes(path: Path, adapter_name: str) -> dict[str, Saved]:
    """The prefixes of an adapter's folder or of a checkpoint, by name."""
    state = path / STATE_FILE if path.is_dir() else path
    if state.name != STATE_FILE or not state.exists() or (path / FILE_NAME).exists():
        saved = read_file(path, "adapter")
        if "lora" in saved.description:
            raise PrefixFileError(
                f"{saved.path}: its prefix belongs to a LoRA update of the weights; read it with "
                "Adapter.from_pretrained, and make a PrefixModel within `with adapter.weights(model):`"
            )
        return {adapter_name: saved}
    _, tensors = read_tensors(state)
    with faults(state):
        if EXTRA not in tensors:
            raise ValueError("not the state of a PrefixModel")
        descriptions = described(tensors[EXTRA])
        own = {name: f"prefixes.{name}." for name in descriptions}
        return {
            name: Saved(
                state,
                descriptions[name],
                {
                    key.removeprefix(start): x
                    for key, x in tensors.items()
                    if key.startswith(start) and key != f"{start}segments"
                },
            )
            for name, start in own.items()
        }


def described(state: Tensor) -> dict[str, Any]:
    """The descriptions of the prefixes of a state, by name, from what `PrefixModel.get_extra_state` returned."""
    return json.loads(bytes(state.tolist()))
