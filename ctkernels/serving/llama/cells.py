"""How llama.cpp stores keys and values: the types of its cells, and the order of a head's dimensions.

A cell holds the keys, or the values, of one token in one layer, head by head. The types are those of ggml (`block_q8_0`
and `quantize_row_q8_0_ref` in ggml-quants.c); all numbers are little-endian.

Keys of Llama's classes are turned in pairs of halves by transformers and in pairs of neighbours by llama.cpp, whose
converter reorders the weights: dimension `j * D/2 + i` of a head becomes `2 * i + j`. Other classes keep the order.

Quantised cells hold keys and values times a Hadamard matrix (llama.cpp, pull request 21038), which spreads outliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CellType:
    """A type of ggml: its name and number there, and the bytes of a block of so many numbers."""

    name: str
    number: int
    block: int
    nbytes: int


F32, F16, Q8_0 = CellType("f32", 0, 1, 4), CellType("f16", 1, 1, 2), CellType("q8_0", 8, 32, 34)
BF16 = CellType("bf16", 30, 1, 2)
TYPES = {kind.number: kind for kind in (F32, F16, Q8_0, BF16)}
OTHERS = {2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 20: "iq4_nl"}  # that a cache may have, for messages
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def encode(x: Tensor, kind: CellType) -> bytes:
    """Numbers `[..., W]`, finite, as cells; W is a multiple of the type's block.

    Raises:
        ValueError: a number that is too large for the type.
    """
    x = x.detach().to("cpu", torch.float32).contiguous()
    if kind is not Q8_0:
        stored = x.to(PLAIN[kind])
        _check_finite(stored, x, kind)
        return _bytes(stored)
    blocks = x.view(-1, kind.block)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    stored = scale.half()
    _check_finite(stored, x, kind)
    steps = blocks * torch.where(scale > 0, 1 / scale, 0)
    quantised = steps.sign() * (steps.abs() + 0.5).floor()  # halves away from zero, as in C
    return _bytes(torch.cat((stored.view(torch.int8), quantised.to(torch.int8)), dim=1))


def decode(data: bytes, kind: CellType) -> Tensor:
    """The numbers of cells, fp32 `[count]`."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if kind is not Q8_0:
        return raw.view(PLAIN[kind]).float()
    blocks = raw.view(-1, kind.nbytes)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    return (scale * blocks[:, 2:].contiguous().view(torch.int8).float()).flatten()


def interleaved(keys: Tensor) -> Tensor:
    """Keys `[Hk, n, D]` whose pairs are dimensions i and i + D/2, with neighbours as pairs."""
    return keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def hadamard(x: Tensor, size: int) -> Tensor:
    """Each `size` dimensions of x `[..., D]` times the symmetric orthonormal Hadamard matrix, its own inverse; `size`
    is a power of two that divides D. 0: x itself."""
    if size == 0:
        return x
    matrix = torch.ones(1, 1, dtype=x.dtype)
    two = torch.tensor([[1, 1], [1, -1]], dtype=x.dtype)
    while len(matrix) < size:
        matrix = torch.kron(two, matrix)
    return (x.unflatten(-1, (-1, size)) @ (matrix / size**0.5).to(x.device)).flatten(-2)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _check_finite(stored: Tensor, x: Tensor, kind: CellType) -> None:
    if not stored.isfinite().all():
        raise ValueError(f"the prefix holds {x.abs().max().item():.3g}, which is too large for cells of {kind.name}")
