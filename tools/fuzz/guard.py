"""Tensors whose memory ends right before a page that cannot be read, or begins right behind one.

A kernel that reads one element too far dies there with SIGSEGV. What lies between elements, and on the other side,
holds NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

from ctkernels.testing.calls import Call

PAGE = mmap.PAGESIZE
_protect = ctypes.CDLL(None, use_errno=True).mprotect
_protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Region:
    """Memory between two pages that cannot be read."""

    def __init__(self, size: int) -> None:
        """size: bytes; a multiple of the page size."""
        self.size = size
        self._map = mmap.mmap(-1, size + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for page in (start, start + PAGE + size):
            if _protect(page, PAGE, 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)[PAGE : PAGE + size]

    def place(self, x: Tensor, at_end: bool) -> Tensor:
        """A tensor of the same values and strides, which ends where the region does, or begins there."""
        span = span_bytes(x)
        begin = self.size - span if at_end else 0
        around = slice(max(0, begin - PAGE), begin + span) if at_end else slice(begin, begin + span + PAGE)
        self._bytes[around] = 0xFF  # NaN in every floating type
        own = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())  # of what is expanded
        memory = self._bytes[begin : begin + span].view(x.dtype)
        placed = memory.as_strided(x[own].shape, x.stride())
        placed.copy_(x[own])
        return placed.expand(x.shape)


class Guard:
    """Regions by name, made larger when a tensor needs it."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def place(self, name: str, x: Tensor, at_end: bool) -> Tensor:
        region = self._regions.get(name)
        if region is None or region.size < span_bytes(x):
            size = max(16 * PAGE, 1 << span_bytes(x).bit_length())
            region = self._regions[name] = Region(size)
        return region.place(x, at_end)

    def place_call(self, call: Call, at_end: bool) -> Call:
        """A call all of whose tensors are placed."""

        def placed(values: dict) -> dict:
            return {n: self.place(n, x, at_end) if isinstance(x, Tensor) else x for n, x in values.items()}

        mask = None if call.mask is None else placed(call.mask)
        lens = None if call.cu_seqlens is None else self.place("cu_seqlens", call.cu_seqlens, at_end)
        return Call(placed(call.tensors), mask, placed(call.options), lens)


def span_bytes(x: Tensor) -> int:
    """Bytes from the first element of a tensor to its last one."""
    if not x.numel():
        return 0
    return x.element_size() * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
