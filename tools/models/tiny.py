"""Tiny random instances of the model classes of the installed transformers.

    tiny_config(config class)  -> a configuration of a few narrow layers, every kind of layer in them
    tiny_model(class, config)  -> a random fp64 model of it

Every field that is a size gets the size of the first rule whose pattern matches its name; SPECIAL has what single
classes ask for beyond that.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
WINDOW = 8
LAYERS = 4
MOST_PARAMETERS = 20_000_000

RULES: tuple[tuple[str, Any], ...] = (
    (r"(.*_)?vocab(ulary)?_size(_.*)?", VOCABULARY),
    (r"pad_token_id", 0),
    (r"(decoder_start|bos)_token_id", 1),
    (r"eos_token_id|sep_token_id", 2),
    (r"num_key_value_heads|num_kv_heads|multi_query_num_heads|num_key_value_heads_.*|swa_num_key_value_heads", 2),
    (r"index_n_heads|linear_num_key_heads", 2),
    (r"(.*_)?num_(.*_)?heads|n_heads?|.*attention_heads|linear_num_value_heads|mamba_n_heads", 4),
    (r"encoder_layers|num_encoder_layers", 2),
    (r"num_nextn_predict_layers|num_mtp_layers|num_kv_shared_layers", None),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers", LAYERS),
    (r"(.*_)?head_dim|d_kv|(linear_)?(key|value)_head_dim|kv_channels", 8),
    (r"rotary_dim|d_rel", 4),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|v_head_dim|.*_rank", 16),
    (r"hidden_size_per_layer_input", 8),
    (r"moe_.*intermediate_size|shared_.*intermediate_size|.*expert.*_(size|dim)|.*router.*size", 16),
    (r"(.*_)?intermediate_size(_.*)?|(.*_)?ffn_(dim|hidden_size)|n_inner|d_ff|d_inner|dim_ff|ffn_hidden_size", 48),
    (r"hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|embedding_size|word_embed_proj_dim|attention_hidden_size", 32),
    (r"lru_width|n_embed|input_embedding_size|encoder_hidden_size|hidden_dim|d_embed", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_(source|target)_positions", 512),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|window_size|attention_window(_size)?", WINDOW),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_blocks", 4),
    (r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k|topk_group|n_group|num_selected_experts", 2),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace|num_dense_layers|moe_num_shared_experts", 1),
    (r"mamba_d_state|state_size|ssm_state_size|linear_(key|value)_head_dim", 8),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_n_groups|n_groups", 1),
    (r"index_topk", 4),
)
FIXED = {"tie_word_embeddings": False, "use_cache": True, "is_decoder": True}
_BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_BERT.update(num_hidden_layers=2, vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 2, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dots3_note_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 16, "index_head_dim": 8, "head_dim": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "encoder-decoder": {
        "encoder": _BERT,
        "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"n_group": 2, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        **{"indexer_compress_ratio": 2, "ngram_vocab_size_base": 50, "split_ngram_parts": 2, "hc_lowrank": 8},
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def size_of(name: str, value: Any) -> Any:
    """The tiny value of a configuration's field, which is `value` by default."""
    if name in FIXED:
        return FIXED[name]
    if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "layerdrop" in name):
        return 0.0
    if isinstance(value, bool) or not (value is None or isinstance(value, int)):
        return value
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            return value if size is None else size
    return value


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of the class with tiny sizes; the configurations inside it are tiny, too."""
    default = config_class()
    fields: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "dtype", "model_type"):
            continue
        if isinstance(value, PreTrainedConfig):
            fields[name] = tiny_config(type(value))
            continue
        new = size_of(name, value)
        if new is not value and new != value:
            fields[name] = new
    kinds = getattr(default, "layer_types", None)
    if kinds and not isinstance(_declared(config_class, "layer_types"), property):
        different = list(dict.fromkeys(kinds))
        fields["layer_types"] = [different[i % len(different)] for i in range(LAYERS)]
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = 4
    fields.update(SPECIAL.get(config_class.model_type, {}))
    fields.update(changes)
    config = config_class(**fields)
    for name in ("experts_implementation", "_experts_implementation"):
        if hasattr(config, name):
            setattr(config, name, "eager")
    return config


def _declared(config_class: type[PreTrainedConfig], name: str) -> Any:
    return getattr(config_class, config_class.attribute_map.get(name, name), None)


def tiny_model(model_class: str, model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp64 model in eval mode.

    Raises:
        ValueError: it would have more than MOST_PARAMETERS, since a field that is a size is in no rule.
    """
    kind = getattr(transformers, model_class)
    declared = CONFIG_MAPPING[model_type]
    config = tiny_config(declared if issubclass(declared, kind.config_class) else kind.config_class, **changes)
    torch.manual_seed(seed)
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{model_class} of a tiny configuration has {count / 1e6:.0f} million parameters")
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()
