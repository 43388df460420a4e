"""Where keys and values are in a slot file of llama-server (`POST /slots/0?action=save`), state versions 3 and 4.

    u32 magic, u32 version, u32 count, i32 tokens[count]
    a cache; of a model with sliding windows a second one, which holds the layers with a window
        u32 streams; of each: u32 cells, and if there are any
            for each cell: i32 position, u32 number of sequences (1), i32 sequence
            u32 whether values are transposed, u32 layers;  version 4: u32 sizes of the Hadamard matrix of keys, values
            keys of each layer: i32 type, u64 bytes of a cell, the cells
            values of each layer: the same; transposed: i32 type, u32 bytes of a number, u32 numbers of a cell, numbers
    perhaps checkpoints of the second cache: u32 magic, u32 1, u32 count; of each:
        u64 tokens, i32 first position, i32 last position, and three times u64 bytes, data: state, two of draft models
        a state: u32 magic, u32 sequence, the cache

The tokens are a plain list, or (-1, 1, number of tokens, tokens, 0), where the last number counts images. Taken from
`llama_kv_cache::state_write`, `server_tokens::serialize` and `save_slot_checkpoints` of llama.cpp. Only headers are
read here; every size is compared with what the file has left before anything is read or skipped.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import BinaryIO

from ctkernels.serving.llama.cells import OTHERS, Q8_0, TYPES, CellType

MAGIC, VERSIONS = 0x67677371, (3, 4)
CHECKPOINTS, CHECKPOINTS_VERSION = 0x504B4353, 1
CHECKPOINT_STATE = 0xAF143CD8  # how a checkpoint's state begins
PACKED, PACKED_VERSION = -1, 1  # how a list of tokens begins that may also hold images
MOST_STREAMS, MOST_LAYERS, MOST_TOKENS = 256, 1024, 1 << 22  # LLAMA_MAX_SEQ, twice LLAMA_MAX_LAYERS, any context
MOST_CACHES = 2


class SlotError(ValueError):
    """A file that is not a slot file of a known kind, or damaged; the message names what is not recognised."""


@dataclass(frozen=True)
class Cells:
    """The keys, or the values, of a layer: `count` cells of `width` numbers; transposed: `width` rows of `count`."""

    offset: int
    count: int
    width: int
    kind: CellType
    transposed: bool

    @property
    def nbytes(self) -> int:
        """All bytes of them."""
        return self.count * self.width // self.kind.block * self.kind.nbytes


@dataclass(frozen=True)
class Cache:
    """A cache in a file, from byte `start` to `end`: the sequence and positions of its cells, and those of each layer.

    rotated: sizes of the Hadamard matrix of keys and values, 0 for none; None where the file does not say it.
    """

    start: int
    end: int
    sequence: int
    positions: tuple[int, ...]
    rotated: tuple[int, int] | None
    keys: tuple[Cells, ...]
    values: tuple[Cells, ...]


@dataclass(frozen=True)
class Slot:
    """A slot file: its tokens and caches, the byte `end` where they end, and whether checkpoints follow."""

    version: int
    tokens: tuple[int, ...]
    caches: tuple[Cache, ...]
    end: int
    checkpoints: bool


def read_slot(file: BinaryIO, size: int) -> Slot:
    """The layout of a slot file of `size` bytes, opened for reading.

    Raises:
        SlotError: what is not recognised.
    """
    reader = _Reader(file, size)
    magic, version = reader.numbers("II", "the magic number and version")
    if magic != MAGIC:
        raise SlotError(f"not a slot file of llama-server: it begins with {magic:#010x} in place of {MAGIC:#010x}")
    if version not in VERSIONS:
        raise SlotError(f"state version {version} is not known, versions {', '.join(map(str, VERSIONS))} are")
    tokens = _tokens(reader)
    caches = [_cache(reader, version)]
    while reader.left and len(caches) < MOST_CACHES and reader.peek() != CHECKPOINTS:
        caches.append(_cache(reader, version))
    if len({cache.sequence for cache in caches}) > 1:
        raise SlotError("the caches belong to different sequences")
    end = reader.at
    checkpoints = bool(reader.left) and reader.peek() == CHECKPOINTS
    if checkpoints:
        if len(caches) == 1:
            raise SlotError("checkpoints behind one cache are not recognised; models with sliding windows have two")
        _check_checkpoints(reader, version, caches[-1])
    if reader.left:
        raise SlotError(f"{reader.left} bytes behind the caches are not recognised")
    return Slot(version, tokens, tuple(caches), end, checkpoints)


class _Reader:
    """Reads a file and never beyond `size`."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.at = file, size, file.tell()

    @property
    def left(self) -> int:
        return self.size - self.at

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise SlotError(f"the file ends within {what}: {count} bytes are needed, {self.left} are left")
        self.at += count
        self.file.seek(self.at)

    def take(self, count: int, what: str) -> bytes:
        at = self.at
        self.skip(count, what)
        self.file.seek(at)
        data = self.file.read(count)
        if len(data) != count:  # it became shorter meanwhile
            raise SlotError(f"the file ends within {what}: {count} bytes are needed, {len(data)} are left")
        return data

    def numbers(self, codes: str, what: str) -> tuple[int, ...]:
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}"), what))

    def number(self, code: str, what: str) -> int:
        (value,) = self.numbers(code, what)
        return value

    def peek(self) -> int:
        at = self.at
        value = self.number("I", "what follows the cache")
        self.at = at
        self.file.seek(at)
        return value


def _tokens(reader: _Reader) -> tuple[int, ...]:
    count = reader.number("I", "the number of tokens")
    if count > MOST_TOKENS:
        raise SlotError(f"{count} tokens are more than the {MOST_TOKENS} that are read")
    tokens = struct.unpack(f"<{count}i", reader.take(4 * count, "the tokens"))
    if not tokens or tokens[0] != PACKED:
        return tokens
    if count < 4 or tokens[1] != PACKED_VERSION or tokens[2] != count - 4:
        raise SlotError(f"the list of tokens begins with {tokens[:3]}, which is not recognised")
    if tokens[-1] != 0:
        raise SlotError("the slot holds images or other media, which cannot be replaced")
    return tokens[3:-1]


def _cache(reader: _Reader, version: int) -> Cache:
    start, found = reader.at, None
    streams = reader.number("I", "the number of streams")
    if not 1 <= streams <= MOST_STREAMS:
        raise SlotError(f"{streams} streams in a cache are not recognised")
    for _ in range(streams):
        count = reader.number("I", "the number of cells")
        if count == 0:
            continue
        if count > MOST_TOKENS:
            raise SlotError(f"{count} cells are more than the {MOST_TOKENS} that are read")
        if found is not None:
            raise SlotError("the cells lie in several streams, but a slot has one")
        found = _stream(reader, version, count)
    if found is None:
        raise SlotError("a cache without cells; let the server process the context before the slot is saved")
    return replace(found, start=start, end=reader.at)  # with the counts of the other streams


def _stream(reader: _Reader, version: int, count: int) -> Cache:
    start = reader.at
    meta = struct.unpack(f"<{3 * count}i", reader.take(12 * count, f"the positions of {count} cells"))
    positions, shares, sequences = meta[::3], meta[1::3], meta[2::3]
    if any(number != 1 for number in shares):
        other = next(number for number in shares if number != 1)
        raise SlotError(f"a cell of {other} sequences is not recognised; cells of a slot belong to one")
    if len(set(sequences)) > 1:
        raise SlotError(f"the cells belong to several sequences: {sorted(set(sequences))[:3]}")
    transposed, layers = reader.numbers("II", "the number of layers")
    if layers > MOST_LAYERS:
        raise SlotError(f"{layers} layers in a cache are more than the {MOST_LAYERS} that are read")
    if transposed not in (0, 1):
        raise SlotError(f"{transposed} in place of 0 or 1 for transposed values")
    rotated = None
    if version >= 4:
        rotated = _matrix_size(reader, "keys"), _matrix_size(reader, "values")
    keys: list[Cells] = []
    values: list[Cells] = []
    for found, name in ((keys, "keys"), (values, "values")):
        for layer in range(layers):
            found.append(_cells(reader, count, f"{name} of layer {layer}", bool(transposed) and name == "values"))
    return Cache(start, reader.at, sequences[0], positions, rotated, tuple(keys), tuple(values))


def _matrix_size(reader: _Reader, what: str) -> int:
    size = reader.number("I", f"the size of the Hadamard matrix of {what}")
    if size & (size - 1):
        raise SlotError(f"a Hadamard matrix of size {size} for {what}, which is no power of two")
    return size


def _cells(reader: _Reader, count: int, what: str, transposed: bool) -> Cells:
    number = reader.number("i", f"the type of {what}")
    kind = TYPES.get(number)
    if kind is None:
        known = ", ".join(kind.name for kind in TYPES.values())
        raise SlotError(f"{what} are cells of type {OTHERS.get(number, number)}; {known} are known")
    if transposed:
        element, width = reader.numbers("II", f"the size of {what}")
        if kind is Q8_0 or element != kind.nbytes:
            raise SlotError(f"transposed {what} of {element} bytes for each {kind.name} are not recognised")
    else:
        row = reader.number("Q", f"the size of {what}")
        if row % kind.nbytes:
            raise SlotError(f"{what} of {row} bytes for each cell are not blocks of {kind.name}")
        width = row // kind.nbytes * kind.block
    cells = Cells(reader.at, count, width, kind, transposed)
    reader.skip(cells.nbytes, what)
    return cells


def _check_checkpoints(reader: _Reader, version: int, cache: Cache) -> None:
    _, number, count = reader.numbers("III", "the checkpoints")
    if number != CHECKPOINTS_VERSION or count == 0:
        raise SlotError(f"{count} checkpoints of version {number} are not recognised")
    for index in range(count):  # ends with the file, however large the number
        what = f"checkpoint {index}"
        size = reader.numbers("QiiQ", what)[-1]
        end = reader.at + size
        if size > reader.left:
            raise SlotError(f"the file ends within {what}: {size} bytes are needed, {reader.left} are left")
        if reader.numbers("Ii", what) != (CHECKPOINT_STATE, cache.sequence):
            raise SlotError(f"how the state of {what} begins is not recognised")
        saved = _cache(reader, version)
        if reader.at != end or len(saved.keys) != len(cache.keys):
            raise SlotError(f"{what} does not hold the {len(cache.keys)} layers of the last cache alone")
        if any(reader.number("Q", f"the size of {what}") for _ in range(2)):
            raise SlotError(f"{what} holds the state of a draft model; save the slot of a server without one")
