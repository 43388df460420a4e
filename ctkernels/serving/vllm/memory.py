"""What a worker keeps of prefixes: its share of the heads, in the type that it writes, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """The most recently used values, up to `limit` bytes; one that is larger is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value, now the most recently used, or None."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of `size` bytes; the least recently used leave until all fit."""
        with self._lock:
            if key in self._values:
                self.bytes -= self._values.pop(key)[1]
            if size > self.limit:
                return
            self._values[key] = value, size
            self.bytes += size
            while self.bytes > self.limit:
                self.bytes -= self._values.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._values)


def heads_of_rank(heads: int, rank: int, ranks: int) -> slice:
    """The KV heads of a rank under tensor parallelism: a part of them, or one that several ranks share, as vLLM has it.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if heads % ranks == 0:
        count = heads // ranks
        return slice(rank * count, (rank + 1) * count)
    if ranks % heads == 0:
        at = rank // (ranks // heads)
        return slice(at, at + 1)
    raise ValueError(f"{heads} KV heads cannot be split over {ranks} ranks")


def share(x: Tensor, rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """A rank's heads of `[Hk, P, D]`, as the cache takes them: `[P, heads, D]` of its type, in memory of their own."""
    own = x[heads_of_rank(x.shape[0], rank, ranks)].transpose(0, 1)
    return own.to(dtype, copy=True, memory_format=torch.contiguous_format)


def layers_of_rank(count: int, own: Sequence[int], whole: bool) -> list[int]:
    """Which layer of a prefix of `count` each of a rank's layers with a cache reads.

    Args:
        own: their numbers in the model, in any order.
        whole: whether the rank has all layers of the model. Layers without a cache of their own have then no number in
            `own`, and none in the prefix.

    Raises:
        ValueError: the prefix has another number of layers than the model.
    """
    if whole:
        if len(own) != count:
            raise ValueError(f"has {count} layers, the engine's model {len(own)} with keys and values of their own")
        order = {number: at for at, number in enumerate(sorted(own))}
        return [order[number] for number in own]
    if max(own, default=-1) >= count:
        raise ValueError(f"has {count} layers, the engine's model at least {max(own) + 1}")
    return list(own)


class PrefixMemory(Generic[Key]):
    """What `load` makes of a key, kept as long as it fits into `limit` bytes."""

    def __init__(self, limit: int, load: Callable[[Key], list[tuple[Tensor, Tensor]]]) -> None:
        self.kept: Kept[Key, list[tuple[Tensor, Tensor]]] = Kept(limit)
        self._load = load

    def get(self, key: Key) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer. Raises what `load` raises; nothing is kept then."""
        layers = self.kept.get(key)
        if layers is None:
            layers = self._load(key)
            size = sum(x.numel() * x.element_size() for pair in layers for x in pair)
            self.kept.put(key, layers, size)
        return layers
