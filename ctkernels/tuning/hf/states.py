"""Layers that keep a state in place of keys and values: convolutions, state spaces, linear attention.

    context -> state of each such layer behind it -> where every row begins

The module that keeps a state, its keeper, reads it from a cache and writes it there. While a prefix is attached, each
keeper of the model has a forward of its own (no class changes): the first tokens of rows run with a small cache that
holds the prefix's state, whatever cache the model has, and what comes of it is written there; later tokens go on from
the model's cache.

A state goes on with every token, padding and neighbours too. So rows that are padded or packed are taken apart first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from ctkernels.tuning.hf.attention import STATE
from ctkernels.tuning.hf.discover import CACHE_ARGUMENTS
from ctkernels.tuning.hf.forward_state import ForwardState
from ctkernels.tuning.hf.packed import TOLD_BY

if TYPE_CHECKING:
    from ctkernels.tuning.hf.models import Decoder
    from ctkernels.tuning.hf.traces import Traces

States = dict[str, Tensor]  # by name, see `state_name`
CONV, RECURRENT = "conv", "recurrent"
Rows = list[tuple[int, int, int]]  # sequence in the batch, first token and end
MASK_ARGUMENTS = {"attention_mask", "conv_mask"}
PACKED_ARGUMENTS = (*TOLD_BY, "max_length_q", "max_length_k")


def state_name(kind: str, layer: int, index: int) -> str:
    """What a state is called: its kind, the layer's index in a cache, and its index there."""
    return f"{kind}_{layer}_{index}"


def cache_for(decoder: Decoder) -> Cache:
    """An empty cache whose layers keep all positions, and states where the model has them.

    Without a config every layer of a cache keeps keys and values; with one, windowed layers would drop early ones.
    """
    if not decoder.keepers:
        return DynamicCache()
    cache = DynamicCache(config=decoder.config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
            cache.layers[index] = LinearAttentionAndFullAttentionLayer(layer.number_of_states)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[index] = DynamicLayer()
    return cache


def states_of(cache: Cache) -> States:
    """The states `[B, ...]` in a cache, as they are there."""
    found: States = {}
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for kind, tensors in ((CONV, layer.conv_states), (RECURRENT, layer.recurrent_states)):
                found |= {state_name(kind, at, i): x for i, x in tensors.items() if x is not None}
    return found


def copies(states: Mapping[str, Tensor]) -> States:
    """The states of a prefix without their history."""
    return {name: x.detach().clone() for name, x in states.items()}


def serve_states(decoder: Decoder, traces: Traces, current_state: Callable[[], ForwardState | None]) -> None:
    """Make the keepers of `decoder` begin with the prefix's states until `traces` are undone.

    current_state: the state of the forward pass that runs in this thread.

    Raises:
        ValueError: the forward of a keeper is already replaced, for instance by offloading.
    """
    for index, keeper in enumerate(decoder.keepers):
        if "forward" in vars(keeper):
            raise ValueError(f"the forward of a {type(keeper).__name__} has been replaced, so it cannot be attached to")
        arguments = list(inspect.signature(keeper.forward).parameters)[1:]
        traces.set(keeper, "forward", partial(_forward, keeper.forward, index, keeper, arguments, current_state))


def _forward(
    original: Callable[..., Tensor],
    index: int,
    keeper: nn.Module,
    arguments: list[str],
    current_state: Callable[[], ForwardState | None],
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A keeper's forward: hidden_states `[B, S, E]` -> one result `[B, S, ...]` or several."""
    kwargs |= dict(zip(arguments, args, strict=False))
    cache_name = next(name for name in CACHE_ARGUMENTS if name in arguments)
    state = kwargs.pop(STATE, None) or current_state()
    name = type(keeper).__name__
    if state is None:
        raise ValueError(f"{name}: a layer with an attached prefix was called outside of its model's forward")
    state.kept.add(index)
    kwargs = {key: x for key, x in kwargs.items() if key not in PACKED_ARGUMENTS}
    kwargs |= dict.fromkeys(MASK_ARGUMENTS & set(arguments))
    if state.past:  # no row has padding inside
        return original(hidden_states, **kwargs)
    run = partial(original, **{key: x for key, x in kwargs.items() if key != cache_name})
    begin = partial(_states_of_rows, state, int(keeper.layer_idx), hidden_states)
    cache, rows = kwargs.get(cache_name), state.rows
    if rows is None and cache is None and hidden_states.shape[1] == 1:
        rows = [(row, 0, 1) for row in range(len(hidden_states))]
    if rows is None:
        whole = StartCache(begin(torch.arange(len(hidden_states))))
        out = run(hidden_states, **{cache_name: whole})
    else:
        whole = StartCache(begin(torch.arange(len(rows))))
        out = _apart(run, begin, cache_name, cache is not None, whole, hidden_states, rows)
    if cache is not None:
        whole.write(cache, int(keeper.layer_idx))
    return tree_map(lambda x: x.to(hidden_states.dtype), out)


def _apart(
    run: Callable[..., Any],
    begin: Callable[[Tensor], States],
    cache_name: str,
    cached: bool,
    whole: StartCache,
    hidden_states: Tensor,
    rows: Rows,
) -> Any:
    """A keeper's results `[B, S, ...]`, zeros where no row is, with each row by itself; `whole` gets their states."""
    parts, places = [], []
    for group in _groups(rows, apart=cached):
        bounds = torch.tensor([rows[row] for row in group], device=hidden_states.device)[..., None]
        line, first, end = bounds.unbind(1)  # [n, 1]
        steps = int((end - first).max())
        # a single token would change the state in place, which has no derivative
        at = first + torch.arange(steps if cached else max(steps, 2), device=hidden_states.device)  # [n, steps]
        valid, at = at < end, at.minimum(end - 1)
        start = StartCache(begin(torch.tensor(group)))
        result = run(hidden_states[line, at], **{cache_name: start})
        parts.append(tree_map(lambda x, valid=valid: x[valid], result))
        places.append(torch.stack((line.expand_as(at)[valid], at[valid])))
        whole.take(start, group)
    place = tuple(torch.cat(places, dim=1))

    def joined(*tokens: Tensor) -> Tensor:
        found = torch.cat(tokens)
        return found.new_zeros(*hidden_states.shape[:2], *found.shape[1:]).index_put(place, found)

    return tree_map(joined, *parts)


def _groups(rows: Rows, apart: bool) -> list[list[int]]:
    """Rows that run at once: all of them, padded behind, which changes nothing before; or, if states are wanted, rows
    of one length each."""
    lengths = [end - start for _, start, end in rows]
    present = [row for row, length in enumerate(lengths) if length]
    if not apart:
        return [present]
    return [[row for row in present if lengths[row] == length] for length in sorted({*lengths} - {0})]


def _states_of_rows(state: ForwardState, layer: int, hidden: Tensor, rows: Tensor) -> States:
    """What `rows`, int `[n]`, begin with in a layer: `[n, ...]` each, by kind and index."""
    found: States = {}
    for name, x in state.states.items():
        kind, at, index = name.split("_")
        if int(at) == layer:
            x = x.to(hidden.device)
            dtype = hidden.dtype if kind == CONV else x.dtype  # which joins the tokens; the other is computed in fp32
            if state.prefix_index is None:
                x = x.expand(len(rows), *x.shape)
            else:
                x = x[state.prefix_index[rows.to(state.prefix_index.device)].to(x.device)]
            found[f"{kind}_{index}"] = x.to(dtype, copy=True)
    return found


class StartCache:
    """What a keeper asks of a cache, for its layer alone, with states that a gradient may go through."""

    def __init__(self, states: States) -> None:
        self.states, self._wide = states, {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(f"{CONV}_{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(f"{RECURRENT}_{state_idx}")

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        """A cache that does is not changed in place."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        before = self.states[f"{CONV}_{state_idx}"]
        whole = torch.cat((before, conv_states), dim=-1)
        self.states[f"{CONV}_{state_idx}"] = whole[..., -before.shape[-1] :]
        return whole

    def update_recurrent_state(self, states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.states[f"{RECURRENT}_{state_idx}"] = states
        return states

    def take(self, other: StartCache, rows: list[int]) -> None:
        """Let `rows` have the states of `other`."""
        for name, x in other.states.items():
            at = torch.tensor(rows, device=x.device)
            self.states[name] = self.states[name].to(x.dtype).index_copy(0, at, x)

    def write(self, cache: Cache, layer: int) -> None:
        """Put the states into a layer of the model's cache."""
        for name, x in self.states.items():
            kind, index = name.split("_")
            update = cache.update_conv_state if kind == CONV else cache.update_recurrent_state
            update(x, layer, state_idx=int(index))


def rows_of(mask: Any, cu_seqlens: Tensor | None, length: int) -> Rows | None:
    """Each row's sequence in a batch of `length` tokens, its first token and end; None if rows fill the batch.

    mask: the model's own argument; padding is 2D, also where masks were made in advance, by the kind of layers.
    """
    if cu_seqlens is not None:
        return [(0, start, end) for start, end in pairwise(cu_seqlens.tolist())]
    masks = mask.values() if isinstance(mask, dict) else (mask,)
    padding = next((x[:, :length].bool() for x in masks if isinstance(x, Tensor) and x.dim() == 2), None)
    if padding is None or bool(padding.all()):
        return None
    first, count = (padding.cumsum(dim=1) == 0).sum(dim=1).tolist(), padding.sum(dim=1).tolist()
    return [(row, start, start + n) for row, (start, n) in enumerate(zip(first, count, strict=True))]


def check_states(states: Mapping[str, Tensor], decoder: Decoder) -> None:
    """Check that a prefix has the states that a model's layers begin with.

    Raises:
        ValueError: it has none, or some for a model without; the message names the classes.
    """
    name = type(decoder.model).__name__
    kinds = ", ".join(dict.fromkeys(type(keeper).__name__ for keeper in decoder.keepers))
    if states and not decoder.keepers:
        raise ValueError(f"prefix holds states ({', '.join(states)}), {name} has no layers that keep one")
    held = {int(state.split("_")[1]) for state in states}
    lacking = sorted({int(keeper.layer_idx) for keeper in decoder.keepers} - held)
    if lacking:
        raise ValueError(
            f"prefix holds no state for layers {lacking} of {name} ({kinds}), so rows would not begin behind it"
        )
