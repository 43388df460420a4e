"""SHA-256 of tensors, piece by piece, by as many threads as torch computes with; the result depends on none of that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

ROUNDED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # to bfloat16, if asked for
PIECE = 1 << 18  # elements per job
PART = 1 << 15  # elements converted at a time: so few that torch starts no threads of its own for them


def digests(tensors: Iterable[tuple[str, Tensor]], rounded: bool = False) -> dict[str, bytes]:
    """Name -> hash of a tensor's type, shape and values. Each tensor is let go before the next one is asked for.

    rounded: floating types of 16 to 64 bits are rounded to bfloat16 first, so that the same weights have the same hash
        in each of them.
    """
    found = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for name, tensor in tensors:
            dtype = torch.bfloat16 if rounded and tensor.dtype in ROUNDED else tensor.dtype
            whole = hashlib.sha256(f"{dtype} {list(tensor.shape)}".encode())
            pieces = tensor.detach().reshape(-1).split(PIECE)
            for piece in threads.map(partial(_piece, dtype), pieces):
                whole.update(piece)
            found[name] = whole.digest()
    return found


def combined(found: Mapping[str, bytes]) -> str:
    """One hash of all tensors' names and hashes, 32 hexadecimal digits."""
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(name.encode() + b"\0" + found[name])
    return whole.hexdigest()[:32]


def _piece(dtype: torch.dtype, piece: Tensor) -> bytes:
    if piece.device.type != "cpu":
        piece = piece.to(dtype).cpu()  # half the bytes to move, if it is rounded
    done = hashlib.sha256()
    for part in piece.split(PART):
        done.update(part.to(dtype).view(torch.uint8).numpy())
    return done.digest()
