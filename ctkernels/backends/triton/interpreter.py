"""Triton's interpreter, which runs the kernels on CPU tensors when TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os
import threading
from functools import cache


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 when the process started."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def repair() -> str | None:
    """Make bf16 in the interpreter what it is on a GPU: None, or why this version of Triton does not allow it.

    Triton 3.9's interpreter keeps bf16 as uint16 patterns. Its `tl.dot` hands those to numpy.matmul as integers, so
    that every product is wrong, and its conversion from fp32 cuts bits off instead of rounding to nearest even. Here
    they become fp32 before they are multiplied, as tensor cores treat them, and torch does the conversion. Which
    program runs is a global variable of the interpreter, so that threads may launch kernels in turn only. All this
    holds for every kernel that the process interprets from then on.
    """
    import numpy as np
    import torch
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    try:
        builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
        stock_cast, stock_dot, launch = builder.cast_impl, builder.create_dot, interpreter.GridExecutor.__call__
    except AttributeError as error:
        return f"the interpreter of Triton {triton.__version__} multiplies bf16 wrongly, and has changed: {error}"

    def widened(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def cast_impl(self, source, to_type):
        pair = (source.dtype.scalar, to_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return handle(widened(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return handle(rounded.numpy().view(np.uint16).reshape(source.data.shape), tl.bfloat16)
        return stock_cast(self, source, to_type)

    def create_dot(self, a, b, d, *others):
        if a.dtype.scalar != tl.bfloat16 or b.dtype.scalar != tl.bfloat16:
            return stock_dot(self, a, b, d, *others)
        return handle(np.matmul(widened(a.data), widened(b.data)) + d.data, d.dtype.scalar)

    one_at_a_time = threading.Lock()

    def call(self, *args, **kwargs):
        # silent about what a mask or `where` discards: 2^s of a hidden logit, 0 * inf in a row that is another lane's
        with one_at_a_time, np.errstate(over="ignore", invalid="ignore"):
            return launch(self, *args, **kwargs)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter.GridExecutor.__call__ = call
    return None
