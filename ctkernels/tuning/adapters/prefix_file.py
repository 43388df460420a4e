"""A saved prefix: one safetensors file and `prefix.json`, which names it and says what it belongs to.

`prefix.json` is the commit point: the tensors are written first, under a new name, then the JSON replaces its
predecessor in one step, then files it no longer names are removed. Killed at any moment, or on a full disk, the
directory holds either the old prefix or the new one, with what an adapter keeps beside it (see `adapter_file.py`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

import ctkernels
from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata, tokenizer_hash
from ctkernels.tuning.hf.models import find_decoder, other_architecture
from ctkernels.tuning.storage import atomic_file, atomic_write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "ctkernels-kv-prefix"
FORMAT_VERSION = 1
DESCRIPTION = "prefix.json"
TENSORS = re.compile(r"prefix-[0-9a-f]{16}\.safetensors")
WRITTEN = re.compile(r"(prefix|prompt)-[0-9a-f]{16}\.safetensors|lora-[0-9a-f]{16}")  # what we name; all else is users'


class PrefixFileError(ValueError):
    """A saved prefix that cannot be used; the message names the file and the reason."""


def save(prefix: KVPrefix, directory: str | os.PathLike, beside: Mapping[str, Any] | None = None) -> None:
    """Write `prefix` into `directory`, atomically. See `KVPrefix.save_pretrained`.

    beside: JSON values that describe what else belongs to it, its files written before.
    """
    directory = Path(directory)
    tensors = {
        f"{kind}.{index}": x.detach().cpu().contiguous()
        for kind in ("keys", "values")
        for index, x in enumerate(getattr(prefix, kind))
    }
    name = f"prefix-{secrets.token_hex(8)}.safetensors"
    description = {**_describe(prefix, tensors, name), **({"beside": dict(beside)} if beside else {})}
    json.dumps(description)  # settings that JSON cannot hold are refused before anything is written
    try:
        with atomic_file(directory / name) as temporary:
            safetensors.torch.save_file(tensors, temporary)
        atomic_write_json(directory / DESCRIPTION, description)
    finally:  # an error may also come after the new description is in its place
        remove_unnamed(directory)


def remove_unnamed(directory: Path) -> None:
    """Remove what saves wrote into `directory` and the description there does not name."""
    path = directory / DESCRIPTION
    named = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for other in directory.glob("*"):
        if WRITTEN.fullmatch(other.name) and other.name not in named:
            shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)


def load(
    directory: str | os.PathLike,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> KVPrefix:
    """Read and verify a prefix. See `KVPrefix.from_pretrained`."""
    directory = Path(directory)
    path = directory / DESCRIPTION
    description = read_description(path)
    try:
        metadata = PrefixMetadata(**description["metadata"])
        shapes = {key: tuple(shape) for key, shape in description["shapes"].items()}
        segments, first_position = torch.tensor(description["segments"]), description["first_position"]
        name, layers = description["tensors"], len(shapes) // 2
        if not TENSORS.fullmatch(name):
            raise ValueError(f"tensors names {name!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrefixFileError(f"{path}: damaged description: {type(error).__name__}: {error}") from error
    _check_belongs(path, metadata, model, tokenizer)
    tensors = _read_tensors(directory / name, shapes)
    try:
        keys, values = ([tensors[f"{kind}.{i}"] for i in range(layers)] for kind in ("keys", "values"))
        prefix = KVPrefix(keys, values, segments, first_position, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise PrefixFileError(f"{path}: {type(error).__name__}: {error}") from error
    if model is not None:
        decoder = find_decoder(model)
        prefix.to(dtype=decoder.prefix_dtype).place(decoder.devices)
    return prefix


def _describe(prefix: KVPrefix, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    metadata = prefix.metadata
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tensors": name,
        "shapes": {key: list(x.shape) for key, x in tensors.items()},
        "segments": prefix.segments.tolist(),
        "first_position": prefix.first_position,
        "metadata": asdict(metadata),
        "versions": {
            "ctkernels": ctkernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def read_description(path: Path) -> dict[str, Any]:
    """The description of a saved prefix. Raises PrefixFileError: none, a damaged, foreign or too new one."""
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PrefixFileError(f"{path}: no such file; a saved prefix is a directory with {DESCRIPTION}") from None
    except OSError as error:
        raise PrefixFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise PrefixFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise PrefixFileError(f'{path}: not a prefix saved by ctkernels (no "format": "{FORMAT}")')
    version = description.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise PrefixFileError(
            f"{path}: format version {version}, this ctkernels {ctkernels.__version__} reads up to {FORMAT_VERSION}; "
            f"it was written by {description.get('versions')}"
        )
    return description


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        # bytes of our own rather than a mapping of the file, which may be replaced while the prefix is in use
        tensors = safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise PrefixFileError(f"{path}: no such file, although {DESCRIPTION} names it") from None
    except OSError as error:
        raise PrefixFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise PrefixFileError(f"{path}: damaged or cut off: {error}") from error
    found = {key: tuple(x.shape) for key, x in tensors.items()}
    if found != shapes:
        wrong = sorted(key for key in found.keys() | shapes.keys() if found.get(key) != shapes.get(key))[0]
        raise PrefixFileError(
            f"{path}: tensor {wrong} has shape {found.get(wrong)}, {DESCRIPTION} says {shapes.get(wrong)}"
        )
    return tensors


def _check_belongs(
    path: Path,
    metadata: PrefixMetadata,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if model is not None:
        decoder = find_decoder(model)
        own_id = decoder.model.name_or_path
        other = other_architecture(metadata, decoder.config)
        if other is not None:
            raise PrefixFileError(
                f"{path}: made for {metadata.model_class} {metadata.model_id!r}; this {type(decoder.model).__name__} "
                f"{own_id!r} has {other}"
            )
        if metadata.model_id and own_id and metadata.model_id != own_id:
            warnings.warn(
                f"{path}: made for model {metadata.model_id!r}, loaded for {own_id!r} of the same configuration; "
                "with other weights the prefix means nothing",
                stacklevel=4,
            )
    if tokenizer is not None and metadata.tokenizer_hash not in (None, tokenizer_hash(tokenizer)):
        raise PrefixFileError(
            f"{path}: made with tokenizer {metadata.tokenizer_id!r} (vocabulary {metadata.tokenizer_hash}), not with "
            f"this {tokenizer.name_or_path!r} (vocabulary {tokenizer_hash(tokenizer)})"
        )
