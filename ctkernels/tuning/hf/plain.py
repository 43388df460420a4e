"""`attn_implementation="ctkernels"` on a model without a prefix: the op where it computes exactly what a call asks for,
transformers' own attention everywhere else.

    model's forward -> drop_in_mask (once per forward and layer type): causal, with or without a window and padding: a
                       `LazyMask`; every other rule: transformers' mask
                    -> drop_in_attention (every layer): the op, or the stock function of this very call (stock.py)

Classes that transformers refuses SDPA for, and those that do something else under a name they do not know, are handed
back to transformers as a whole, by their configuration. On a CPU, calls that are too small for the op's set-up to pay
go to SDPA, too; on other devices, where nobody has measured yet, all that SDPA can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing

from ctkernels import ContextMask, prefix_attention
from ctkernels.attention import MAX_HEAD_DIM, ROW_DTYPES
from ctkernels.tuning.hf.lazy_mask import LazyMask, Rule
from ctkernels.tuning.hf.stock import Stock, decides_by_name, stock_function, stock_of, warn_once

IMPLEMENTATION = "ctkernels"

# On a CPU the op is faster than SDPA from so many pairs of a query and a key on, over all rows and heads; FEW_KEYS:
# with one query per row, keys times query heads per KV head. benchmarks/bench_dropin.py shows both sides of the limits.
SMALL = {torch.float32: 2**17, torch.float64: 2**17, torch.bfloat16: 2**12, torch.float16: 2**12}
FEW_KEYS = 2**13

# Arguments of an attention call that the op knows, and those that change nothing under SDPA: facts for other
# implementations, or for the layers around. Any other one that is given sends the call to transformers.
KNOWN = frozenset({"dropout", "scaling", "sliding_window", "softcap", "is_causal"})
WITHOUT_EFFECT = frozenset(
    (
        *("position_ids", "cache_position", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"),
        *("max_length_q", "max_length_k"),
        *("num_items_in_batch", "use_cache", "output_hidden_states", "output_router_logits", "return_dict"),
        "logits_to_keep",
    )
)


def unknown_argument(arguments: dict[str, Any]) -> str | None:
    """The name of an argument of an attention call whose meaning is not known, or None. One that is None or False is
    not given."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in KNOWN and name not in WITHOUT_EFFECT:
            return name
    return None


def drop_in_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What the layers of a model get for a mask. Called by transformers; the arguments are those of its mask functions.

    attention_mask: bool `[B, L]`, True = token. Returns None exactly where SDPA's mask function may, a `LazyMask` for
    the rules that the op knows, and transformers' own mask for the others.
    """
    stock = Stock("sdpa") if config is None else stock_of(type(config))
    build = partial(
        ALL_MASK_ATTENTION_FUNCTIONS[stock.name],
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        device=device,
        config=config,
        **kwargs,
    )
    if stock.why is not None:
        hand_back(config, stock)
        return build()
    device = torch.device(device)
    if (stock.name == "sdpa" and device.type != "cpu") or isinstance(q_offset, Tensor) or is_tracing(attention_mask):
        return build()  # a static cache's offset is a tensor; the masks of its steps are inputs of compiled code
    known, window = causal_rule(mask_function)
    aligned = q_offset + q_length == kv_offset + kv_length  # the queries are the last keys
    fits = attention_mask is None or (attention_mask.dim() == 2 and len(attention_mask) == batch_size)
    if not (known and aligned and fits) or kwargs.get("use_vmap"):
        return build()
    window = None if window is None or kv_length <= window else window
    padding = None
    if attention_mask is not None:
        valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        padding = padding_of(nn.functional.pad(valid, (0, kv_length - valid.shape[1])))
    skip = stock.name == "sdpa" and allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
    if skip and padding is None and window is None:
        return build()
    dtype = torch.bool if stock.name == "sdpa" else kwargs.get("dtype", torch.float32)
    return LazyMask(Rule(q_length, kv_length, padding, window, build), batch_size, dtype, device)


_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__


def causal_rule(mask_function: Callable) -> tuple[bool, int | None]:
    """Whether one of transformers' mask functions is the causal rule, and its sliding window or None.

    Told by the code of the functions that they are made of, not by trying them: no rule is taken for another one.
    """
    if mask_function is causal_mask_function:
        return True, None
    if getattr(mask_function, "__code__", None) is not _AND:
        return False, None
    parts = inside(mask_function)["mask_functions"]
    if len(parts) != 2 or parts[1] is not causal_mask_function or getattr(parts[0], "__code__", None) is not _WINDOW:
        return False, None
    return True, inside(parts[0])["sliding_window"]


def inside(function: Callable) -> dict[str, Any]:
    """The variables that a function has taken from around it, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def padding_of(valid: Tensor) -> ContextMask | None:
    """Padding in valid, bool `[B, T]`, True = token, as the op takes it: one hidden span for each row, where it is one
    run of keys in each (what is hidden from all queries of a tile is skipped), else the pattern."""
    B, T = valid.shape
    position = torch.arange(T, device=valid.device)
    end = ((position + 1) * ~valid).amax(dim=1) if T else position.new_zeros(B)
    first = end - (~valid).sum(dim=1)
    one_run = (valid != ((first[:, None] <= position) & (position < end[:, None]))).all()
    complete, spans = torch.stack((valid.all(), one_run)).tolist()  # one transfer from the device for both
    if complete:
        return None
    return (
        ContextMask(hidden=torch.stack((first, end), dim=-1), length=T) if spans else ContextMask(keep=valid, length=T)
    )


def hand_back(config: PreTrainedConfig, stock: Stock) -> None:
    """Let models of `config` run under the name that transformers would have chosen, from now on."""
    warn_once(type(config).__name__.removesuffix("Config"), stock.name, stock.why)
    config._attn_implementation_internal = stock.name  # past the setter, which would change configurations inside, too


def drop_in_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers calls it: query `[B, H, S, D]`, key and value `[B, Hk, T, D]`.

    Returns (`[B, S, H, D]`, weights or None), of the op or of the function that transformers would have called.

    Raises:
        ValueError: a class that does something else under a name it does not know got its mask ready-made, so that it
            was not handed back to transformers in time; or no eager attention was found where it is needed.
    """
    config = getattr(module, "config", None)
    stock = Stock("sdpa") if config is None else stock_of(type(config))
    rule = attention_mask.rule if isinstance(attention_mask, LazyMask) else None
    softcap = arguments.get("softcap") or None
    if stock.why is None and (softcap is not None or not is_small(query, key)):
        why = why_not(module, query, key, value, attention_mask, arguments)
        if why is None:
            return _op(query, key, value, rule, scale=arguments.get("scaling"), softcap=softcap), None
        warn_once(type(module).__name__, stock.name, why)
    if stock.why is not None:
        argument = unknown_argument(arguments)
        if argument is not None and decides_by_name(type(module)):
            raise ValueError(
                f"{type(module).__name__} passes {argument} to attention functions other than its own; call "
                f'model.set_attn_implementation("{stock.name}")'
            )
        hand_back(config, stock)
    mask = attention_mask if rule is None else rule.stock
    return stock_function(module, stock.name)(module, query, key, value, mask, **arguments)


def why_not(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, arguments: dict[str, Any]
) -> str | None:
    """Why the op does not compute a call, or None if it does."""
    argument = unknown_argument(arguments)
    if argument is not None:
        return f"argument {argument}"
    if arguments.get("dropout"):
        return "attention dropout"
    causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "attention that is not causal"
    S, T = query.shape[2], key.shape[2]
    if isinstance(mask, LazyMask):
        if mask.rule.shown or mask.shape != (query.shape[0], 1, S, T):
            return "a mask that the model works on"
    elif mask is not None or 1 < S < T:
        return "a mask of its own"
    groups = getattr(module, "num_key_value_groups", 1)
    return None if takes_shapes(query, key, value, groups) else "head dimensions, heads or types that it does not take"


def takes_shapes(query: Tensor, key: Tensor, value: Tensor, groups: int) -> bool:
    """Whether the op takes query `[B, H, S, D]`, key `[B, Hk, T, D]` and value `[B, Hk, T, Dv]`, H = Hk * groups."""
    B, H, S, D = query.shape
    return (
        key.shape[:3] == value.shape[:3]
        and key.shape[:2] == (B, H // groups)
        and H % groups == 0
        and key.shape[3] == D
        and max(D, value.shape[3]) <= MAX_HEAD_DIM
        and key.shape[2] >= S > 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in ROW_DTYPES
    )


def is_small(query: Tensor, key: Tensor) -> bool:
    """Whether SDPA is the faster one (measured on a CPU; elsewhere SDPA is taken to be, until somebody measures)."""
    if query.device.type != "cpu" or query.dim() != 4:
        return True
    B, H, S, _ = query.shape
    Hk, T = key.shape[1:3]
    if S == 1 and query.dtype in (torch.float32, torch.float64) and T * (H // Hk) < FEW_KEYS:
        return True
    return SMALL.get(query.dtype, math.inf) > B * H * S * T


def _op(query: Tensor, key: Tensor, value: Tensor, rule: Rule | None, **settings: Any) -> Tensor:
    """The op with an empty prefix. Padding is a hidden span of the row's own keys: nothing is moved."""
    none = (x.new_empty(x.shape[1], 0, x.shape[3]) for x in (key, value))
    padding, window = (None, None) if rule is None else (rule.padding, rule.window)
    return prefix_attention(query, key, value, *none, padding, window=window, **settings).transpose(1, 2)


AttentionInterface.register(IMPLEMENTATION, drop_in_attention)
AttentionMaskInterface.register(IMPLEMENTATION, drop_in_mask)
