"""Tiny random models of every supported class, and runs of the stock model to hold the attached one against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY = 61
PAD = 0
WINDOW = 6  # smaller than the contexts of the tests, so that it bites
SIZES = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

# name -> (config class, model class, settings)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**SIZES, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "scale_attn_by_inverse_layer_idx": True},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            **SIZES,
            "hidden_size": 32,
            "ffn_dim": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 16,
            "init_std": 0.3,
        },
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {**SIZES, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GROUPED, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GROUPED, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 20, "rope_parameters": GEMMA_ROPE},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GROUPED, "sliding_window": WINDOW + 1}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", GROUPED),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            **SIZES,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "rotary_pct": 0.5,
        },
    ),
}
EAGER = ("bloom", "gemma2")  # classes whose stock attention runs in plain PyTorch alone (ALiBi, softcap)


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model in eval mode with frozen weights."""
    config_name, model_name, settings = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**settings, **changes})
    config._attn_implementation = "eager" if name in EAGER else "sdpa"
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


@contextmanager
def full_precision_softmax() -> Iterator[None]:
    """Stock eager attention casts its softmax to fp32; in here it stays in fp64 for fp64 models."""
    softmax = torch.nn.functional.softmax

    def uncast(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    with mock.patch.object(torch.nn.functional, "softmax", uncast):
        yield


@contextmanager
def full_precision_norm() -> Iterator[None]:
    """The stock RMSNorm casts to fp32, where a difference in the last bit of fp64 grows to 1e-7; not in here."""

    def forward(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random token ids without the padding id."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows as one batch: input_ids and attention_mask, int64 `[B, S]`."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@torch.no_grad()
def stock_logits(model: PreTrainedModel, context: Tensor, row: Tensor) -> Tensor:
    """Logits `[len(row), V]` of a row behind the whole context, from one plain forward pass."""
    return model(torch.cat((context, row))[None]).logits[0, len(context) :]


def stock_masked_logits(
    model: PreTrainedModel, keys: list[Tensor], values: list[Tensor], visible: Tensor, rows: Tensor
) -> Tensor:
    """Logits `[B, S, V]` of the stock model on rows behind a cache that holds K/V `[Hk, P, D]` expanded to every row,
    with a 4D mask: prefix position c of row b is seen iff `visible[b, c]`."""
    B, S = rows.shape
    P = visible.shape[1]
    cache = DynamicCache()
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key.expand(B, *key.shape), value.expand(B, *value.shape), index)
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    mask = torch.cat((visible[:, None, None].expand(B, 1, S, P), causal.expand(B, 1, S, S)), dim=-1)
    positions = torch.arange(P, P + S)[None]
    return model(rows, attention_mask=mask, past_key_values=cache, position_ids=positions).logits
