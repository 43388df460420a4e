"""Triton's interpreter, which runs the triton backend's kernels on CPU tensors when TRITON_INTERPRET=1 is set."""

from __future__ import annotations

import os
import threading


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def repair() -> None:
    """Make bf16 in Triton 3.9's interpreter what it is on a GPU, let launches follow one another, and numpy be silent.

    The interpreter keeps bf16 as uint16 patterns. Its `tl.dot` hands those to numpy.matmul as integers, so that every
    product is wrong, and its conversion from fp32 cuts bits off instead of rounding to nearest even. Here operands of
    16 bits become fp32 before they are multiplied, as tensor cores treat them, and torch does the conversion. Which
    program runs is a global variable of the interpreter, so that threads may launch kernels in turn only.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock_cast = builder.cast_impl

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

    def values(operand) -> np.ndarray:
        return widened(operand.data) if operand.dtype.scalar == tl.bfloat16 else operand.data.astype(np.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return handle(np.matmul(values(a), values(b), dtype=np.float32) + d.data, d.dtype.scalar)

    launch, one_at_a_time = interpreter.GridExecutor.__call__, threading.Lock()

    def call(self, *args, **kwargs):
        with one_at_a_time:
            return launch(self, *args, **kwargs)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter.GridExecutor.__call__ = call
    # what a mask or `where` discards afterwards: 2^s of a hidden logit, 0 * inf in a row that is another lane's
    np.seterr(over="ignore", invalid="ignore")
