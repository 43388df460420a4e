"""Classes that compute attention themselves instead of calling transformers' attention functions.

OWN says for each how its core, softmax(Q K^T) V, is reached: most have a method `_attn` of their attention for it, of
the others the whole forward is written here. While a prefix is attached, each attention module of the model has that
function as an attribute of its own (no class changes). Layers get the state of the forward pass in place of a mask,
which all of these classes pass on to their attention.

ALiBi: classes add `slope * key position` and the op `-slope * distance`. They differ by a constant per query, which
does not change the softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ctkernels.tuning.hf.attention import ATTACHED, STATE, attend, is_layout
from ctkernels.tuning.hf.forward_state import ForwardState

if TYPE_CHECKING:
    from ctkernels.tuning.hf.traces import Traces

CurrentState = Callable[[], ForwardState | None]
Core = Callable[..., tuple[Tensor, None]]  # (q [B, H, S, D], k and v [B, Hk, T, D], mask) -> out [B, S, H, D]


@dataclass(frozen=True)
class Own:
    """How the core of a class's attention is reached.

    forward: in place of the attention's: takes the core first; None where `_attn` is the core.  slopes: ALiBi slopes
    `[H]`, from the decoder.  bias: the decoder's method that would compute a position bias from a mask.  scale, window:
    of one attention, where they are not the op's defaults.  kv_heads: of one attention.
    """

    forward: Callable[..., tuple[Tensor, None]] | None = None
    slopes: Callable[[nn.Module], Tensor] | None = None
    bias: str | None = None
    scale: Callable[[nn.Module], float] | None = None
    window: Callable[[nn.Module], int | None] | None = None
    kv_heads: Callable[[nn.Module], int] | None = None


def serve_own(
    base: nn.Module, attentions: Sequence[nn.Module], own: Own, traces: Traces, current_state: CurrentState
) -> None:
    """Make the attention modules of a decoder, whose owner is `base`, read the prefix until `traces` are undone.

    current_state: the state of the forward pass that runs in this thread.

    Raises:
        ValueError: the forward of an attention module is already replaced, for instance by offloading.
    """
    slopes = None if own.slopes is None else own.slopes(base).float()
    for attention in attentions:
        settings = {
            "scale": None if own.scale is None else own.scale(attention),
            "window": None if own.window is None else own.window(attention),
        }
        core = partial(_core, attention, current_state, settings, slopes)
        if own.forward is None:
            traces.set(attention, "_attn", partial(_in_place_of_attn, core))
            continue
        if "forward" in vars(attention):
            raise ValueError(
                f"the forward of a {type(attention).__name__} has been replaced, so it cannot be attached to"
            )
        traces.set(attention, "forward", partial(own.forward, core, attention))
    if own.bias is not None:
        traces.set(base, own.bias, lambda *args, **kwargs: None)


def carrier(state: ForwardState, device: torch.device) -> Tensor:
    """What layers get in place of a mask: it holds the state. transformers passes on any mask with four dimensions; a
    bool one stays the same object where a class converts masks."""
    mask = torch.empty(1, 1, 1, 0, dtype=torch.bool, device=device)
    setattr(mask, STATE, state)
    return mask


def _core(
    module: nn.Module,
    current_state: CurrentState,
    settings: dict[str, Any],
    slopes: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, None]:
    """Attention of a layer: q `[B, H, S, D]`, k and v `[B, Hk, T, D]` -> (`[B, S, H, D]`, None)."""
    name = type(module).__name__
    state = getattr(mask, STATE, None) or current_state()  # the mask loses it on its way to another device
    if state is None:
        raise ValueError(f"{name}: a layer with an attached prefix was called outside of its model's forward")
    if state.layout is not None and not is_layout(state.layout):
        raise ValueError(
            f"{name}: an attached model takes a 2D padding mask whose rows are one run of ones, got another mask"
        )
    dropout = _dropout(module)
    if module.training and dropout > 0:
        raise ValueError(
            f"{name}: attention dropout {dropout} is not supported; put the model in eval mode: model.eval()"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # some classes turn them in fp32
    alibi = {} if slopes is None else {"alibi_slopes": slopes.to(query.device)}
    return attend(state, getattr(module, ATTACHED), query, key, value, state.layout, **settings, **alibi), None


def _in_place_of_attn(
    core: Core, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """A class's `_attn`, whose result is `[B, H, S, D]`."""
    out, weights = core(query, key, value, attention_mask)
    return out.transpose(1, 2), weights


def _dropout(attention: nn.Module) -> float:
    """Probability with which attention weights are dropped in training."""
    for name in ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout"):
        if hasattr(attention, name):
            dropout = getattr(attention, name)
            return float(getattr(dropout, "p", dropout))
    return 0.0


def _with_cache(
    core: Core,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Cache | None,
    mask: Tensor | None,
) -> tuple[Tensor, None]:
    """Attention of q `[B, H, S, D]` to k and v `[B, Hk, S, D]` and those in the cache -> (`[B, S, H * D]`, None)."""
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    out, weights = core(query, key, value, mask)
    return out.flatten(2), weights


def _bloom(
    core: Core,
    module: nn.Module,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """BloomAttention.forward: hidden_states, residual and the result are `[B, S, H * D]`."""
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    heads = (x.transpose(1, 2) for x in fused.unbind(3))
    out, weights = _with_cache(core, module, *heads, layer_past, attention_mask)
    out = module.dense(out)
    return residual + nn.functional.dropout(out, module.hidden_dropout, module.training), weights


def _mpt(
    core: Core,
    module: nn.Module,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MptAttention.forward: hidden_states and the result are `[B, S, H * D]`."""
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    heads = (x.transpose(1, 2) for x in fused.unflatten(-1, (3, module.n_heads, module.head_dim)).unbind(2))
    out, weights = _with_cache(core, module, *heads, past_key_values, attention_mask)
    return module.out_proj(out), weights


def _falcon(
    core: Core,
    module: nn.Module,
    hidden_states: Tensor,
    alibi: None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """FalconAttention.forward without ALiBi: hidden_states and the result are `[B, S, H * D]`."""
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query, key = turn(query, key, *position_embeddings)
    out, weights = _with_cache(core, module, query, key, value, layer_past, attention_mask)
    return module.dense(out), weights


def _xglm(
    core: Core,
    module: nn.Module,
    hidden_states: Tensor,
    key_value_states: None = None,
    past_key_values: Cache | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """XGLMAttention.forward of a decoder alone: hidden_states and the result are `[B, S, H * D]`."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    heads = (f(hidden_states).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for f in projections)
    out, weights = _with_cache(core, module, *heads, past_key_values, attention_mask)
    return module.out_proj(out), weights


def _bloom_slopes(base: nn.Module) -> Tensor:
    return base.build_alibi_tensor(torch.ones(1, 2), base.num_heads, torch.float32)[:, 0, 1]


def _mpt_slopes(base: nn.Module) -> Tensor:
    return -base.build_mpt_alibi_tensor(base.num_heads, 2)[:, 0, 0]


def _mpt_scale(attention: Any) -> float:
    return float(attention.softmax_scale)


def _gpt_neo_scale(attention: Any) -> float:
    return 1.0


def _gpt_neo_window(attention: Any) -> int | None:
    return int(attention.config.window_size) if attention.attention_type == "local" else None


def _falcon_kv_heads(attention: Any) -> int:
    return int(attention.num_heads if attention.new_decoder_architecture else attention.num_kv_heads)


_MODELS = "transformers.models"
OWN: dict[str, Own] = {
    f"{_MODELS}.bloom.modeling_bloom.BloomAttention": Own(_bloom, _bloom_slopes, bias="build_alibi_tensor"),
    f"{_MODELS}.mpt.modeling_mpt.MptAttention": Own(_mpt, _mpt_slopes, bias="build_mpt_alibi_tensor", scale=_mpt_scale),
    f"{_MODELS}.falcon.modeling_falcon.FalconAttention": Own(_falcon, kv_heads=_falcon_kv_heads),
    f"{_MODELS}.xglm.modeling_xglm.XGLMAttention": Own(_xglm),
    f"{_MODELS}.gptj.modeling_gptj.GPTJAttention": Own(),
    f"{_MODELS}.codegen.modeling_codegen.CodeGenAttention": Own(),
    f"{_MODELS}.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": Own(scale=_gpt_neo_scale, window=_gpt_neo_window),
    f"{_MODELS}.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": Own(),
}
