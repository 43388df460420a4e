"""A cache remembers the attachment that its keys and values were computed under: they depend on the prefix, so another
prefix, or none, must not continue it.

    claim(cache, owner)   before a forward of an attached model: an error if it was filled otherwise
    own(cache, owner)     after it, for the cache that the model has made itself
    cache.update(...)     in every layer: an error as soon as the owner is not attached any more, in whichever thread
"""

from __future__ import annotations

from functools import cache as cached
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

OWNER = "_ctkernels_owner"  # attribute of a cache: the attachment that filled it
ATTACHED_NOW: set[str] = set()


def claim(cache: Any, owner: str, name: str) -> None:
    """Let `cache` belong to the attachment `owner` of the model class `name`.

    Raises:
        ValueError: it has been filled without that attachment.
    """
    if not isinstance(cache, Cache):
        return
    before = getattr(cache, OWNER, None)
    if before != owner and int(cache.get_seq_length()):
        how = "without the attached prefix" if before is None else "under another attachment"
        raise ValueError(
            f"past_key_values was filled {how}, so it cannot be continued with this one attached to {name}; start from "
            "an empty cache inside the attach block"
        )
    own(cache, owner)


def own(cache: Any, owner: str) -> None:
    """Let `cache` belong to the attachment `owner`, if it is a cache."""
    if isinstance(cache, Cache):
        setattr(cache, OWNER, owner)
        if not isinstance(cache, _Owned) and not torch.compiler.is_compiling():  # compiled code cannot change a class
            cache.__class__ = _owned(type(cache))


class _Owned:
    """Mixed into the class of a cache that belongs to an attachment."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if getattr(self, OWNER) not in ATTACHED_NOW:
            raise ValueError(
                "past_key_values was filled under an attached prefix, which is not attached any more (was the attach "
                "block left while a generation ran?)"
            )
        return super().update(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _empty, (type(self).__mro__[2],), dict(vars(self))


@cached
def _owned(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (_Owned, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _empty(kind: type[Cache]) -> Cache:
    """For copies and pickles, which find a class by its name."""
    owned = _owned(kind)
    return owned.__new__(owned)
