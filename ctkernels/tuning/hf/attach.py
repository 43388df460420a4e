"""Attaching a prefix to a transformers model.

    KVPrefix.attach(model) -> Attachment      this file: hooks before and after each forward pass
        protocols.py                          what is needed of a prefix
        models.py                             which model classes, where their layers are
        attention.py                          the attention and mask functions that the layers call
        own.py                                classes that do not call them
        states.py                             layers that keep a state in place of keys and values
        packed.py                             rows packed into one sequence
        caches.py                             caches remember their attachment
        parallel.py                           KV heads of models that are spread over processes
        traces.py                             what an attachment leaves on a model: undone later, never copied
        untrained.py                          optimisers that leave the prefix out

An attached model runs as usual (`forward`, loss, `generate`, gradient checkpointing) on a row's own tokens. Caches and
2D padding masks cover only those. Every layer reads the prefix in place; it is never copied per row.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ctkernels import ContextMask, prepare
from ctkernels.tuning.hf.attention import (
    ATTACHED,
    ATTACHED_IMPLEMENTATION,
    HALVED,
    STATE,
    is_layout,
    no_padding,
    row_layout,
)
from ctkernels.tuning.hf.caches import ATTACHED_NOW, claim, own
from ctkernels.tuning.hf.discover import attends_in_halves, own_attention, passes_keywords
from ctkernels.tuning.hf.forward_state import ForwardState
from ctkernels.tuning.hf.kinds import is_latent
from ctkernels.tuning.hf.models import ALIBI, Decoder, find_decoder, other_architecture, rope_switch
from ctkernels.tuning.hf.numbering import number, own_table
from ctkernels.tuning.hf.own import carrier, serve_own
from ctkernels.tuning.hf.packed import INTEGERS, TOLD_BY, packed_rows
from ctkernels.tuning.hf.parallel import head_group
from ctkernels.tuning.hf.protocols import PrefixLike, PrefixSetLike, check_file
from ctkernels.tuning.hf.states import check_states, rows_of, serve_states
from ctkernels.tuning.hf.traces import Traces
from ctkernels.tuning.hf.untrained import watch


class Attachment:
    """A prefix attached to a model; made by `KVPrefix.attach` or `PrefixSet.attach`.

    `with prefix.attach(model):`, or `attachment = prefix.attach(model).enable()` and later `attachment.detach()`.
    Before that nothing is attached: a model that runs, and an attachment that was never entered, cause a warning.

    Three attributes describe the rows of the next forward pass and may be set at any time:

    mask: ContextMask over the prefix, or None.
    cu_seqlens: int32 `[B+1]` if `input_ids` is `[1, N]` with B rows packed one after another, else None.
    prefix_index: integer `[B]`, the prefix that each row reads, for a PrefixSet; else None.

    Position ids, given or computed, count a row's own tokens from 0; the prefix's `first_position` is added to them.
    Padding is a 2D `attention_mask` over own tokens, on the left or on the right. Rows that transformers packs
    (`cu_seq_lens_q`, `cu_seq_lens_k`, `seq_idx`, position ids that start over) are served as with `cu_seqlens`. A cache
    belongs to the attachment that filled it. `copy.deepcopy` of an attached model is a plain model.
    """

    def __init__(
        self,
        prefix: PrefixLike | PrefixSetLike,
        model: PreTrainedModel,
        mask: ContextMask | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
        prefix_index: Tensor | None = None,
    ) -> None:
        self.prefix, self.mask, self.cu_seqlens, self.backend = prefix, mask, cu_seqlens, backend
        self.prefix_index = prefix_index
        self._decoder = find_decoder(model)
        self._prefixes: tuple[PrefixLike, ...] = getattr(prefix, "prefixes", (prefix,))
        for each in self._prefixes:
            check_fit(each, self._decoder)  # which says more than a comparison of hashes
            if (compare_weights := getattr(each, "compare_weights", None)) is not None:
                compare_weights(model)
        self._trainable = self._prefixes if getattr(prefix, "trainable", True) else ()  # else a set is a copy
        self._last_first = max(each.first_position for each in self._prefixes)
        config = self._decoder.config
        self._name = type(self._decoder.model).__name__
        self._own = own_attention(self._decoder.attentions[0])
        self._position_limit = self._decoder.position_limit
        switches = (rope_switch(config, each.first_position) for each in self._prefixes)
        self._rope_switch = min((switch for switch in switches if switch is not None), default=None)
        self._group = head_group(self._decoder.attentions[0])
        if self._group is not None and is_latent(self._decoder.attentions[0]):
            raise ValueError(f"{self._name} has latent attention, whose prefix has no heads to spread over processes")
        if self._group is not None and self._decoder.keepers:
            raise ValueError(f"{self._name} has layers that keep a state, which is not spread over processes")
        self._parameters = list(inspect.signature(self._decoder.base.forward).parameters)
        self._table = own_table(self._decoder.base)
        self._passes_keywords = passes_keywords(type(self._decoder.layers[0]))
        self._traces: Traces | None = None
        self._thread = threading.local()
        self._owner = uuid.uuid4().hex  # what caches remember
        self._notice = self._decoder.base.register_forward_pre_hook(partial(_say_not_entered, weakref.ref(self)))

    def enable(self) -> Attachment:
        """Attach the prefix, until `detach`. Returns the attachment itself.

        Raises:
            ValueError: the model has a prefix attached already.
        """
        decoder = self._decoder
        self._notice.remove()
        if any(hasattr(attention, ATTACHED) for attention in decoder.attentions):
            raise ValueError(
                f"this {self._name} already has a prefix attached; leave that block, or unload its PrefixModel, first"
            )
        with Traces() as traces:
            for index, attention in enumerate(decoder.attentions):
                traces.set(attention, ATTACHED, index)
                if attends_in_halves(type(attention)):
                    traces.set(attention, HALVED, True)
            for _, attention, source in decoder.borrowers:
                traces.set(attention, ATTACHED, source)
            _switch_implementation(decoder, ATTACHED_IMPLEMENTATION, traces)
            if self._own is not None:
                serve_own(decoder.base, decoder.attentions, self._own, traces, self._current_state)
            if decoder.keepers:
                serve_states(decoder, traces, self._current_state)
            model, base, embedding = decoder.model, decoder.base, decoder.base.get_input_embeddings()
            traces.hook(base.register_forward_pre_hook(self._before, with_kwargs=True))
            traces.hook(base.register_forward_hook(self._after, with_kwargs=True))
            traces.hook(embedding.register_forward_hook(lambda module, args, out: self._carry_gradient(out)))
            borrowing = ((source, layer) for layer, _, source in decoder.borrowers)
            for index, layer in (*enumerate(decoder.layers), *borrowing):
                traces.hook(layer.register_forward_pre_hook(partial(self._check_recorded, index), with_kwargs=True))
            for handle in () if self._table is None else number(self._table, lambda: self._thread.positions):
                traces.hook(handle)
            if model is not base:
                traces.hook(model.register_forward_pre_hook(self._enter, with_kwargs=True))
            if hasattr(model, "generate"):
                traces.set(model, "generate", self._watched(model.generate))
            for module in dict.fromkeys((model, base)):
                traces.set(module, "__deepcopy__", partial(traces.plain_copy, self, module))
            for each in self._trainable:
                watch(each, model, partial(_is_entered, weakref.ref(self)))
            ATTACHED_NOW.add(self._owner)
            traces.callback(ATTACHED_NOW.discard, self._owner)
            self._traces = traces.pop_all()
        return self

    def detach(self) -> None:
        """Leave the model as it was. Does nothing if the prefix is not attached."""
        self._notice.remove()
        traces, self._traces = self._traces, None
        if traces is not None:
            traces.close()

    def adopt(self, cache: Cache) -> None:
        """Let a cache that another attachment filled go on under this one. Its rows must read what they read there."""
        own(cache, self._owner)

    def __enter__(self) -> Attachment:
        return self.enable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __del__(self) -> None:
        notice = getattr(self, "_notice", None)
        if notice is not None and notice.id in (notice.hooks_dict_ref() or ()) and not sys.is_finalizing():
            notice.remove()
            warnings.warn(NOT_ENTERED.format("was never entered"), stacklevel=2)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a part of this {self._name} cannot be copied or pickled while a prefix is attached; leave the attach "
            "block, or copy the whole model"
        )

    def _current_state(self) -> ForwardState | None:
        """Of the forward pass that runs in this thread, for classes of `own.py` and `states.py`."""
        return getattr(self._thread, "state", None)

    def _watched(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` that raises if the prefix was detached while it ran (in another thread)."""

        @functools.wraps(generate)
        def run(*args: Any, **kwargs: Any) -> Any:
            block = self._traces
            result = generate(*args, **kwargs)
            if self._traces is not block:
                raise ValueError(f"the attach block was left while generate() of {self._name} ran")
            return result

        return run

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Runs before the model with the head, which may keep arguments about packed rows to itself.

        Where another model calls the decoder, it may make masks and positions. It gets the rows' own positions, and if
        there is no padding a mask that is passed on as it is. (Images have positions of their own, which it knows.)
        """
        self._thread.told = {name: kwargs[name] for name in TOLD_BY if kwargs.get(name) is not None}
        if not self._decoder.wrapped:
            return None
        kwargs = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        if tokens is None:
            return None  # the model raises its own error
        for name in TOKEN_KINDS:  # processors number tokens of text, too
            if isinstance(kwargs.get(name), Tensor) and not kwargs[name].any():
                kwargs[name] = None
        others = sorted(name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in TEXT_ARGUMENTS)
        _check_mask_argument(kwargs.get("attention_mask"))
        cu_seqlens = packed_rows(self.cu_seqlens, kwargs, tokens)
        if cu_seqlens is not None and others:
            raise ValueError(f"rows packed into one sequence must be text alone, got {', '.join(others)}")
        if cu_seqlens is not None:
            kwargs["position_ids"] = self._prepare_packed(tokens, kwargs, cu_seqlens)
            self._thread.told["cu_seq_lens_q"] = cu_seqlens
        elif not others:
            kwargs["position_ids"] = self._prepare_padded(tokens, kwargs)
        return (), kwargs

    def _before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Runs before the decoder: shifts positions, and passes the state of this forward pass to the layers."""
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if isinstance(kwargs.get("logits_to_keep"), int):
            kwargs["logits_to_keep"] = 0  # some bases drop queries, and a layout tells the last ones by the keys alone
        self._check_implementation(base)
        if not torch.compiler.is_compiling():
            check_file(self.prefix)
        _check_mask_argument(kwargs.get("attention_mask"))
        tokens = kwargs.get("input_ids")
        if tokens is None and kwargs.get("inputs_embeds") is not None:
            tokens = kwargs["inputs_embeds"] = self._carry_gradient(kwargs["inputs_embeds"])
        if tokens is None:
            return (), kwargs  # the model raises its own error
        if self.mask is not None and not isinstance(self.mask, ContextMask):
            raise TypeError(f"attachment.mask must be a ContextMask or None, got {type(self.mask).__name__}")
        if (
            self._decoder.keepers
            and self.mask is not None
            and (self.mask.hidden is not None or self.mask.keep is not None)
        ):
            raise ValueError(HIDDEN_FROM_ATTENTION_ALONE.format(self._name))
        claim(kwargs.get("past_key_values"), self._owner, self._name)
        told, self._thread.told = getattr(self._thread, "told", {}), {}
        cu_seqlens = packed_rows(self.cu_seqlens, {**kwargs, **told}, tokens)
        padding = kwargs.get("attention_mask")
        if cu_seqlens is None:
            positions = self._prepare_padded(tokens, kwargs)
        else:
            positions = self._prepare_packed(tokens, kwargs, cu_seqlens)
        index = self._index_of_rows(tokens, cu_seqlens)
        first = self.prefix.first_position if index is None else self._first_positions(index, tokens, cu_seqlens)
        self._check_positions(positions, first, tokens.shape[1], kwargs)
        keys, values, mask = tuple(self.prefix.keys), tuple(self.prefix.values), self.mask
        if not torch.compiler.is_compiling():
            mask = prepare(mask, zip(keys, values, strict=True))
        state = ForwardState(
            keys,
            values,
            mask,
            cu_seqlens,
            self.backend,
            self._decoder.reaches,
            positions,
            _past_length(kwargs),
            self._group,
            torch.is_grad_enabled(),
            index,
            None if index is None else self.prefix.lengths,
        )
        kwargs[STATE] = state
        if self._decoder.keepers:
            state.states, self._thread.state = self.prefix.states, state
            state.rows = None if state.past else rows_of(padding, cu_seqlens, tokens.shape[1])
        if self._own is not None:
            state.layout = _layout(kwargs, tokens, base.config)
            kwargs["attention_mask"], self._thread.state = carrier(state, tokens.device), state
        if self._decoder.family.positions != ALIBI:
            kwargs["position_ids"] = positions + first + self._decoder.first_position_id
            if not self._passes_keywords:
                setattr(kwargs["position_ids"], STATE, state)
            if self._table is not None:
                self._thread.positions = kwargs.pop("position_ids")
        return (), kwargs

    def _index_of_rows(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        """Which prefix each row of this pass reads, int64 `[B]`, or None where there is one for all."""
        index = self.prefix_index
        if self._prefixes == (self.prefix,):
            if index is not None:
                raise ValueError("attachment.prefix_index needs several prefixes: PrefixSet(...).attach")
            return None
        count, rows = len(self._prefixes), tokens.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in INTEGERS:
            raise TypeError("attachment.prefix_index must be an int32 or int64 tensor [B]")
        if not len(index) or rows % len(index):
            raise ValueError(f"attachment.prefix_index must have an entry for each of {rows} rows, got {len(index)}")
        if not torch.compiler.is_compiling() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(f"attachment.prefix_index must lie in [0, {count}), got {index.tolist()}")
        return index.to(tokens.device, torch.int64).repeat_interleave(rows // len(index))

    def _first_positions(self, index: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Position of the first own token for each row, int64 `[B, 1]`; if rows are packed for each token, `[1, N]`."""
        first = self.prefix.first_positions.to(tokens.device)[index]
        if cu_seqlens is None:
            return first[:, None]
        return first.repeat_interleave(cu_seqlens.diff().to(tokens.device), output_size=tokens.shape[1])[None]

    def _prepare_padded(self, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Own position of each token of a batch with or without padding, int64 `[B, S]` or `[1, S]`."""
        S = tokens.shape[1]
        mask, given, cache = (kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if padding is not None:
            _check_padding(padding, tokens, kwargs)
        elif mask is None and not getattr(cache, "is_compileable", False):
            kwargs["attention_mask"] = no_padding(tokens.device)
        if given is not None:
            return given
        prepared = mask.values() if isinstance(mask, dict) else (mask,)
        if self._decoder.family.positions != ALIBI and any(is_layout(x) and x.shape[-1] == 2 for x in prepared):
            raise ValueError(
                f"{self._name} passes no position_ids to its decoder, so that a static cache cannot have rows padded "
                "on the left; use a dynamic cache, or rows of one length"
            )
        past = _past_length(kwargs)
        if padding is not None:
            return (padding.long().cumsum(dim=1) - 1).clamp(min=0)[:, past : past + S].to(tokens.device)
        return torch.arange(past, past + S, device=tokens.device)[None]

    def _prepare_packed(self, tokens: Tensor, kwargs: dict[str, Any], cu_seqlens: Tensor) -> Tensor:
        """Own position of each token, int64 `[1, N]`, of rows packed into one sequence."""
        mask = kwargs.get("attention_mask")
        if any(x is not None and x.shape[-1] > 0 for x in (mask.values() if isinstance(mask, dict) else (mask,))):
            raise ValueError("with cu_seqlens, attention_mask must be None: packed rows have no padding")
        if kwargs.get("past_key_values") is not None:
            raise ValueError("with cu_seqlens, past_key_values must be None: packed rows cannot be continued")
        kwargs["use_cache"] = False
        kwargs["attention_mask"] = no_padding(tokens.device)
        given = kwargs.get("position_ids")
        if given is not None:
            return given
        N = tokens.shape[1]
        token = torch.arange(N, device=tokens.device)
        starts = cu_seqlens.to(tokens.device, torch.int64)
        row = torch.searchsorted(starts, token, right=True) - 1
        return (token - starts[row])[None]

    def _after(self, base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Runs after the decoder: checks that every layer has read the prefix, and that it gets its gradient."""
        state, self._thread.state = kwargs.get(STATE), None
        for value in output.values() if isinstance(output, dict) else output:
            own(value, self._owner)
        asleep = set(range(len(self._decoder.keepers))) - (state.kept if state else set())
        if asleep:
            kinds = dict.fromkeys(type(self._decoder.keepers[index]).__name__ for index in sorted(asleep))
            raise ValueError(f"{', '.join(kinds)} of {self._name} did not begin with the prefix's state")
        missing = sorted(set(range(len(self._decoder.attentions))) - (state.consumed if state else set()))
        if missing:
            raise ValueError(
                f"the attention of layers {missing} of {self._name} did not read the attached prefix, so this output "
                "ignores it; were layers skipped or replaced?"
            )
        trainable = any(x.requires_grad for x in (*state.keys, *state.values, *state.states.values()))
        if state.recording and trainable and torch.is_grad_enabled() and not output[0].requires_grad:
            raise ValueError(
                f"this output of {self._name} depends on a trainable prefix, but no gradient would reach it. Possible "
                "causes: quantised layers that ran in eval mode before, kernels without a derivative. If no gradient "
                "is needed, use torch.no_grad()"
            )
        if self._recomputes() and output[0].requires_grad:
            block = self._traces
            output[0].register_hook(lambda gradient: self._check_still_in(block))

    def _carry_gradient(self, hidden: Tensor) -> Tensor:
        """Make embeddings require a gradient if reentrant checkpointing would otherwise lose that of the prefix.

        A reentrant checkpoint records a gradient only if one of its inputs requires one. In a frozen model no input of
        the first layer does, although the prefix inside needs a gradient.
        """
        trainable = any(p.requires_grad for each in self._trainable for p in each.parameters())
        if not self._recomputes() or hidden.requires_grad or not trainable:
            return hidden
        options = getattr(self._decoder.layers[0]._gradient_checkpointing_func, "keywords", {})
        return hidden if options.get("use_reentrant") is False else hidden.detach().requires_grad_()

    def _check_recorded(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs before each layer: an error if a user's reentrant checkpoint would lose the prefix's gradient."""
        if torch.is_grad_enabled():
            return
        state = kwargs.get(STATE) or getattr(self._thread, "state", None)
        hidden = args[0] if args else kwargs["hidden_states"]
        if state is None or not state.recording or hidden.requires_grad:
            return
        if state.keys[index].requires_grad or state.values[index].requires_grad:
            raise ValueError(
                f"layer {index} of {self._name} runs in a reentrant checkpoint (or under no_grad) and its input "
                "requires no gradient, so the prefix would get no gradient from it; pass use_reentrant=False to the "
                "checkpoint, or call model.enable_input_require_grads()"
            )

    def _recomputes(self) -> bool:
        """Whether the backward pass runs the layers again (gradient checkpointing)."""
        layer = self._decoder.layers[0]
        return getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()

    def _check_still_in(self, block: Traces | None) -> None:
        """Runs first in a backward pass with gradient checkpointing."""
        if self._traces is not block:
            raise ValueError(
                "backward() was called after leaving the attach block; gradient checkpointing runs the layers again, "
                "and they need the prefix: call backward() inside the block"
            )

    def _check_implementation(self, base: nn.Module) -> None:
        current = base.config._attn_implementation
        if current != ATTACHED_IMPLEMENTATION:
            raise ValueError(
                f"the attention implementation was changed to {current!r} while a prefix is attached, and would "
                "ignore the prefix; change it before attaching or after the block"
            )

    def _check_positions(self, own: Tensor, first: int | Tensor, S: int, kwargs: dict[str, Any]) -> None:
        limits = [limit for limit in (self._position_limit, self._rope_switch) if limit is not None]
        if not limits or torch.compiler.is_compiling() or own.numel() == 0:
            return
        if self._last_first + _past_length(kwargs) + S <= min(limits):
            return  # the shapes are enough, so no value is read
        own, first = (x.flatten() for x in torch.broadcast_tensors(own, torch.as_tensor(first, device=own.device)))
        furthest = int((own + first).argmax())
        count, before = int(own[furthest]) + 1, int(first[furthest])
        end = before + count
        what = f"rows of {count} own tokens after a prefix of {before} positions"
        if self._position_limit is not None and end > self._position_limit:
            raise ValueError(f"{what} need {end} positions; {self._name} has {self._position_limit}")
        if self._rope_switch is not None and end > self._rope_switch:
            raise ValueError(
                f"{what} pass position {self._rope_switch}, from which on {self._name} rotates all keys differently; "
                "the keys of the prefix are already rotated"
            )


TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")  # 0: text; where all is text they say nothing
# tensors that a model with a head may be called with, if a row is text alone
TEXT_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep"),
    *TOLD_BY,
}
HIDDEN_FROM_ATTENTION_ALONE = (
    "a mask hides prefix positions from attention alone, but {} has layers whose state contains all of them; use a "
    'ContextMask without hidden and keep (for training: leave_one_out="none", drop_from=0)'
)
NOT_ENTERED = (
    "prefix.attach(model) {}, so the model ran without the prefix; use `with prefix.attach(model):`, or "
    "`attachment = prefix.attach(model).enable()` and later `attachment.detach()`"
)


def _say_not_entered(attachment: weakref.ref[Attachment], base: nn.Module, args: tuple) -> None:
    """Runs before a model that an attachment was made for and not entered yet."""
    made = attachment()
    if made is None or base is not made._decoder.base or torch.compiler.is_compiling():
        return
    made._notice.remove()
    if not any(hasattr(attention, ATTACHED) for attention in made._decoder.attentions):
        warnings.warn(NOT_ENTERED.format("was not entered"), stacklevel=2)


def _is_entered(attachment: weakref.ref[Attachment]) -> bool:
    made = attachment()
    return made is not None and made._traces is not None


def _layout(kwargs: dict[str, Any], tokens: Tensor, config: PreTrainedConfig) -> Tensor | None:
    """The layout of a batch as `row_layout` describes it, from the arguments of a forward pass whose class makes no
    mask through it."""
    mask, cache, S = kwargs.get("attention_mask"), kwargs.get("past_key_values"), tokens.shape[1]
    if is_layout(mask):
        return mask
    offset, length, first = 0, S, 0
    if cache is not None:
        offset, (length, first) = cache.get_query_offset(0), cache.get_mask_sizes(S, 0)
    padding = None if mask is None else mask.to(tokens.device)
    return row_layout(
        tokens.shape[0], S, length, offset, first, attention_mask=padding, device=tokens.device, config=config
    )


def _past_length(kwargs: dict[str, Any]) -> int:
    """Number of own tokens in the cache."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _check_padding(padding: Tensor, tokens: Tensor, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless `padding` is `[B, own tokens]`. With a static cache it may be longer."""
    B, own = tokens.shape[0], _past_length(kwargs) + tokens.shape[1]
    ahead = getattr(kwargs.get("past_key_values"), "is_compileable", False)
    if padding.shape[0] != B or padding.shape[1] < own or (padding.shape[1] > own and not ahead):
        raise ValueError(
            f"attention_mask must cover the rows' own tokens alone, [{B}, {own}], got {list(padding.shape)}; "
            "the prefix needs no mask"
        )
    if padding.dtype != torch.bool and not torch.compiler.is_compiling() and (padding > 1).any():
        raise ValueError(
            "attention_mask must be 0 or 1, 1 for a token; rows packed into one sequence need attachment.cu_seqlens or "
            "cu_seq_lens_q and cu_seq_lens_k instead of a mask that numbers them"
        )
    past = own - tokens.shape[1]
    if past and not torch.compiler.is_compiling():
        seen = padding[:, :past].bool()
        if (seen.any(dim=1) & ~seen[:, -1] & padding[:, past].bool()).any():
            raise ValueError(
                "attention_mask must be padding whose rows are one run of ones; rows padded on the right go on behind "
                "their padding; pad on the left: tokenizer.padding_side = 'left', or tuning.left_padded"
            )


def _check_mask_argument(mask: Any) -> None:
    """Raise ValueError for a mask that is not padding. (`generate` makes layouts in advance for static caches.)"""
    for entry in mask.values() if isinstance(mask, dict) else (mask,):
        if entry is None or is_layout(entry) or (isinstance(entry, Tensor) and entry.dim() == 2):
            continue
        what = list(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
        raise ValueError(
            "attention_mask of an attached model must be a 2D padding mask [B, own tokens], whose rows are one run of "
            f"ones; got {what}"
        )


def check_fit(prefix: PrefixLike, decoder: Decoder) -> None:
    """Check that a prefix fits a model.

    Raises:
        TypeError: its type is neither the model's nor the master type.
        ValueError: it was made for another model, or is on another device.
    """
    name = type(decoder.model).__name__
    keys = tuple(prefix.keys)
    if len(keys) != len(decoder.attentions):
        raise ValueError(f"prefix has {len(keys)} layers, {name} has {len(decoder.attentions)}")
    for index, key in enumerate(keys):
        heads, _, dimension = key.shape
        shape = decoder.shapes[index]
        if (heads, dimension) != (shape.heads, shape.key_dim):
            raise ValueError(
                f"prefix layer {index} has {heads} KV heads of dimension {dimension}, {name} has {shape.heads} of "
                f"dimension {shape.key_dim}"
            )
        if shape.value_dim != shape.key_dim and (found := tuple(prefix.values)[index].shape[-1]) != shape.value_dim:
            raise ValueError(
                f"prefix layer {index} has values of dimension {found}, {name} has values of {shape.value_dim}"
            )
        device = next(decoder.attentions[index].parameters()).device
        if key.device != device and device.type != "meta":  # meta: offloaded weights
            raise ValueError(
                f"prefix layer {index} is on {key.device}, the layer is on {device}; move the prefix there"
            )
        if key.dtype not in (decoder.dtype, decoder.prefix_dtype):
            raise TypeError(
                f"prefix must be {decoder.prefix_dtype} or the model's type {decoder.dtype}, got {key.dtype}; "
                f"convert it with prefix.to({decoder.prefix_dtype})"
            )
    check_states(prefix.states, decoder)
    other = other_architecture(prefix.metadata, decoder.config)
    if other is not None:
        raise ValueError(
            f"prefix was made for {prefix.metadata.model_class} {prefix.metadata.model_id!r}; this {name} "
            f"{decoder.model.name_or_path!r} has {other}"
        )
    if decoder.family.positions == ALIBI and prefix.first_position != prefix.length:
        raise ValueError(
            f"{name} counts distances along the keys, so first_position must be the prefix's length {prefix.length}, "
            f"got {prefix.first_position}"
        )


def _switch_implementation(decoder: Decoder, implementation: str, traces: Traces) -> None:
    """Give this model a config with another attention implementation until `traces` are undone.

    The config, and every one that holds it, is a copy, since other models may share the object. Changes to the copies
    are written back at the end.
    """
    old = decoder.config
    new = copy.copy(old)
    new._attn_implementation = implementation
    copies = {id(old): new}
    originals = [old]

    def switched(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in copies:
            parts = {name: x for name, x in vars(config).items() if isinstance(x, PreTrainedConfig)}
            changed = {name: switched(x) for name, x in parts.items() if switched(x) is not x}
            copies[id(config)] = copy.copy(config) if changed else config
            if changed:
                vars(copies[id(config)]).update(changed)
                originals.append(config)
        return copies[id(config)]

    holders = []
    for module in decoder.model.modules():
        config = vars(module).get("config")
        if config is old or (config is not None and switched(config) is not config):
            holders.append((module, config))
    before = [dict(vars(copies[id(config)])) for config in originals]

    def restore() -> None:
        for module, config in holders:
            module.config = config
        for config, values in zip(originals, before, strict=True):
            for name, value in vars(copies[id(config)]).items():
                if name != "_attn_implementation_internal" and values.get(name) is not value:
                    setattr(config, name, value)

    traces.callback(restore)
    traces.on_copy(new, lambda copied: setattr(copied, "_attn_implementation", old._attn_implementation))
    for module, config in holders:
        module.config = copies[id(config)]
