"""What earlier versions saved, in the terms of `file.py`.

    a folder       prefix.json, which names prefix-*.safetensors and, under "beside", what else there is:
                   prompt-*.safetensors, lora-*/ in peft's format, a "pool" of demonstrations
    an older one   these are named by adapter.json, which also names the tensors of the prefix that it belongs to
    a store        one safetensors file, described under "ctkernels-stored-prefix" in its header
    a checkpoint   one safetensors file, with "format": "ctkernels-checkpoint-1" in its header

None of them has a checksum or a fingerprint of the weights. What a damaged file raises, `file.py` puts into words.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ctkernels.tuning.storage import open_regular

VERSION = 1
DESCRIPTION, OLDER = "prefix.json", "adapter.json"
FOLDER, STORED, CHECKPOINT = "ctkernels-kv-prefix", "ctkernels-stored-prefix", "ctkernels-checkpoint-1"
TENSORS = re.compile(r"prefix-[0-9a-f]{16}\.safetensors")
WRITTEN = re.compile(r"(prefix|prompt)-[0-9a-f]{16}\.safetensors|lora-[0-9a-f]{16}")  # all else is the user's


def is_folder(directory: Path) -> bool:
    """Whether an earlier version saved an adapter there."""
    return (directory / DESCRIPTION).is_file()


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of the adapter in a folder."""
    with open_regular(directory / DESCRIPTION) as file:
        described = json.load(file)
    if described.get("format") != FOLDER:
        raise ValueError(f'{DESCRIPTION} was not saved by ctkernels (no "format": "{FOLDER}")')
    if described.get("format_version") != VERSION:
        raise ValueError(f"{DESCRIPTION} has format version {described.get('format_version')}, {VERSION} is known")
    if not TENSORS.fullmatch(described["tensors"]):
        raise ValueError(f"{DESCRIPTION} names {described['tensors']!r}")
    tensors = _read(directory / described["tensors"])
    for name in sorted(tensors.keys() | described["shapes"].keys()):
        found, expected = list(tensors[name].shape) if name in tensors else None, described["shapes"].get(name)
        if found != expected:
            raise ValueError(f"tensor {name} has shape {found}, {DESCRIPTION} says {expected}")
    description = _adapter(described)
    beside = dict(described.get("beside") or _described_apart(directory, described["tensors"]))
    if "prompt" in beside:
        prompt = _read(directory / _own(beside["prompt"]))
        tensors["prompt"] = prompt["embeddings"]
        description["prompt"] = {"segments": prompt["segments"].tolist()}
    if "lora" in beside:
        folder = directory / _own(beside["lora"])
        config = json.loads((folder / "adapter_config.json").read_bytes())
        tensors |= {f"lora.{name}": x for name, x in _read(folder / "adapter_model.safetensors").items()}
        description["lora"] = {
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "targets": sorted(config["target_modules"]),
        }
    if "pool" in beside:
        description["demonstrations"] = beside["pool"]
    return description, tensors


LATER_SETTINGS = {"train_states"}  # of models that earlier versions did not serve


def description(header: Mapping[str, str]) -> dict[str, Any] | None:
    """The description in the header of a store's file or a checkpoint; None for any other file."""
    if STORED in header:
        return _adapter(json.loads(header[STORED]))
    if header.get("format") == CHECKPOINT:
        recorded = {name: json.loads(header[name]) for name in ("run", "history")}
        return {"format": "ctkernels-checkpoint", "format_version": VERSION, **recorded}
    return None


def comparable(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run depends on, as recorded in a checkpoint of an earlier version and now, without what cannot be
    compared: fingerprints that were made otherwise, and settings that are not recorded any more, or were not yet."""
    other = {"model"} if saved.get("start_from") is None else {"model", "start_from"}
    other |= LATER_SETTINGS - saved.keys()
    kept = {name: value for name, value in now.items() if name not in other}
    return {name: value for name, value in saved.items() if name in kept}, kept


def remove_folder(directory: Path) -> None:
    """Remove what an earlier version saved there, its description first, so that half of it is not taken for all."""
    if not is_folder(directory):
        return
    for name in (DESCRIPTION, OLDER):
        (directory / name).unlink(missing_ok=True)
    for other in directory.glob("*"):
        if WRITTEN.fullmatch(other.name):
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)  # another process may be at it
            else:
                other.unlink(missing_ok=True)


def _adapter(described: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: described[name] for name in ("segments", "first_position", "metadata")}
    return {"format": "ctkernels-adapter", "format_version": VERSION, **parts}


def _described_apart(directory: Path, tensors: str) -> dict[str, Any]:
    """What adapter.json says beside a prefix with these tensors."""
    try:
        described = json.loads((directory / OLDER).read_bytes())
    except (OSError, ValueError):
        return {}
    belongs = isinstance(described, dict) and described.get("prefix") == tensors
    return described if belongs else {}


def _own(name: str) -> str:
    if not WRITTEN.fullmatch(name):
        raise ValueError(f"{DESCRIPTION} names {name!r}")
    return name


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with open_regular(path) as file:
            return safetensors.torch.load(file.read())
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or cut off: {error}") from error
