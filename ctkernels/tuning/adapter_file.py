"""A saved adapter: the folder of a saved prefix, and beside its files what the adapter holds besides.

    prefix.json, prefix-*.safetensors     see `prefix_file.py`
    prompt-*.safetensors                  the soft prompt
    lora-*/                               the LoRA update, in peft's own format
    adapter.json                          names them, and the prefix tensors they belong to; written last

An adapter that is a prefix and nothing else has the first two alone.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ctkernels.tuning import prefix_file
from ctkernels.tuning.adapter import Adapter
from ctkernels.tuning.data import Demonstration
from ctkernels.tuning.hf_models import find_decoder
from ctkernels.tuning.lora import Lora
from ctkernels.tuning.peft_export import CONFIG, WEIGHTS, export_peft
from ctkernels.tuning.prefix_file import DESCRIPTION, PrefixFileError
from ctkernels.tuning.prompt import SoftPrompt
from ctkernels.tuning.storage import atomic_file, atomic_write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "ctkernels-adapter"
FORMAT_VERSION = 1
NAME = "adapter.json"


def save(adapter: Adapter, directory: str | os.PathLike) -> None:
    """Write `adapter` into `directory`. See `Adapter.save_pretrained`."""
    directory, mark = Path(directory), secrets.token_hex(8)
    description: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    if adapter.prompt is not None:
        description["prompt"] = f"prompt-{mark}.safetensors"
        tensors = {"embeddings": adapter.prompt.embeddings, "segments": adapter.prompt.segments}
        _write_tensors(directory / description["prompt"], tensors)
    if adapter.lora is not None:
        description["lora"] = f"lora-{mark}"
        export_peft(adapter, directory / description["lora"], "lora")
    if adapter.pool:
        description["pool"] = [
            {"input": d.input, "output": d.output, "options": d.options, "source": d.source, "references": d.references}
            for d in adapter.pool
        ]
    adapter.prefix.save_pretrained(directory)
    if len(description) > 2:
        description["prefix"] = json.loads((directory / DESCRIPTION).read_bytes())["tensors"]
        atomic_write_json(directory / NAME, description)
    else:
        (directory / NAME).unlink(missing_ok=True)
    for other in (*directory.glob("prompt-*.safetensors"), *directory.glob("lora-*")):
        if other.name in (description.get("prompt"), description.get("lora")):
            continue
        shutil.rmtree(other) if other.is_dir() else other.unlink(missing_ok=True)


def load(
    directory: str | os.PathLike,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Adapter:
    """Read and verify an adapter. See `Adapter.from_pretrained`."""
    directory = Path(directory)
    path = directory / NAME
    prefix = prefix_file.load(directory, model, tokenizer)
    if not path.is_file():
        return Adapter(prefix)
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PrefixFileError(f"{path}: cannot be read: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise PrefixFileError(f'{path}: not an adapter saved by ctkernels (no "format": "{FORMAT}")')
    if description.get("format_version") != FORMAT_VERSION:
        raise PrefixFileError(
            f"{path}: format version {description.get('format_version')}, this ctkernels reads {FORMAT_VERSION}"
        )
    if description.get("prefix") != json.loads((directory / DESCRIPTION).read_bytes())["tensors"]:
        raise PrefixFileError(
            f"{path}: belongs to another prefix than {DESCRIPTION}; saving was interrupted, save again"
        )
    device = prefix.keys[0].device
    try:
        prompt = lora = None
        if "prompt" in description:
            tensors = _read_tensors(directory / Path(description["prompt"]).name)
            prompt = SoftPrompt(tensors["embeddings"], tensors["segments"]).to(device)
            if model is not None:
                prompt.to(find_decoder(model).prefix_dtype)
        if "lora" in description:
            lora = _read_lora(directory / Path(description["lora"]).name, device)
        pool = tuple(
            Demonstration(d["input"], d["output"], d["options"], d["source"], d["references"])
            for d in description.get("pool", ())
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PrefixFileError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    return Adapter(prefix, prompt, lora, pool)


def _read_lora(folder: Path, device: torch.device) -> Lora:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except OSError as error:
        raise ValueError(f"{folder / CONFIG}: cannot be read: {error.strerror or error}") from error
    tensors = {name: tensor.to(device) for name, tensor in _read_tensors(folder / WEIGHTS).items()}
    return Lora(config["r"], config["lora_alpha"], tuple(sorted(config["target_modules"])), tensors=tensors)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as temporary:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
