"""Slot files of llama-server, written field by field: independent of how the package reads and fills them."""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from ctkernels.testing.models import make_model
from ctkernels.tuning import KVPrefix

WIDE = {"head_dim": 64}  # two KV heads of it are whole blocks of q8_0 and whole Hadamard matrices
NO_WINDOW = {"use_sliding_window": False, "layer_types": None}
MODELS = {"llama": WIDE, "qwen2": WIDE | NO_WINDOW, "gemma3": WIDE}
INTERLEAVED = {"llama": True, "qwen2": False, "gemma3": False}
NUMBERS = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
SIZES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True)
class Kind:
    """What a server's settings decide."""

    version: int = 4
    keys: str = "f16"
    values: str = "f16"
    transposed: bool = False
    packed: bool = True
    streams: int = 1
    sequence: int = 0
    checkpoint: int | None = None  # tokens before it


def model_of(name, **changes):
    return make_model(name, dtype=torch.float32, **MODELS[name] | changes)


def rotation(kind: str, dimension: int, of_values: bool) -> int:
    if kind != "q8_0" or dimension % 64:
        return 0
    return 64 if of_values else max(n for n in (64, 128, 256) if dimension % n == 0)


def cells(x: np.ndarray, kind: str) -> bytes:
    if kind == "f32":
        return x.astype("<f4").tobytes()
    if kind == "f16":
        return x.astype("<f2").tobytes()
    return quants.quantize(np.ascontiguousarray(x), GGMLQuantizationType[kind.upper()]).tobytes()


def rotate(x: np.ndarray, size: int) -> np.ndarray:
    """Blocks of a vector times the Hadamard matrix (-1)^(bits that i and j share) / sqrt(size)."""
    if size == 0:
        return x
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return (x.reshape(-1, size) @ (np.array(signs) / size**0.5)).reshape(x.shape).astype(np.float32)


def rows(x, positions, interleaved: bool, size: int) -> np.ndarray:
    """Keys or values `[Hk, P, D]` as the cells of positions `[n, Hk * D]`."""
    x = x.detach().float().numpy()[:, positions]
    if interleaved:
        half = x.shape[-1] // 2
        x = np.stack((x[..., :half], x[..., half:]), axis=-1).reshape(x.shape)
    return np.ascontiguousarray(rotate(x, size).transpose(1, 0, 2).reshape(x.shape[1], -1))


def cache(prefix, layers, positions, interleaved: bool, kind: Kind) -> bytes:
    dimension = prefix.keys[0].shape[-1]
    rk, rv = rotation(kind.keys, dimension, False), rotation(kind.values, dimension, True)
    data = struct.pack("<I", kind.streams)
    for stream in range(kind.streams):
        if stream != kind.sequence % kind.streams:
            data += struct.pack("<I", 0)
            continue
        data += struct.pack("<I", len(positions))
        for position in positions:
            data += struct.pack("<iIi", position, 1, kind.sequence)
        data += struct.pack("<II", kind.transposed, len(layers))
        if kind.version == 4:
            data += struct.pack("<II", rk, rv)
        for layer in layers:
            x = rows(prefix.keys[layer], positions, interleaved, rk)
            stored = cells(x, kind.keys)
            data += struct.pack("<iQ", NUMBERS[kind.keys], len(stored) // len(positions)) + stored
        for layer in layers:
            x = rows(prefix.values[layer], positions, False, rv)
            if kind.transposed:
                size = SIZES[kind.values]
                data += struct.pack("<iII", NUMBERS[kind.values], size, x.shape[1]) + cells(x.T, kind.values)
            else:
                stored = cells(x, kind.values)
                data += struct.pack("<iQ", NUMBERS[kind.values], len(stored) // len(positions)) + stored
    return data


def checkpoint(tokens: int, first: int, last: int, sequence: int, state: bytes) -> bytes:
    blob = struct.pack("<Ii", 0xAF143CD8, sequence) + state
    return struct.pack("<IIIQiiQ", 0x504B4353, 1, 1, tokens, first, last, len(blob)) + blob + struct.pack("<QQ", 0, 0)


def slot(model, prefix: KVPrefix, tokens, name: str, kind: Kind, behind_all: bool = False) -> bytes:
    """What a server writes. behind_all: with the checkpoint that an export leaves, behind all tokens."""
    tokens, length = list(map(int, tokens)), len(tokens)
    listed = [-1, 1, length, *tokens, 0] if kind.packed else tokens
    data = struct.pack(f"<III{len(listed)}i", 0x67677371, kind.version, len(listed), *listed)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(prefix.keys)
    full, slides = ([i for i, k in enumerate(kinds) if (k == "sliding_attention") == s] for s in (False, True))
    data += cache(prefix, full, range(length), INTERLEAVED[name], kind)
    if not slides:
        return data
    first = max(0, length - model.config.sliding_window)
    windowed = cache(prefix, slides, [*range(first + 2, length), first, first + 1], INTERLEAVED[name], kind)
    data += windowed
    if kind.checkpoint is None:
        return data
    if behind_all:
        return data + checkpoint(length, 0, length, kind.sequence, windowed)
    before = cache(prefix, slides, range(kind.checkpoint), INTERLEAVED[name], kind)
    return data + checkpoint(kind.checkpoint, 0, kind.checkpoint - 1, kind.sequence, before)
