"""Adapters that peft wrote, as ours: the reverse of `peft_export.py`.

peft's type                        becomes
CARTRIDGE, PREFIX_TUNING           a KV prefix of P tokens, rows from position P
PROMPT_TUNING                      a soft prompt, and the KV prefix that it amounts to
LORA                               a LoRA update, and the prefix of what a sequence starts with: BOS, or nothing
"""

from __future__ import annotations

import json
import os
import pickle
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.file import CHECKSUM, PrefixFileError, checksum, faults, read_tensors, require_finite
from ctkernels.tuning.adapters.lora import Lora
from ctkernels.tuning.adapters.peft_export import CONFIG, EMBEDDINGS, EXPORTED, HEADER, WEIGHTS
from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.formats import TextFormat, start_tokens
from ctkernels.tuning.evaluation.calibration import Offsets
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.hf.models import Decoder, find_decoder
from ctkernels.tuning.storage import open_regular

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_CONFIG = 1 << 20  # bytes
OLD_WEIGHTS = "adapter_model.bin"  # what peft wrote before safetensors
# fields of a LoRA configuration that do not change what its A and B compute; the modules are read off the tensors
LORA_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
# starts of LoRA that leave the model's own weights alone
KEEPS_WEIGHTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Source:
    """What the two files of an adapter say, and what it is read for; segments is None where the files do not say."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    segments: Tensor | None
    metadata: PrefixMetadata
    tokenizer: PreTrainedTokenizerBase | None

    def embeddings(self) -> Tensor:
        """The one tensor of prompt learning, `[num_virtual_tokens, columns]`."""
        tensor, count = self.tensors.get(EMBEDDINGS), self.config.get("num_virtual_tokens")
        if tensor is None:
            raise ValueError(f"no tensor named {EMBEDDINGS}, got {', '.join(sorted(self.tensors)) or 'none'}")
        if self.config.get("num_transformer_submodules") not in (None, 1):
            raise ValueError("adapters of encoder-decoder models cannot be imported")
        if tensor.dim() != 2 or tensor.shape[0] != count or not tensor.is_floating_point():
            raise ValueError(
                f"{EMBEDDINGS} must be floating [{count}, columns], got {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor

    def offsets(self) -> Tensor:
        """Segments; all tokens before the first demonstration where no token belongs to one."""
        return torch.tensor([self.config["num_virtual_tokens"]]) if self.segments is None else self.segments


def import_peft(
    directory: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_pickle: bool = False,
    allow_other_weights: bool = False,
) -> Adapter:
    """Read a CARTRIDGE, PREFIX_TUNING, PROMPT_TUNING or LORA adapter from a local folder, on the model's device.

    What `export_peft` wrote comes back with its demonstrations, settings and offsets of options; in what peft wrote, no
    token belongs to a demonstration. `tokenizer` is recorded in the metadata of what peft wrote, and says whether a
    LoRA update's sequences start with BOS (without one they do not). `allow_pickle` also reads adapter_model.bin, of a
    peft before safetensors: a pickle, of which torch reads tensors alone. `allow_other_weights`: as in
    `KVPrefix.from_pretrained`.

    Raises:
        PrefixFileError: missing or damaged files, values that are not finite, a pickle that was not allowed, another
            type of adapter, one for other weights, shapes of another model, LoRA with options that change more than A
            and B (rank patterns, DoRA, trained biases ...), named.
    """
    directory, decoder = Path(directory), find_decoder(model)
    path = directory / CONFIG
    config, tensors, header = _read_pair(directory, allow_pickle)
    kind = config.get("peft_type")
    read = {
        "CARTRIDGE": _read_prefix,
        "PREFIX_TUNING": _read_prefix,
        "PROMPT_TUNING": _read_prompt,
        "LORA": _read_lora,
    }.get(str(kind))
    if read is None:
        raise PrefixFileError(
            f"{path}: an adapter of type {kind} cannot be imported; known are CARTRIDGE, PREFIX_TUNING, PROMPT_TUNING "
            "and LORA"
        )
    with faults(path):
        segments, metadata = _described(decoder, tokenizer, kind, header)
        made_for = (
            metadata if header else replace(metadata, model_id=config.get("base_model_name_or_path"), weights=None)
        )
        made_for.check_weights(decoder.model, path, allow_other_weights)
        adapter = read(decoder, Source(config, tensors, segments, metadata, tokenizer))
        return replace(adapter, offsets=Offsets.of(header))


def _read_pair(directory: Path, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Configuration, tensors, and our part of the header, all of one export: the weights say what they were exported
    with, should a process have been killed between the two files, or another one replace them now."""
    for attempt in (1, 2):
        config = _read_config(directory / CONFIG)
        metadata, tensors = _read_weights(directory, allow_pickle)
        with faults(directory / WEIGHTS):
            text = metadata.get(HEADER, "") + metadata.get(EXPORTED, "")
            if metadata.get(CHECKSUM, "") not in ("", checksum(text, tensors)):  # exports of earlier versions have none
                raise ValueError(
                    "damaged: its tensors or their description are not those that were exported (checksum)"
                )
            exported = json.loads(metadata.get(EXPORTED, "null"))
            header = json.loads(metadata.get(HEADER, "{}"))
            if not isinstance(header, dict) or not isinstance(exported, dict | None):
                raise ValueError("damaged: its description is not what ctkernels writes")
        if exported in (None, config):
            return config, tensors, header
        if attempt == 1:
            time.sleep(0.05)
    warnings.warn(
        f"{directory / CONFIG} is not the configuration that {WEIGHTS} was exported with; that one is used",
        stacklevel=3,
    )
    return exported, tensors, header


def _read_config(path: Path) -> dict[str, Any]:
    with faults(path):
        if not path.exists():
            raise PrefixFileError(f"{path}: no such file; a peft adapter is a local folder with {CONFIG}")
        with open_regular(path) as file:
            data = file.read(LONGEST_CONFIG + 1)
        if len(data) > LONGEST_CONFIG:
            raise ValueError(f"more than the {LONGEST_CONFIG} bytes that are read of a configuration")
        config = json.loads(data)
        if not isinstance(config, dict):
            raise ValueError("not the configuration of a peft adapter")
        return config


def _read_weights(directory: Path, allow_pickle: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata of the header, and the tensors."""
    path, old = directory / WEIGHTS, directory / OLD_WEIGHTS
    if path.exists() or not old.exists():
        return read_tensors(path)
    if not allow_pickle:
        raise PrefixFileError(
            f"{old}: a pickle, which can be made to harm who reads it; allow_pickle=True (--allow-pickle) reads one "
            f"that is trusted, and a newer peft saves it as {WEIGHTS}"
        )
    with faults(old):
        with open_regular(old) as file:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, EOFError):  # whose message says how to run what is in it
                raise ValueError("damaged, or it holds more than tensors") from None
        if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise ValueError("must hold tensors by name")
        for name, x in tensors.items():
            if x.layout != torch.strided or x.numel() * x.element_size() > x.untyped_storage().nbytes():
                raise ValueError(f"tensor {name} of shape {tuple(x.shape)} is larger than what the file holds of it")
        require_finite(tensors)
        return {}, tensors


def _described(
    decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, kind: str, header: dict[str, Any]
) -> tuple[Tensor | None, PrefixMetadata]:
    """Segments and metadata that `export_peft` recorded, or None and what can be said without."""
    if not header:
        return None, PrefixMetadata.of(decoder.model, tokenizer, f"peft {kind.lower().replace('_', '-')}")
    metadata = PrefixMetadata(**header["metadata"])
    metadata.check(decoder.model)
    return torch.tensor(header["segments"]), metadata


def _read_prefix(decoder: Decoder, source: Source) -> Adapter:
    flat = source.embeddings()
    layers, heads, dimension = len(decoder.attentions), decoder.kv_heads, decoder.head_dim
    if any(shape != (heads, dimension, dimension) for shape in decoder.shapes):
        raise ValueError(
            f"peft keeps keys and values of all layers in one tensor, but those of {type(decoder.model).__name__} have "
            f"several shapes: {', '.join(map(str, sorted({tuple(shape) for shape in decoder.shapes})))}"
        )
    expected = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * dimension}
    for name, value in expected.items():
        if source.config.get(name) != value:
            raise ValueError(f"{name} is {source.config.get(name)}, {type(decoder.model).__name__} needs {value}")
    length = flat.shape[0]
    if flat.shape[1] != layers * 2 * heads * dimension:
        raise ValueError(f"{EMBEDDINGS} must have {layers * 2 * heads * dimension} columns, got {flat.shape[1]}")
    own = flat.to(decoder.device, decoder.prefix_dtype).view(length, layers, 2, heads, dimension).permute(1, 2, 3, 0, 4)
    keys, values = ([own[i, kind].to(decoder.devices[i]).contiguous() for i in range(layers)] for kind in (0, 1))
    return Adapter(KVPrefix(keys, values, source.offsets(), length, source.metadata))


def _read_prompt(decoder: Decoder, source: Source) -> Adapter:
    embeddings = source.embeddings()
    width = decoder.model.get_input_embeddings().weight.shape[1]
    if embeddings.shape[1] != width:
        raise ValueError(
            f"{EMBEDDINGS} must have {width} columns for {type(decoder.model).__name__}, got {embeddings.shape[1]}"
        )
    prompt = SoftPrompt(embeddings.to(decoder.device, decoder.prefix_dtype), source.offsets())
    return Adapter(prompt.to_prefix(decoder.model, source.metadata), prompt)


def _read_lora(decoder: Decoder, source: Source) -> Adapter:
    from peft import LoraConfig

    config, tensors = source.config, source.tensors
    plain = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in LORA_FREE and (value or None) != (plain.get(name) or None):
            raise ValueError(
                f"LoRA with {name} = {value!r} is more than A and B of one rank, which is what can be read"
            )
    if config.get("init_lora_weights") not in KEEPS_WEIGHTS:
        raise ValueError(f"init_lora_weights = {config['init_lora_weights']!r} changed the model's weights, too")
    parts = [(name, name.rpartition(".lora_")[0]) for name in tensors]
    other = [name for name, module in parts if not module or not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if other or not parts:
        raise ValueError(f"LoRA tensors must be lora_A.weight and lora_B.weight of linear modules, got {other[:3]}")
    targets = tuple(sorted({module.removeprefix("base_model.model.") for _, module in parts}))
    scale = config["r"] ** 0.5 if config.get("use_rslora") else 1.0  # alpha / sqrt(r) instead of alpha / r
    lora = Lora(config["r"], config["lora_alpha"] * scale, targets, tensors=tensors)
    lora.check(decoder.model)  # before anything of this rank is made
    lora.tensors = {name: tensor.to(decoder.device, decoder.prefix_dtype) for name, tensor in tensors.items()}
    text_format = TextFormat(**source.metadata.settings.get("text_format", {}))
    start = () if source.tokenizer is None else start_tokens(source.tokenizer, text_format)
    with lora.merged(decoder.model):
        keys, values = encode_tokens(decoder.model, torch.tensor(start, dtype=torch.int64))
    prefix = KVPrefix(keys, values, torch.tensor([len(start)]), len(start), source.metadata)
    return Adapter(prefix, lora=lora)
