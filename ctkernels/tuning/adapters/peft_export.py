"""Adapters written in peft's format: `PeftModel.from_pretrained(model, directory)` loads them without this library.

    kind             what is written                                   peft's type
    cartridge        keys and values of every layer                    CARTRIDGE
    prefix-tuning    the same tensor under an older name               PREFIX_TUNING
    prompt-tuning    embeddings of a soft prompt                       PROMPT_TUNING
    lora             A and B of an update of the weights               LORA

peft keeps one tensor for all layers, `[P, layers * 2 * Hk * D]`: for each token and layer the key, then the value. It
lets rows begin at position P. What it has no place for (demonstrations, text format, model hash, offsets of options)
lies in the header of the safetensors file, where `peft_import.py` finds it and peft does not look.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.compose import moved
from ctkernels.tuning.adapters.file import CHECKSUM, check_finite, checksum
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.storage import atomic_file, check_target

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

Kind = Literal["cartridge", "prefix-tuning", "prompt-tuning", "lora"]
KINDS: tuple[Kind, ...] = ("cartridge", "prefix-tuning", "prompt-tuning", "lora")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # names that peft looks for
HEADER = "ctkernels"  # key of our part of the safetensors header
EXPORTED = "ctkernels-config"  # of the configuration as it was exported
EMBEDDINGS = "prompt_embeddings"  # peft's name of the one tensor of prompt learning


def export_peft(
    adapter: Adapter | KVPrefix,
    directory: str | os.PathLike,
    kind: Kind | None = None,
    model: PreTrainedModel | None = None,
) -> None:
    """Write an adapter into `directory` as peft would.

    Args:
        kind: see the top of this file. None takes "prompt-tuning" for an adapter with a soft prompt, otherwise
            "cartridge"; an adapter with a LoRA update has two parts, for two folders, and needs it said.
        model: needed for a prefix alone whose rows do not begin at position P (tokens left out or merged, parts that
            share positions): peft's do, so that all keys are moved.

    Warns where the adapter also puts demonstrations in words (ipt), which have no place in the file, and where it has
    offsets of options that belong to a LoRA update and a prefix of demonstrations together.
    A prefix beside a LoRA update belongs to the updated weights: in peft, merge the update first, then load the prefix.

    Raises:
        ValueError: an unknown kind, or one of which the adapter has nothing; layers of different shapes, an empty
            prefix, positions that peft cannot give. Nothing has been written then.
        PrefixFileError: a value that is not finite.
        OSError: the disk; what was there before is unharmed.
    """
    adapter = Adapter(adapter) if isinstance(adapter, KVPrefix) else adapter
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter or a KVPrefix, got {type(adapter).__name__}")
    kind = _choose(adapter, kind)
    metadata = adapter.prefix.metadata
    model_id = metadata.model_id or None
    if kind == "lora":
        config = replace(
            adapter.lora.config(metadata.model_class), base_model_name_or_path=model_id, inference_mode=True
        )
        return write_peft(directory, config, adapter.lora.tensors, _header(adapter, adapter.prefix.segments))
    if adapter.demonstrations:
        warnings.warn("peft has no place for the demonstrations that this adapter puts in words", stacklevel=2)
    if kind == "prompt-tuning":
        described, tensor = adapter.prompt, adapter.prompt.embeddings
    else:
        described = _from_own_length(adapter.prefix, model)
        tensor = flat_cache(described)
    config = _prompt_config(kind, described, model_id)
    write_peft(directory, config, {EMBEDDINGS: tensor}, _header(adapter, described.segments))


def _header(adapter: Adapter, segments: Tensor) -> dict[str, str]:
    metadata = adapter.prefix.metadata
    described = {"segments": segments.tolist(), "metadata": {**vars(metadata), "settings": dict(metadata.settings)}}
    if adapter.offsets is not None and adapter.lora is not None and adapter.prefix.num_demonstrations:
        warnings.warn("the offsets of the options belong to both parts of this adapter and are left out", stacklevel=3)
    elif adapter.offsets is not None:
        described["offsets"] = asdict(adapter.offsets)
    return {HEADER: json.dumps(described)}


def flat_cache(prefix: KVPrefix) -> Tensor:
    """A prefix as peft's one tensor, `[P, layers * 2 * Hk * D]`.

    Raises:
        ValueError: layers of different shapes, or that keep a state.
    """
    if len(prefix.states):
        raise ValueError("peft keeps keys and values alone, but this prefix holds states of other layers")
    shapes = {tuple(x.shape) for x in (*prefix.keys, *prefix.values)}
    if len(shapes) > 1:
        raise ValueError(
            f"peft keeps keys and values of all layers in one tensor, but this prefix has layers of shapes "
            f"{', '.join(map(str, sorted(shapes)))}"
        )
    layers = [x.detach().transpose(0, 1) for pair in zip(prefix.keys, prefix.values, strict=True) for x in pair]
    return torch.stack(layers, dim=1).flatten(1)


def write_peft(
    directory: str | os.PathLike,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    header: dict[str, str] | None = None,
) -> None:
    """The two files of a peft adapter. Both are complete on the disk before either replaces its predecessor."""
    directory = Path(directory)
    # not `config.save_pretrained`: it writes a file that is neither flushed nor replaced in one step
    described = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted).encode()  # sets of names
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(own, directory)
    if header:  # so that the weights alone say all, should the two files ever be of two exports
        header = {**header, EXPORTED: described.decode()}
        header[CHECKSUM] = checksum(header[HEADER] + header[EXPORTED], own)
    check_target(directory, folder=True)
    with atomic_file(directory / WEIGHTS) as weights, atomic_file(directory / CONFIG) as configuration:
        weights.write_bytes(safetensors.torch.save(own, {"format": "pt", **(header or {})}))
        configuration.write_bytes(described)


def _choose(adapter: Adapter, kind: str | None) -> str:
    if kind is None and adapter.lora is not None:
        raise ValueError(
            "kind must be given for an adapter with a LoRA update: 'lora' for the update, 'cartridge' for the prefix "
            "that belongs to it, in a folder each"
        )
    if kind is None:
        kind = "cartridge" if adapter.prompt is None else "prompt-tuning"
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "lora" and adapter.lora is None:
        raise ValueError(f"kind is 'lora', but this adapter ({adapter.method}) has no LoRA update")
    if kind == "prompt-tuning" and adapter.prompt is None:
        raise ValueError(f"kind is 'prompt-tuning', but this adapter ({adapter.method}) has no soft prompt")
    if kind != "lora" and adapter.prefix.length == 0:
        raise ValueError(f"the prefix of this adapter ({adapter.method}) is empty, which peft cannot load")
    return kind


def _from_own_length(prefix: KVPrefix, model: PreTrainedModel | None) -> KVPrefix:
    """The prefix with rows that begin at position P, as peft's do."""
    if prefix.first_position == prefix.length:
        return prefix
    if model is None:
        raise ValueError(
            f"rows of this prefix begin at position {prefix.first_position}, those of peft behind its {prefix.length} "
            "tokens: give the model, so that the keys can be moved"
        )
    return moved(prefix, model, prefix.length)


def _prompt_config(kind: str, described: Any, model_id: str | None) -> PeftConfig:
    from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig

    common = {
        "num_virtual_tokens": described.length,
        "num_transformer_submodules": 1,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": model_id,
    }
    if kind == "prompt-tuning":  # layers and heads are asked for by peft, and not used
        return PromptTuningConfig(token_dim=described.embeddings.shape[1], **common)
    heads, _, dimension = described.keys[0].shape
    common |= {"num_layers": len(described.keys), "num_attention_heads": heads, "token_dim": heads * dimension}
    if kind == "prefix-tuning":
        return PrefixTuningConfig(**common)
    return CartridgeConfig(num_frozen_tokens=0, **common)
