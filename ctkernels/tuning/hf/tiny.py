"""Tiny random models with the switches of a given configuration.

    shrink(config)           -> a configuration of the same class with a few narrow layers, one of every kind among them
    make_tiny(cls, config)   -> a random fp64 model of it
    kind_of(config)          -> what two configurations have in common that a proof for one holds for the other

What is a size is said by field names, below. Lengths (windows, chunks, blocks) become shorter than the sequences of a
proof, so that they bite. All else stays: kinds of layers, norms, biases, softcaps, scales, multipliers, rotary types.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
HEADS, HEAD_DIM = 4, 16
WIDTH, NARROW = 64, 48  # hidden size where it is heads * head dimension, and where it is not
WINDOW = 8
LAYERS = 3  # at least so many, and one of every kind
POSITIONS = 2048
REACH = 512  # a length that is not known to be one is reached up to here


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_WIDTHS = _names(
    "hidden_size d_model n_embd embed_dim dim emb_dim embedding_dim word_embed_proj_dim embedding_size "
    "input_embedding_size output_embedding_size attention_hidden_size lru_width backbone_hidden_size"
)
_HEADS = _names(
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"
)
_KV_HEADS = _names("num_key_value_heads num_kv_heads kv_n_heads num_query_groups swa_num_key_value_heads")
_HEAD_DIMS = _names("head_dim d_head d_kv kv_channels swa_head_dim attention_head_dim")
_LAYERS = _names(
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers"
)
# lists of the layers that are of a kind
_LAYER_INDICES = _names(
    "full_attn_idxs moe_layers mlp_only_layers hybrid_layer_ids attn_layer_indices ple_layer_ids cross_attention_layers"
)
# what a field becomes, unless it is off: None or 0
_SIZES: Mapping[str, int] = {
    name: size
    for size, names in (
        (
            48,
            "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff d_inner "
            "intermediate_size_mlp dense_intermediate_size feed_forward_size",
        ),
        (
            16,
            "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
            "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size mamba_head_dim "
            "swa_q_lora_rank q_lora_rank o_lora_rank indexer_head_dim gated_norm_rank laurel_rank adapter_rank "
            "mamba_headdim hc_lowrank",
        ),
        (
            POSITIONS,
            "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length model_max_length context_length "
            "max_target_positions max_source_positions",
        ),
        (24, "v_head_dim swa_v_head_dim"),  # unlike HEAD_DIM
        (32, "kv_lora_rank swa_kv_lora_rank"),
        (POSITIONS // 2, "original_max_position_embeddings"),
        (
            8,
            "swa_qk_rope_head_dim swa_qk_nope_head_dim "
            "qk_rope_head_dim qk_nope_head_dim index_head_dim rotary_dim d_rel hidden_size_per_layer_input "
            "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size "
            "pronunciation_embed_dim shape_embed_dim",
        ),
        (
            WINDOW,
            "sliding_window sliding_window_size local_attention window_size attention_window_size "
            "attention_chunk_size keep_window_size rel_extent local_attention_window_len mem_len",
        ),
        (WINDOW, "floor_scale log_scaling_n_floor"),  # lengths from which on logits are scaled
        (4, "index_topk index_block_size block_size mamba_chunk_size chunk_size lsh_attn_chunk_length indexer_budget"),
    )
    for name in names.split()
}
# and at most
_COUNTS: Mapping[str, int] = {
    name: most
    for most, names in (
        (8, "mamba_num_heads"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads"),
        (
            2,
            "num_experts_per_tok num_experts_per_token moe_topk moe_k topk_group n_group num_expert_group "
            "n_shared_experts num_shared_experts moe_num_shared_experts zero_expert_num index_n_heads "
            "index_topk_blocks linear_num_key_heads linear_num_value_heads num_random_blocks o_groups n_groups",
        ),
        (1, "first_k_dense_replace num_dense_layers max_window_layers"),
    )
    for name in names.split()
}
# no lengths, whatever their value
_NOT_LENGTHS = _names(
    "query_pre_attn_scalar chunk_size_feed_forward pretraining_tp type_vocab_size task_type_vocab_size seed "
    "dim_model_base scale_emb mm_tokens_per_image image_seq_length image_size intermediate_multiple_size "
    "block_multiple_of moe_layer_end_index max_length min_length num_beams num_mel_bins classifier_proj_size "
    "mask_time_length mask_feature_length mamba_n_heads mamba_d_head mamba_d_ssm num_kv_shared_layers"
)
# what cannot come between a prefix and its rows: names, ids, training, what a class sets itself, and what is done to
# each token by itself
_IRRELEVANT = _names(
    "architectures transformers_version _name_or_path name_or_path dtype torch_dtype id2label label2id problem_type "
    "return_dict output_attentions output_hidden_states output_router_logits use_cache tie_word_embeddings auto_map "
    "suppress_tokens begin_suppress_tokens is_encoder_decoder "
    "quantization_config task_specific_params finetuning_task tokenizer_class pretraining_tp chunk_size_feed_forward "
    "hidden_act hidden_activation activation_function activation initializer_range init_std router_aux_loss_coef "
    "initializer_factor layer_norm_eps layer_norm_epsilon rms_norm_eps norm_eps vocab_size gradient_checkpointing"
)
_CHANCE = ("dropout", "_pdrop", "layerdrop", "drop_rate", "jitter")  # must not come between two runs


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same class and with the same switches, but tiny, for eager attention. `config` is not
    changed.

    Raises:
        Exception: whatever the class says of a configuration that it does not take.
    """
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    tiny = type(config).from_dict(_shrunk(fields, config))
    for module in (tiny, *(getattr(tiny, name) for name in tiny.sub_configs)):
        if module is not None:
            module._experts_implementation = "eager"  # others have no fp64
    tiny._attn_implementation = "eager"
    return tiny


def make_tiny(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random fp64 model of a configuration from `shrink`, on the CPU, frozen, in eval mode.

    The process's random numbers go on as if it had not been made.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
        model = model_class(config)
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval().requires_grad_(False)


def kind_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What matters of a configuration, as JSON values: its tiny form without names, ids and other irrelevant fields,
    nor fields that its class does not declare and its modeling file does not name, and of floats only whether they are
    0, 1 or something else.

    Raises: as `shrink`.
    """
    fields = {name: value for name, value in shrink(config).to_dict().items() if _is_read(config, name)}
    return dict(_kind(fields))


def _is_read(config: PreTrainedConfig, name: str) -> bool:
    """Whether a field is one that the class of a configuration declares, or that its modeling file may read."""
    if name in ("model_type", "per_layer_config") or any(field.name == name for field in dataclasses.fields(config)):
        return True
    modeling = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    words = None if modeling is None else _words(modeling)
    return words is None or name in words


@cache
def _words(module: ModuleType) -> frozenset[str] | None:
    """The words of a module's source, None if it has none."""
    try:
        return frozenset(re.findall(r"\w+", inspect.getsource(module)))
    except OSError:
        return None


def unknown_lengths(config: PreTrainedConfig) -> dict[str, int]:
    """Integer fields that no table here knows, larger than a window of the tiny model: they may be lengths from which
    on the model computes something else."""
    known = {*_WIDTHS, *_HEADS, *_KV_HEADS, *_HEAD_DIMS, *_LAYERS, *_SIZES, *_COUNTS, *_NOT_LENGTHS}
    sizes = {name: value for name, value in vars(config).items() if _is_size(name, value) and value > WINDOW}
    return {
        name: value
        for name, value in sizes.items()
        if name not in known and "vocab" not in name and _is_read(config, name)
    }


def _is_size(name: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not name.endswith(("_id", "_index"))


def _shrunk(fields: Mapping[str, Any], config: Any, whole: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`fields` of a configuration with tiny sizes. whole: the configuration's fields, if `fields` are a layer's."""
    whole = fields if whole is None else whole
    new = dict(fields)
    heads, width = _first(whole, _HEADS), _first(whole, _WIDTHS)
    own_heads = _first(fields, _HEADS) or heads
    head_dim = _first(whole, _HEAD_DIMS) or (width // heads if width and heads else None)
    for name, value in fields.items():
        if isinstance(value, float) and any(word in name for word in _CHANCE):
            new[name] = 0.0
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            new[name] = _shrunk_rope(value, head_dim)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            new[name] = {layer: _shrunk(entry, None, whole) for layer, entry in value.items()}
        elif isinstance(value, Mapping) and isinstance(getattr(config, name, None), PreTrainedConfig):
            new[name] = _shrunk(value, getattr(config, name))
        elif name in _SIZES and isinstance(value, (list, tuple)):  # of each layer
            new[name] = [_SIZES[name] * (1 + (x > min(value))) for x in value]
        elif not _is_size(name, value) or value == 0:
            continue
        elif name in _WIDTHS:
            new[name] = WIDTH if not (heads and head_dim) or heads * head_dim == width else NARROW
        elif name in _HEADS:
            new[name] = HEADS if value == whole[name] else 2 * HEADS
        elif name in _KV_HEADS:
            all_heads = HEADS if own_heads == heads else 2 * HEADS
            new[name] = all_heads if value == own_heads else 1 if value == 1 else 2
        elif name in _HEAD_DIMS:
            new[name] = HEAD_DIM if value == whole[name] else 2 * HEAD_DIM
        elif name in _SIZES:
            new[name] = _SIZES[name]
        elif name in _COUNTS:
            new[name] = min(value, _COUNTS[name])
        elif "vocab" in name:
            new[name] = VOCABULARY
    if "attention_value_scale" in fields:  # MiMo's windowed layers have twice as many KV heads
        new["num_key_value_heads"] = 1
    if "qk_rope_head_dim" in fields and "head_dim" in fields:  # the rotary embedding's, or the whole head's
        whole_head = fields["head_dim"] != fields["qk_rope_head_dim"]
        new["head_dim"] = new["qk_rope_head_dim"] + (new["qk_nope_head_dim"] if whole_head else 0)
    if "qk_head_dim" in fields and "qk_nope_head_dim" in fields:
        new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
    if {"attention_hidden_size", "attention_head_dim"} <= fields.keys():  # of the input beside that of the first layer
        new |= {"hidden_size": WIDTH, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS}
        if "mamba_headdim" in fields:
            new["mamba_headdim"] = WIDTH * fields["mamba_expand"] // fields["n_mamba_heads"]
    if {"mamba_n_heads", "mamba_d_head", "mamba_expand"} <= fields.keys():
        inner = new["hidden_size"] * fields["mamba_expand"]
        new |= {"mamba_d_head": HEAD_DIM, "mamba_n_heads": inner // HEAD_DIM}
        new |= {"mamba_d_ssm": inner} if fields.get("mamba_d_ssm") else {}
    if {"expand", "num_heads", "head_dim"} <= fields.keys():
        new["head_dim"] = new["hidden_size"] * fields["expand"] // HEADS
    if fields is whole:
        _cut_layers(new, fields, config)
        new.update({name: value for name, value in _TOKENS.items() if name in fields})
    return new


_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _first(fields: Mapping[str, Any], names: Any) -> int | None:
    return next((fields[name] for name in names if _is_size(name, fields.get(name)) and fields[name]), None)


def _cut_layers(new: dict[str, Any], fields: Mapping[str, Any], config: Any) -> None:
    """Fewer layers: the first of every kind, as what is said per layer tells them apart, and some more."""
    sharing = getattr(config, "kv_sharing_modes", None)
    for name in _LAYERS:
        count = fields.get(name)
        if not _is_size(name, count) or count < 1:
            continue
        lists = {key: x for key, x in fields.items() if isinstance(x, (list, tuple))}
        chosen_by_index = {key: x for key, x in lists.items() if key in _LAYER_INDICES}
        per_layer = {key: x for key, x in lists.items() if len(x) == count and key not in chosen_by_index}
        apart = {int(layer): entry for layer, entry in (fields.get("per_layer_config") or {}).items()}
        kinds = [
            str([[x[i] for x in per_layer.values()], [i in x for x in chosen_by_index.values()], apart.get(i)])
            + (str(sharing[i]) if sharing else "")
            for i in range(count)
        ]
        chosen = {kinds.index(kind) for kind in kinds}
        rest = [i for i in range(count) if i not in chosen]
        layers = sorted([*chosen, *rest[: max(0, LAYERS - len(chosen))]])
        new[name] = len(layers)
        if sharing and "num_kv_shared_layers" in fields:  # always the last ones
            new["num_kv_shared_layers"] = sum(sharing[i] == "reuse" for i in layers)
        new |= {key: [new[key][i] for i in layers] for key in per_layer}
        new |= {key: [at for at, i in enumerate(layers) if i in x] for key, x in chosen_by_index.items()}
        if apart:
            entries = {int(layer): entry for layer, entry in new["per_layer_config"].items()}
            new["per_layer_config"] = {f"{at:02}": entries[i] for at, i in enumerate(layers) if i in entries}


def _shrunk_rope(parameters: Mapping[str, Any], head_dim: int | None) -> dict[str, Any]:
    """Rotary settings for HEAD_DIM in place of `head_dim`: factors per dimension and sections become fewer."""
    new = dict(parameters)
    by_length = {"longrope", "dynamic"} & {parameters.get("rope_type"), parameters.get("type")}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            new[name] = _shrunk_rope(value, head_dim)
        elif name == "original_max_position_embeddings" and value:
            new[name] = POSITIONS // 2 if by_length else WINDOW  # a prefix must not pass where keys turn differently
        elif isinstance(value, (list, tuple)) and value and head_dim:
            if name == "mrope_section":
                new[name] = _parts(value, sum(value) * HEAD_DIM // head_dim)
            else:
                count = max(1, len(value) * HEAD_DIM // head_dim)
                new[name] = [value[i * len(value) // count] for i in range(count)]
    return new


def _parts(sections: Any, total: int) -> list[int]:
    """Sections in about the same proportions that add up to `total`."""
    scaled = [max(1, section * total // sum(sections)) for section in sections]
    return [total - sum(scaled[1:]), *scaled[1:]]


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _kind(x) for name, x in sorted(value.items(), key=str) if _matters(str(name))}
    if isinstance(value, (list, tuple)):
        return [_kind(x) for x in value]
    if isinstance(value, float):
        return value if value in (0.0, 1.0) else "negative" if value < 0 else "positive"
    return value if isinstance(value, (bool, int, str)) or value is None else str(value)


def _matters(name: str) -> bool:
    chance = any(word in name for word in _CHANCE)
    return not (chance or name in _IRRELEVANT or name.endswith(("_token_id", "_token_index", "_token_ids")))
