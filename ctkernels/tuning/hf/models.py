"""Which transformers models a prefix can be attached to, and where their parts are.

To add a model: one row in FAMILIES, and one row in the table of `ctkernels/testing/models.py`. The tests then compare
the attached model with the stock one on the concatenated context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

LEARNED, ROTARY, ALIBI = "learned", "rotary", "alibi"


@dataclass(frozen=True)
class Family:
    """Where a model class keeps its decoder and how it encodes positions.

    module: the modeling file.  causal: the class with the language model head.  base: the class that has the layers and
    computes positions.  layers, attention: name of the layer list in the base, and of the attention in a layer.
    """

    module: str
    causal: str
    base: str
    layers: str = "layers"
    attention: str = "self_attn"
    positions: str = ROTARY

    def matches(self, module: nn.Module, name: str) -> bool:
        path = f"transformers.models.{self.module}", name
        return any((kind.__module__, kind.__qualname__) == path for kind in type(module).__mro__)


FAMILIES: tuple[Family, ...] = (
    Family("gpt2.modeling_gpt2", "GPT2LMHeadModel", "GPT2Model", "h", "attn", LEARNED),
    Family("opt.modeling_opt", "OPTForCausalLM", "OPTDecoder", positions=LEARNED),
    Family("bloom.modeling_bloom", "BloomForCausalLM", "BloomModel", "h", "self_attention", ALIBI),
    Family("llama.modeling_llama", "LlamaForCausalLM", "LlamaModel"),
    Family("mistral.modeling_mistral", "MistralForCausalLM", "MistralModel"),
    Family("qwen2.modeling_qwen2", "Qwen2ForCausalLM", "Qwen2Model"),
    Family("qwen3.modeling_qwen3", "Qwen3ForCausalLM", "Qwen3Model"),
    Family("gemma2.modeling_gemma2", "Gemma2ForCausalLM", "Gemma2Model"),
    Family("gemma3.modeling_gemma3", "Gemma3ForCausalLM", "Gemma3TextModel"),
    Family("phi3.modeling_phi3", "Phi3ForCausalLM", "Phi3Model"),
    Family("gpt_neox.modeling_gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXModel", attention="attention"),
)

# Two models with equal values in these fields compute the same function of their weights. It is a list of the fields
# that count, so that new fields of a new transformers release do not make saved prefixes unusable.
ARCHITECTURE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "word_embed_proj_dim",
    "max_position_embeddings",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "do_layer_norm_before",
    "use_parallel_residual",
    "apply_residual_connection_post_layernorm",
    "use_bidirectional_attention",
)


@dataclass(frozen=True)
class Decoder:
    """The parts of a supported model.

    model: the class with the head, or the base itself.  base: the module that has the layers.  attentions: the
    attention module of each layer.  kv_heads, head_dim: shape of a layer's keys and values, `[kv_heads, P, head_dim]`.
    """

    family: Family
    model: PreTrainedModel
    base: PreTrainedModel
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]

    @property
    def config(self) -> PreTrainedConfig:
        return self.base.config

    @property
    def kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def prefix_dtype(self) -> torch.dtype:
        """Type of a prefix's master keys and values: fp32, or fp64 for an fp64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """The device that token ids must be on."""
        embeddings: torch.Tensor = self.base.get_input_embeddings().weight
        return embeddings.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The device of each layer's keys and values: that of its weights, or `device` if they are offloaded (meta)."""
        found = [next(attention.parameters()).device for attention in self.attentions]
        return tuple(self.device if device.type == "meta" else device for device in found)

    @property
    def context_limit(self) -> int | None:
        """Most positions of the model, as its config says, or None (ALiBi has no limit)."""
        return None if self.family.positions == ALIBI else getattr(self.config, "max_position_embeddings", None)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model, or `model` itself. Adapters that change its layers stay in force.

    Raises:
        ValueError: peft puts virtual tokens in front of what the model is given (prompt tuning, prefix tuning). A
            prefix would lie before them, and its keys and values would not depend on them, as those of a context do.
    """
    if not hasattr(model, "get_base_model"):
        return model
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} has virtual tokens of its own ({adapter.peft_type.value}), which peft puts before "
            "a context and an attached prefix would put behind it; use its base model: model.get_base_model()"
        )
    return model.get_base_model()


def find_decoder(model: nn.Module) -> Decoder:
    """The parts of `model`, which may be wrapped by peft.

    Raises:
        TypeError: not a transformers model, or a class that is not in FAMILIES; the message names it.
        ValueError: a variant of a known class that is not served (cross attention, and the like), or a peft model with
            virtual tokens of its own.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(inner).__name__}")
    for family in FAMILIES:
        if not (family.matches(inner, family.causal) or family.matches(inner, family.base)):
            continue
        base = next(m for m in inner.modules() if family.matches(m, family.base))
        layers = tuple(getattr(base, family.layers))
        decoder = Decoder(family, inner, base, layers, tuple(getattr(layer, family.attention) for layer in layers))
        _check_variant(decoder)
        return decoder
    raise TypeError(
        f"model class {type(inner).__name__} is not supported; "
        f"supported are {', '.join(family.causal for family in FAMILIES)}"
    )


def _check_variant(decoder: Decoder) -> None:
    config, name = decoder.config, type(decoder.model).__name__
    for field, why in (
        ("add_cross_attention", "only decoders without cross attention are supported"),
        ("use_bidirectional_attention", "only causal attention is supported"),
        ("slow_but_exact", "emulated tensor parallelism is not supported"),
    ):
        if getattr(config, field, False):
            raise ValueError(f"{name} with config.{field}={getattr(config, field)}: {why}")
    if not decoder.attentions:
        raise ValueError(f"{name} has no layers to attach a prefix to")


def config_hash(config: PreTrainedConfig) -> str:
    """Hash of the config's ARCHITECTURE_FIELDS."""
    fields = {name: getattr(config, name, None) for name in ARCHITECTURE_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rope_switch(config: PreTrainedConfig, prefix_positions: int) -> int | None:
    """The position that rows after a prefix of `prefix_positions` must not pass, or None.

    "longrope" and "dynamic" scaling choose the rotary frequencies of all keys by the length of the sequence. The keys
    of a prefix were rotated when the sequence was only the prefix; in a longer sequence two rotations would mix.
    """
    switches = []
    for parameters in _rope_parameters(getattr(config, "rope_parameters", None)):
        kind = parameters["rope_type"]
        at = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        # longrope has two sets of frequencies; a prefix that is longer than the switch already has the second
        if "dynamic" in kind or (kind == "longrope" and prefix_positions <= at):
            switches.append(at)
    return min(switches, default=None)


def _rope_parameters(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a config: one set for all layers, or one per layer type."""
    if isinstance(parameters, Mapping):
        if "rope_type" in parameters:
            yield parameters
        else:
            for value in parameters.values():
                yield from _rope_parameters(value)
