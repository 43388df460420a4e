"""The method table. A new method is one file beside this one and one row here."""

from __future__ import annotations

import difflib

from ctkernels.tuning.methods.base import Method
from ctkernels.tuning.methods.ct_kv import CT_KV
from ctkernels.tuning.methods.icl import ICL
from ctkernels.tuning.methods.zero_shot import ZERO_SHOT

METHODS: dict[str, Method] = {method.name: method for method in (ZERO_SHOT, ICL, CT_KV)}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: no such method; the message lists them and suggests the nearest.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name]


__all__ = ["METHODS", "Method", "get_method"]
