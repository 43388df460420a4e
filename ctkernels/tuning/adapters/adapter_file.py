"""A saved adapter: the folder of a saved prefix, and beside its files what the adapter holds besides.

    prefix-*.safetensors     see `prefix_file.py`
    prompt-*.safetensors     the soft prompt
    lora-*/                  the LoRA update, in peft's own format
    prefix.json              names them under "beside", which holds the pool, too

The last is written last: replacing it replaces the adapter.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ctkernels.tuning.adapters import prefix_file
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.lora import Lora
from ctkernels.tuning.adapters.peft_export import CONFIG, WEIGHTS, export_peft
from ctkernels.tuning.adapters.prefix_file import DESCRIPTION, PrefixFileError, read_description, remove_unnamed
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.storage import atomic_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(adapter: Adapter, directory: str | os.PathLike) -> None:
    """Write `adapter` into `directory`. See `Adapter.save_pretrained`."""
    directory, mark = Path(directory), secrets.token_hex(8)
    beside: dict[str, Any] = {}
    if adapter.pool:
        beside["pool"] = [
            {"input": d.input, "output": d.output, "options": d.options, "source": d.source, "references": d.references}
            for d in adapter.pool
        ]
    try:
        if adapter.prompt is not None:
            beside["prompt"] = f"prompt-{mark}.safetensors"
            tensors = {"embeddings": adapter.prompt.embeddings, "segments": adapter.prompt.segments}
            _write_tensors(directory / beside["prompt"], tensors)
        if adapter.lora is not None:
            beside["lora"] = f"lora-{mark}"
            export_peft(adapter, directory / beside["lora"], "lora")
        prefix_file.save(adapter.prefix, directory, beside)
    except BaseException:
        remove_unnamed(directory)
        raise


def load(
    directory: str | os.PathLike,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Adapter:
    """Read and verify an adapter. See `Adapter.from_pretrained`."""
    directory = Path(directory)
    path = directory / DESCRIPTION
    prefix = prefix_file.load(directory, model, tokenizer)
    description, device = read_description(path), prefix.keys[0].device
    beside = description.get("beside") or _kept_apart(directory, description["tensors"])
    try:
        prompt = lora = None
        if "prompt" in beside:
            tensors = _read_tensors(directory / Path(beside["prompt"]).name)
            prompt = SoftPrompt(tensors["embeddings"], tensors["segments"]).to(device)
            if model is not None:
                prompt.to(find_decoder(model).prefix_dtype)
        if "lora" in beside:
            lora = _read_lora(directory / Path(beside["lora"]).name, device)
        pool = tuple(
            Demonstration(d["input"], d["output"], d["options"], d["source"], d["references"])
            for d in beside.get("pool", ())
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PrefixFileError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    return Adapter(prefix, prompt, lora, pool)


def _kept_apart(directory: Path, tensors: str) -> dict[str, Any]:
    """What adapter.json says beside a prefix with these tensors: before prefix.json named all parts, it did."""
    try:
        description = json.loads((directory / "adapter.json").read_bytes())
    except (OSError, ValueError):
        return {}
    belongs = isinstance(description, dict) and description.get("prefix") == tensors
    return description if belongs else {}


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
