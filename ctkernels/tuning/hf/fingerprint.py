"""What a model's weights are, as one short hash of all of them.

The same checkpoint has the same fingerprint wherever it lies, loaded in its own type, fp32 or bf16, sharded over
processes or offloaded. Quantised weights have one of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ctkernels.tuning.digest import combined, digests

PROBES = 8  # values per tensor that are compared before a remembered fingerprint is given


class Weights(NamedTuple):
    """Hashes of a model's weights, 32 hex digits.

    whole: of all of them.  body: of all but the token embeddings and the output head, which grow with the vocabulary.
    vocabulary: rows of the token embeddings; 0 of a module without them.
    """

    whole: str
    body: str
    vocabulary: int


_known: WeakKeyDictionary[nn.Module, tuple[Any, Weights | None]] = WeakKeyDictionary()
_held: WeakKeyDictionary[nn.Module, Weights | None] = WeakKeyDictionary()


def weights_fingerprint(model: nn.Module, alone: bool = False) -> str | None:
    """Hash of the names, shapes and values of all weights that `model` would save, rounded to bfloat16; 32 hex digits.

    It is computed once and remembered until a weight is replaced or changed. The first time reads every weight. Nothing
    is kept beside the checkpoint, whose file does not say what was done to the weights since it was read.

    Args:
        alone: do not exchange anything with other processes. Otherwise, if they hold parts of the model, all of them
            have to make this call.

    Returns:
        None if some weights cannot be had: those of other processes, or ones on the meta device.
    """
    found = _weights(model, alone)
    return None if found is None else found.whole


def base_weights(model: nn.Module, alone: bool = False) -> Weights | None:
    """Hashes as in `weights_fingerprint`, but within `base_held` those of the weights before the block."""
    return _held[model] if model in _held else _weights(model, alone)


def _weights(model: nn.Module, alone: bool) -> Weights | None:
    sharded = _is_sharded(model)
    state = [_state(name, p, sharded) for name, p in model.named_parameters(remove_duplicate=False)]
    remembered, found = _known.get(model, (None, None))
    if remembered == state:
        return found
    if alone and sharded:
        return None
    _known[model] = state, _read(model)
    return _known[model][1]


@contextmanager
def base_held(model: nn.Module) -> Iterator[None]:
    """A block that changes weights and puts them back: within it, `base_weights` are those of before."""
    if model in _held:
        yield
        return
    _held[model] = _weights(model, alone=True)
    remembered = _known.get(model)
    try:
        yield
    finally:
        del _held[model]
        if remembered is not None:
            _known[model] = remembered


def _is_sharded(model: nn.Module) -> bool:
    """Whether other processes hold parts of the weights, also if these are gathered at the moment."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def _state(name: str, parameter: Tensor, sharded: bool) -> tuple:
    """What changes if a weight does. All processes that share a model must find that it has changed, or none."""
    version = 0 if parameter.is_inference() else parameter._version
    if sharded or is_traceable_wrapper_subclass(parameter):
        return name, version
    if parameter.is_meta:
        return name, version, id(parameter)
    flat = parameter.detach().as_subclass(Tensor).reshape(-1)  # a view, unless the weights are strided
    probes = flat[:: max(1, len(flat) // PROBES)][:PROBES].double()  # a change through `.data` leaves the version
    return name, version, parameter.data_ptr(), tuple(probes.tolist())


def _read(model: nn.Module) -> Weights | None:
    saved = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    state = dict(part for name, x in saved.items() for part in _parts(name, x))
    first: dict[int, str] = {}  # tied weights are read once
    for name, x in state.items():
        first.setdefault(id(x), name)
    try:
        found = digests(((name, _whole(model, name, state[name])) for name in first.values()), rounded=True)
    except LookupError:
        return None
    embedding, head = (getattr(model, f"get_{name}_embeddings", lambda: None)() for name in ("input", "output"))
    growing = {id(x) for module in (embedding, head) if module is not None for x in module.parameters()}
    parts = {name: (x, found[first[id(x)]]) for name, x in state.items()}
    return Weights(
        combined({name: digest for name, (_, digest) in parts.items()}),
        combined({name: digest for name, (x, digest) in parts.items() if id(x) not in growing}),
        0 if embedding is None else next(embedding.parameters()).shape[0],
    )


def _parts(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight, or what one of a type of its own (quantised weights) is made of."""
    if not is_traceable_wrapper_subclass(x) or isinstance(x, DTensor):
        yield name, x
        return
    for attribute in x.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{attribute}", getattr(x, attribute))


def _whole(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """The values of a weight, gathered from other processes or from where accelerate has offloaded them.

    Raises:
        LookupError: they are nowhere to be had.
    """
    if isinstance(x, DTensor):
        return x.full_tensor()
    if not x.is_meta:
        return x.detach().as_subclass(Tensor)
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(path[:depth])), "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            offloaded = getattr(each, "weights_map", None)
            if offloaded is not None:
                return offloaded[".".join(path[depth:])]
    raise LookupError(f"{name} is on the meta device")
