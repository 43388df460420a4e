"""fp64 models whose arithmetic stays fp64.

Models of transformers compute softmax, norms and rotary angles in fp32 whatever their type, so that two ways to the
same result differ by 1e-7 and, where a rounding flips, by more. Inside `full_precision()` an fp64 tensor that is to
become fp32 stays fp64: right results then agree to 1e-12, and wrong ones stand out. Only this thread is affected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGEST = torch.finfo(torch.float32).max


class full_precision(TorchFunctionMode):
    """The context manager; see the top of this file."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        name = getattr(func, "__name__", "")
        makes = name.startswith("new_")  # of a type that somebody relies on
        if isinstance(first, Tensor) and first.dtype == torch.float64 and not makes:
            if func is Tensor.float:
                return first
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        if name in ("matmul", "__matmul__") and {x.dtype for x in args} == {torch.float32, torch.float64}:
            args = tuple(x.double() for x in args)  # angles of transformers 5.17: integers that became fp32 are exact
        if func is torch.full and isinstance(args[-1], float) and abs(args[-1]) > LARGEST:  # such as the least fp64
            kwargs = {"dtype": torch.float64, **kwargs}
        return func(*args, **kwargs)
