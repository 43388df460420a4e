"""A configuration of every class that transformers maps causal language models to, and further ones of many.

cases()        (model type, name) -> the model's class and its configuration's settings
build(case)    -> class and configuration: of real size, since `hf/tiny.py` makes them small
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ctkernels.testing.models import MODELS

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
# What defaults lack: settings without which a class cannot be built, or would have none of its layers of a kind.
COMPLETE: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention"],
    },
    "xmod": {"default_language": "en_XX"},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}
_LLAMA = {"num_key_value_heads": 8, "rope_parameters": LLAMA3}
_QWEN = {"num_key_value_heads": 4}
# Switches as published checkpoints set them, by (model type, name); sizes do not matter.
PUBLISHED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("llama", "Llama 3"): {"num_key_value_heads": 8},
    ("llama", "Llama 3.1"): _LLAMA,
    ("llama", "Llama 3.2 3B"): {**_LLAMA, "hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128},
    ("mistral", "Mistral 0.3"): {"sliding_window": None},
    ("mistral", "Mistral Nemo"): {"sliding_window": None, "hidden_size": 5120, "head_dim": 128},
    ("mixtral", "Mixtral"): {"sliding_window": None},
    ("qwen2", "Qwen2.5"): _QWEN,
    ("qwen2", "Qwen2.5 long"): {**_QWEN, "rope_parameters": YARN},
    ("qwen3", "Qwen3 0.6B"): {
        "num_key_value_heads": 8,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "head_dim": 128,
    },
    ("qwen3", "Qwen3 8B"): {"num_key_value_heads": 8, "head_dim": 128},
    ("qwen3_moe", "Qwen3 30B-A3B"): {**_QWEN, "head_dim": 128},
    ("phi3", "Phi 3 mini"): {"sliding_window": 2047},
    ("phi3", "Phi 3 mini long"): {"sliding_window": 262144, "rope_parameters": LONGROPE},
    ("phi3", "Phi 4 mini"): {"sliding_window": 262144, "rope_parameters": LONGROPE, "num_key_value_heads": 8},
    ("phimoe", "Phi 3.5 MoE"): {"sliding_window": 131072, "num_key_value_heads": 8},
    ("falcon", "Falcon 40B"): {
        "new_decoder_architecture": True,
        "hidden_size": 8192,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
    },
    ("falcon", "Falcon RW 1B"): {"alibi": True, "multi_query": False, "bias": True, "parallel_attn": False},
    ("granite", "Granite 3"): {"num_key_value_heads": 8, "attention_multiplier": 0.0078, "residual_multiplier": 0.22},
    ("olmo2", "OLMo 2 32B"): {"num_key_value_heads": 8},
    ("lfm2", "LFM2"): {"layer_types": ["conv", "full_attention"] * 16},
    ("minimax_m3_vl_text", "MiniMax M3"): {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
}


@dataclass(frozen=True)
class Case:
    """One configuration: of a model type, `settings` in place of the defaults of `config_class`."""

    model_type: str
    name: str
    model_class: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    config_class: str = ""


def model_types() -> Mapping[str, str]:
    """The classes of causal language models of the installed transformers, by model type."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def cases() -> Iterator[Case]:
    """The default configuration of every model type, then others: with a window, grouped heads, or published ones."""
    for model_type, model_class in model_types().items():
        complete = COMPLETE.get(model_type, {})
        yield Case(model_type, "default", model_class, complete)
        yield from _variants(model_type, model_class, complete)
    for (model_type, name), settings in PUBLISHED.items():
        yield Case(model_type, name, model_types()[model_type], settings)
    for name, (config_class, model_class, settings) in MODELS.items():
        model_type = getattr(transformers, config_class).model_type
        yield Case(model_type, f"tests {name}", model_class, settings, config_class)


def build(case: Case) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the configuration of a case.

    Raises:
        Exception: what transformers says of a class that it cannot build.
    """
    model_class = getattr(transformers, case.model_class)
    config_class = getattr(transformers, case.config_class) if case.config_class else CONFIG_MAPPING[case.model_type]
    config = config_class(**case.settings)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    if model_class.config_class is not None and not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    return model_class, config


def _variants(model_type: str, model_class: str, complete: Mapping[str, Any]) -> Iterator[Case]:
    try:
        default = CONFIG_MAPPING[model_type](**complete)
    except Exception:  # which the case of the defaults reports
        return
    fields = vars(default)
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if fields.get("sliding_window", 1) is None or fields.get("use_sliding_window") is False:
        switch = {"use_sliding_window": True, "max_window_layers": 1} if "use_sliding_window" in fields else {}
        yield Case(model_type, "window", model_class, {**complete, **switch, "sliding_window": 4096})
    if heads and kv_heads and "kv_lora_rank" not in fields:  # latent attention has none of its own
        other = heads if kv_heads != heads else heads // 4
        yield Case(model_type, "other heads", model_class, {**complete, "num_key_value_heads": other})
    parameters = fields.get("rope_parameters")
    if isinstance(parameters, Mapping) and parameters.get("rope_type") == "default":
        for rope in (LLAMA3, YARN):
            settings = {**complete, "rope_parameters": {**parameters, **rope}}
            yield Case(model_type, rope["rope_type"], model_class, settings)
