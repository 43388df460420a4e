"""prepare: a mask that computes once what all layers of a step share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctkernels import dispatch
from ctkernels.dispatch import Choice
from ctkernels.mask import ContextMask
from ctkernels.problem import PROBLEM_TENSORS, Prepared, Problem

MOST = 16  # sets of tables, and of prefixes: sizes, windows, types and directions that the layers of a step may have
NOTHING = Prepared()
Inputs = Sequence[Tensor | None]  # of a backend: q to prefix_bias; a prefix of one set may have three dimensions
Rounded = dict[int, tuple[Tensor, int | None, Tensor]]  # id of a prefix -> itself, its version, its copy


def prepare(mask: ContextMask | None = None, prefixes: Iterable[tuple[Tensor, Tensor]] = ()) -> ContextMask:
    """The same mask, which remembers what the calls of a step have in common.

    Pass the result as `mask` to the op in every layer. On the CUDA and Triton backends, the first call makes the tables
    of rows, tiles and visible positions, for forward and backward, and copies all `prefixes` into the type of its rows;
    later calls read them. No bit of any result changes. Other backends take it as the mask that it is.

    A call that differs in sizes, types, options, its index tensors, the stream, or the CUDA graph that it is captured
    into gets tables of its own. What was written to in between is computed again. torch does not count writes through
    `.data`: make a new one for every step.

    Args:
        mask: context mask (default: one that hides nothing).
        prefixes: (prefix_k, prefix_v) of each layer, the very tensors that the calls get. Those that are fp32 are kept
            in the type of bf16 or fp16 rows until the result and the graph of the backward pass are gone: half the
            memory of the prefixes. Without them every call rounds its own prefix.

    Raises:
        TypeError: mask is no ContextMask, or prefixes are not pairs of tensors.
    """
    if mask is None:
        mask = ContextMask()
    elif not isinstance(mask, ContextMask):
        raise TypeError(f"mask must be a ContextMask or None, got {type(mask).__name__}")
    pairs = tuple(tuple(pair) if isinstance(pair, (tuple, list)) else (pair,) for pair in prefixes)
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
            kinds = ", ".join(type(x).__name__ for x in pair)
            raise TypeError(f"prefixes must be pairs of tensors (prefix_k, prefix_v), got ({kinds})")
    rule = {each.name: getattr(mask, each.name) for each in fields(ContextMask)}
    return PreparedMask(**rule, prefixes=tuple(x for pair in pairs for x in pair))


class Decided(NamedTuple):
    """What follows from the arguments of a call but the values of its tensors."""

    problem: Problem
    choice: Choice


@dataclass(frozen=True, eq=False)
class PreparedMask(ContextMask):
    """A mask made by `prepare`.

    decided: what was decided of earlier calls, by all that it depends on besides this mask.
    """

    prefixes: tuple[Tensor, ...] = ()
    decided: dict[tuple, Decided] = field(default_factory=dict, init=False, repr=False)
    _tables: dict[tuple, tuple[tuple, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _rounded: dict[tuple, Rounded] = field(default_factory=dict, init=False, repr=False)
    _elsewhere: dict[torch.device, ContextMask | None] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device | str) -> ContextMask:
        """The same mask on another device, one for all layers there."""
        device = torch.device(device)
        if device not in self._elsewhere:
            moved = super().to(device)
            self._elsewhere[device] = None if moved is self else moved  # not itself, which would never be freed
        return self._elsewhere[device] or self

    def remember(self, key: tuple, decided: Decided) -> None:
        """Keep a decision for the calls that are like this one."""
        if len(self.decided) >= MOST:
            self.decided.clear()
        self.decided[key] = decided

    def of_call(self, decided: Decided, prefix: tuple[Tensor, Tensor], inputs: Inputs) -> Prepared:
        """What is prepared of a call.

        decided: its backends and its problem.  prefix: prefix_k and prefix_v as they were passed.  inputs: q, k, v,
        prefix_k, prefix_v, prefix_bias.
        """
        problem, choice = decided
        makes = {name: backend for name in choice if hasattr(backend := dispatch.load(name), "tables")}
        if not makes or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return NOTHING
        q = inputs[0]
        assert q is not None
        order = (q.device, *next(iter(makes.values())).order(q))
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *prefix))
        forward = self._tables_of(choice.forward, order, inputs, problem, False) if choice.forward in makes else None
        backward = None
        if recorded and choice.backward in makes:
            backward = self._tables_of(choice.backward, order, inputs, problem, True)
        return Prepared(forward, backward, *self._rounded_of(prefix, order, q.dtype))

    def _tables_of(self, backend: str, order: tuple, inputs: Inputs, problem: Problem, backward: bool) -> Tensor | None:
        sources: tuple = problem[:PROBLEM_TENSORS]
        versions = [_version(x) for x in sources]
        if None in versions:
            return None
        # of a prefix alone as of a set of one
        sizes = tuple(None if x is None else ((1, *x.shape)[-4:], x.dtype) for x in inputs)
        rules = problem[PROBLEM_TENSORS:]
        # an id means the same tensor as long as the entry holds it
        key = (backend, backward, order, sizes, rules, *map(id, sources), *versions)
        if key not in self._tables:
            if len(self._tables) >= MOST:
                self._tables.clear()
            *rows, prefix_k, prefix_v, bias = inputs
            prefixes = (x if x is None or x.dim() == 4 else x.unsqueeze(0) for x in (prefix_k, prefix_v))
            made = dispatch.load(backend).tables(*rows, *prefixes, bias, problem, backward)
            self._tables[key] = sources, made
        return self._tables[key][1]

    def _rounded_of(
        self, prefix: tuple[Tensor, Tensor], order: tuple, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """A layer's prefixes in the type of its rows, `[G, Hk, P, D]`; None: not prepared, or of that type already."""
        if prefix[0].dtype == dtype or not self.prefixes:
            return None, None
        key = (order, dtype)
        if key not in self._rounded:
            if len(self._rounded) >= MOST:
                self._rounded.clear()
            self._rounded[key] = _round([x for x in self.prefixes if x.device == prefix[0].device], dtype)
        prefix_k, prefix_v = (_current(self._rounded[key], x) for x in prefix)
        return (None, None) if prefix_k is None or prefix_v is None else (prefix_k, prefix_v)


def _round(prefixes: list[Tensor], dtype: torch.dtype) -> Rounded:
    """The fp32 ones of some prefixes in another type, all in a few launches."""
    plain = [x for x in prefixes if type(x) in (Tensor, nn.Parameter)]
    wide = [x for x in plain if x.dtype == torch.float32 and _version(x) is not None]
    halves = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in wide]
    with torch.no_grad():
        if wide:
            torch._foreach_copy_(halves, wide)
    return {id(x): (x, _version(x), half) for x, half in zip(wide, halves, strict=True)}


def _current(rounded: Rounded, x: Tensor) -> Tensor | None:
    """The copy of a prefix as `[G, Hk, P, D]`; None: there is none, or the prefix was written to since."""
    _, version, copy = rounded.get(id(x), (x, None, x))
    if version is None or version != _version(x):
        return None
    return copy if copy.dim() == 4 else copy.unsqueeze(0)


def _version(x: Tensor | None) -> int | None:
    """How often torch has seen a tensor written to; -1 for no tensor, None if it does not count."""
    if x is None:
        return -1
    return None if x.is_inference() else x._version
