"""A tuned prefix for llama-server: a slot file that the user's own server saved, with the prefix in place of a context.

Layout and version of the file, types of its cells and the server's settings stay as the server wrote them. What the
file says is compared with what the model makes of the same tokens: only if the file's own keys and values are those of
the model, in one of the orders that llama.cpp has, is it known where the prefix belongs.
"""

from __future__ import annotations

import os
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ctkernels.serving.llama.cells import Q8_0, decode, encode, hadamard, interleaved
from ctkernels.serving.llama.slot import (
    CHECKPOINT_STATE,
    CHECKPOINTS,
    CHECKPOINTS_VERSION,
    Cache,
    Cells,
    Slot,
    SlotError,
    read_slot,
)
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.compose import moved
from ctkernels.tuning.adapters.file import check_finite
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.attach import check_fit
from ctkernels.tuning.hf.encode import Encoded
from ctkernels.tuning.hf.encode import encode as encode_context
from ctkernels.tuning.hf.models import Decoder, find_decoder
from ctkernels.tuning.storage import OutputError, atomic_file, check_target, open_regular

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest relative difference of keys, or values, between a model and its quantised GGUF file: the median of all
# layers, and that of any layer. Measured are 0.01 to 0.1 for text and up to 0.3 for random tokens, in a single layer up
# to 0.4. Another order of dimensions, other tokens or another model differ by about 1.
LIMIT, LIMIT_OF_ANY = 0.4, 0.8
VALUES_ROTATED = 64  # the Hadamard matrix of values; that of keys is the largest power of two that divides a head


@dataclass(frozen=True)
class Exported:
    """What was written. interleaved: whether keys have neighbours as pairs. cells: types of the cells. keys, values:
    the relative difference between the template's own context and the model's, in the median layer."""

    version: int
    tokens: int
    layers: int
    interleaved: bool
    cells: tuple[str, ...]
    keys: float
    values: float


@dataclass(frozen=True)
class Order:
    """How a file holds heads: pairs of keys, and sizes of Hadamard matrices."""

    interleaved: bool
    rotated: tuple[int, int]

    def put(self, x: Tensor, name: str) -> Tensor:
        """Keys or values `[Hk, n, D]` as a file's cells `[n, Hk * D]`."""
        if name == "keys" and self.interleaved:
            x = interleaved(x)
        return hadamard(x, self.rotated[name == "values"]).transpose(0, 1).flatten(1)


Layer = tuple[Cache, int, int]  # a cache, an index in it, and the layer of the model


def export_llama(
    adapter: Adapter | KVPrefix,
    template: str | os.PathLike,
    out: str | os.PathLike,
    model: PreTrainedModel,
    overwrite: bool = False,
) -> Exported:
    """Write the slot file `template` with the keys and values of a prefix in their place.

    Args:
        template: a slot file of llama-server that holds as many tokens as the prefix and nothing behind them: its
            context, or any others, which then stand for the prefix in requests.
        out: the patched file, for the server's folder of slots.
        model: the model that the prefix belongs to, whose GGUF file the server has. It encodes the template's tokens.
        overwrite: replace the slot file that lies at `out`, be it the template.

    In a template of two caches (a model with sliding windows), one checkpoint behind the prefix takes the place of the
    server's own: those lie before the prefix's end, and the server would compute its last tokens anew.

    Warns of demonstrations in words, which belong in the requests, and of two caches without a checkpoint.

    Raises:
        SlotError: a template that is not recognised, damaged, or of another model; it names the field.
        ValueError: a prefix that is empty, for other weights, with states or with an update of the weights; keys that
            cannot be moved to begin at 0; a number too large for the file's cells.
        OutputError: something at `out` that may not be replaced.
        OSError: the disk; what was there before is unharmed.
    """
    adapter = Adapter(adapter) if isinstance(adapter, KVPrefix) else adapter
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter or a KVPrefix, got {type(adapter).__name__}")
    template, out = Path(template), Path(out)
    _check_out(template, out, overwrite)
    prefix, decoder = _servable(adapter, model)
    with _named(template), open_regular(template) as file:
        slot = read_slot(file, os.fstat(file.fileno()).st_size)
        layers = _layers(slot, prefix, decoder)
        order, found = _order(file, slot, layers, decoder)
        with atomic_file(out) as temporary, temporary.open("r+b") as target:
            _write(file, target, slot, layers, order, prefix)
    if len(slot.caches) > 1 and not slot.checkpoints:
        warnings.warn(
            f"{template}: two caches without a checkpoint; a server without --swa-full computes the context anew, so "
            "let it keep checkpoints (--ctx-checkpoints) when the slot is saved",
            stacklevel=2,
        )
    kinds = dict.fromkeys(cells.kind.name for cache in slot.caches for cells in (*cache.keys, *cache.values))
    return Exported(slot.version, len(slot.tokens), len(layers), order.interleaved, tuple(kinds), *found)


def _check_out(template: Path, out: Path, overwrite: bool) -> None:
    check_target(out)
    if not out.exists():
        return
    same = template.exists() and out.samefile(template)
    if not overwrite:
        what = "is the template itself" if same else "exists"
        raise OutputError(f"{out} {what}; choose another file, or replace it with overwrite")
    with _named(out), open_regular(out) as file:
        read_slot(file, os.fstat(file.fileno()).st_size)  # nothing else is ever replaced


def _servable(adapter: Adapter, model: PreTrainedModel) -> tuple[KVPrefix, Decoder]:
    """The prefix with rows that begin at position P, and the model's parts."""
    prefix = adapter.prefix
    if adapter.lora is not None:
        raise ValueError(
            f"the prefix of this adapter ({adapter.method}) belongs to a LoRA update of the weights, which the model "
            "of the server does not have"
        )
    if prefix.length == 0:
        raise ValueError(f"the prefix of this adapter ({adapter.method}) is empty")
    if len(prefix.states):
        raise ValueError("a slot file has keys and values alone, but this prefix holds states of other layers")
    if adapter.demonstrations:
        warnings.warn("the demonstrations that this adapter puts in words belong in the requests", stacklevel=3)
    decoder = find_decoder(model)
    check_fit(prefix, decoder)
    prefix.compare_weights(model)
    check_finite(
        {f"{name}.{i}": x for name in ("keys", "values") for i, x in enumerate(getattr(prefix, name))}, "prefix"
    )
    return moved(prefix, model, prefix.length), decoder


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A SlotError of the block names the file."""
    try:
        yield
    except SlotError as error:
        raise SlotError(f"{path}: {error}") from None


def _windows(decoder: Decoder) -> list[int | None]:
    """The sliding window of each layer, or None."""
    name, config = type(decoder.model).__name__, decoder.config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * len(decoder.attentions)
    own = [kinds[index] for index in decoder.cache_indices]
    other = [kind for kind in own if kind not in ("full_attention", "sliding_attention")]
    if other:
        raise ValueError(f"{name} has layers of kind {other[0]!r}, of which slot files are not known")
    return [window if kind == "sliding_attention" else None for kind in own]


def _layers(slot: Slot, prefix: KVPrefix, decoder: Decoder) -> list[Layer]:
    """Where each layer of the model is in the file; everything that the headers say is compared with the prefix."""
    name, length = type(decoder.model).__name__, prefix.length
    if len(slot.tokens) != length:
        raise SlotError(
            f"the slot holds {len(slot.tokens)} tokens, the prefix has {length}; let the server process as many, with "
            "n_predict 0, before the slot is saved"
        )
    vocabulary = decoder.base.get_input_embeddings().weight.shape[0]
    strange = [token for token in slot.tokens if not 0 <= token < vocabulary]
    if strange:
        raise SlotError(f"token {strange[0]} is none of the {vocabulary} of {name}")
    windows = _windows(decoder)
    parts: list[list[int]] = [list(range(len(windows)))]
    if any(windows):
        parts = [[i for i, window in enumerate(windows) if (window is not None) == slides] for slides in (False, True)]
    counts = [len(cache.keys) for cache in slot.caches]
    if counts != [len(part) for part in parts]:
        raise SlotError(
            f"caches of {' and '.join(map(str, counts))} layers, {name} has {' and '.join(str(len(x)) for x in parts)}"
            + (" (those with a sliding window apart)" if len(parts) > 1 else "")
        )
    found = []
    for cache, part in zip(slot.caches, parts, strict=True):
        window = windows[part[0]] if part else None
        _check_positions(cache.positions, length, window)
        if len(cache.values) != len(cache.keys):
            raise SlotError(f"a cache of {len(cache.keys)} layers of keys and {len(cache.values)} of values")
        for index, layer in enumerate(part):
            for kind, cells, x in _both(cache, index, prefix, layer):
                heads, _, dimension = x.shape
                if cells.width != heads * dimension:
                    raise SlotError(
                        f"{kind} of layer {layer} have {cells.width} numbers for each token, {name} has {heads} heads "
                        f"of {dimension}"
                    )
                size = (cache.rotated or (0, 0))[kind == "values"]
                if size and dimension % size:
                    raise SlotError(f"a Hadamard matrix of size {size} for {kind} of dimension {dimension}")
            found.append((cache, index, layer))
    return found


def _both(cache: Cache, index: int, source: KVPrefix | Encoded, layer: int) -> Iterator[tuple[str, Cells, Tensor]]:
    """Keys and values of a layer: their name, their cells in a file, and the tensor `[Hk, P, D]` of a source."""
    yield "keys", cache.keys[index], source.keys[layer]
    yield "values", cache.values[index], source.values[layer]


def _check_positions(positions: Sequence[int], length: int, window: int | None) -> None:
    """Each position of the prefix once; of layers with a window those that the next token sees."""
    known = set(positions)
    first = 0 if window is None else max(0, length - window + 1)
    missing = [position for position in range(first, length) if position not in known]
    strange = [position for position in positions if not 0 <= position < length]
    if missing or strange or len(known) != len(positions):
        what = f"no cell at {missing[0]}" if missing else f"a cell at {strange[0]}" if strange else "some of them twice"
        raise SlotError(
            f"the cells must have the positions {first} to {length - 1} of the prefix, each once, got {what}"
        )


def _order(file: BinaryIO, slot: Slot, layers: list[Layer], decoder: Decoder) -> tuple[Order, tuple[float, float]]:
    """The order in which the file holds the model's keys and values of the template's own tokens, and how far they are
    from the model's.

    Raises:
        SlotError: in no known order they are.
    """
    plain = encode_context(decoder.model, torch.tensor(slot.tokens))
    errors: dict[tuple[str, Order], list[float]] = {}
    for cache, index, layer in layers:
        for name, cells, own in _both(cache, index, plain, layer):
            stored = _read(file, cells)
            expected = own.float().cpu()[:, list(cache.positions)]
            for order in _orders(name, cells, cache, expected.shape[-1]):
                wanted = order.put(expected, name)
                error = ((stored - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
                errors.setdefault((name, order), []).append(error)
    best = {}
    for name in ("keys", "values"):
        complete = {
            order: found for (kind, order), found in errors.items() if kind == name and len(found) == len(layers)
        }
        order = min(complete, key=lambda order: median(complete[order]))
        error, largest = median(complete[order]), max(complete[order])
        if not (error <= LIMIT and largest <= LIMIT_OF_ANY):
            raise SlotError(
                f"its {name} are not those that {type(decoder.model).__name__} {decoder.model.name_or_path!r} makes of "
                f"its tokens, in no known order of dimensions: they differ by {error:.2g}, in one layer by "
                f"{largest:.2g} ({LIMIT} and {LIMIT_OF_ANY} are allowed)"
            )
        best[name] = order, error
    (keys, key_error), (values, value_error) = best["keys"], best["values"]
    return Order(keys.interleaved, (keys.rotated[0], values.rotated[1])), (key_error, value_error)


def _orders(name: str, cells: Cells, cache: Cache, dimension: int) -> Iterable[Order]:
    """The orders in which a layer may be held; with what the file says of Hadamard matrices, or the server's rule."""
    pairs = (False, True) if name == "keys" and dimension % 2 == 0 else (False,)
    if cache.rotated is not None:
        sizes: tuple[int, ...] = (cache.rotated[name == "values"],)
    elif cells.kind is Q8_0 and dimension % VALUES_ROTATED == 0:
        sizes = (0, VALUES_ROTATED if name == "values" else dimension & -dimension)
    else:
        sizes = (0,)
    for pair, size in product(pairs, sizes):
        yield Order(pair, (0, size) if name == "values" else (size, 0))


def _read(file: BinaryIO, cells: Cells) -> Tensor:
    """The numbers of a layer, fp32 `[n, Hk * D]`."""
    file.seek(cells.offset)
    data = file.read(cells.nbytes)
    if len(data) != cells.nbytes:
        raise SlotError("the file became shorter while it was read")
    x = decode(data, cells.kind)
    return x.view(cells.width, cells.count).T if cells.transposed else x.view(cells.count, cells.width)


def _write(file: BinaryIO, target: BinaryIO, slot: Slot, layers: list[Layer], order: Order, prefix: KVPrefix) -> None:
    """The template's state with the prefix in it, and a checkpoint behind the prefix where the template has some."""
    file.seek(0)
    shutil.copyfileobj(file, target)
    target.truncate(slot.end)
    for cache, index, layer in layers:
        for name, cells, x in _both(cache, index, prefix, layer):
            rows = order.put(x.detach().float().cpu()[:, list(cache.positions)], name)
            data = encode(rows.T if cells.transposed else rows, cells.kind)
            target.seek(cells.offset)
            target.write(data)
    if slot.checkpoints:
        cache, length = slot.caches[-1], len(slot.tokens)
        target.seek(cache.start)
        state = struct.pack("<Ii", CHECKPOINT_STATE, cache.sequence) + target.read(cache.end - cache.start)
        # A server goes on behind the last position that it reads here, and takes a checkpoint whose first one is 0 for
        # any window. Given as P, the last one fits requests alone that begin with all P tokens.
        head = struct.pack("<IIIQiiQ", CHECKPOINTS, CHECKPOINTS_VERSION, 1, length, 0, length, len(state))
        target.seek(slot.end)
        target.write(head + state + struct.pack("<QQ", 0, 0))
