"""Where a saved prefix is read from: a folder, a checkpoint of Trainer or accelerate, or a repository of the hub."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from torch import Tensor

from ctkernels.tuning.adapters.file import (
    FILE_NAME,
    LONGEST_HEADER,
    PrefixFileError,
    Saved,
    faults,
    read_file,
    read_tensors,
)
from ctkernels.tuning.storage import open_regular

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
    with faults(state):
        open_regular(state).close()
        with safe_open(state, "pt") as file:  # a model's own weights are not read for this
            if EXTRA not in file.keys():  # noqa: SIM118
                raise ValueError("not the state of a PrefixModel")
    _, tensors = read_tensors(state)
    with faults(state):
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
    """The descriptions of the prefixes of a state, by name, from what `PrefixModel.get_extra_state` returned. Raises
    ValueError for what is none."""
    if state.dtype != torch.uint8 or state.dim() != 1 or state.numel() > LONGEST_HEADER:
        raise ValueError(
            f"the description of a state must be at most {LONGEST_HEADER} bytes, got {state.numel()} values"
        )
    return json.loads(bytes(state.tolist()))
