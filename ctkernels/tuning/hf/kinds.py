"""What one layer's attention does beside softmax(Q K^T) V: what its mask hides, and what it makes of what it caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# attention that repeats all KV heads after caching them, and the attribute that says how often
REPEATED = {"transformers.models.jetmoe.modeling_jetmoe.JetMoeAttention": "top_k"}


class Reach(NamedTuple):
    """What a layer's mask hides although its attention does not say so: keys `window` positions back and further, and
    those of other chunks of `chunk` positions. None: nothing.  tempered: whether it scales queries by position."""

    window: int | None = None
    chunk: int | None = None
    tempered: bool = False


def written_class(kind: type) -> type:
    """A class as somebody wrote it, for one that FSDP2 has made of it."""
    return next(base for base in kind.__bases__ if base is not FSDPModule) if FSDPModule in kind.__bases__ else kind


def class_name(kind: type) -> str:
    """Module and name of a class as somebody wrote it."""
    kind = written_class(kind)
    return f"{kind.__module__}.{kind.__qualname__}"


def is_latent(attention: nn.Module) -> bool:
    """Whether it caches latents, one vector per token for all heads, and makes keys and values of them (multi-head
    latent attention)."""
    return hasattr(attention, "expand_kv")


Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def expand_of(attention: Any) -> Expand | None:
    """What makes the keys and values `[G, H, P, D]` that its attention function gets of what it caches, `[G, Hk, P, D]`
    or latents `[G, 1, P, R]`; None if these are the same."""
    if type(attention) not in _SAME:
        if is_latent(attention):
            latent: Expand = attention.expand_kv
            return latent
        if class_name(type(attention)) in REPEATED:
            count = getattr(attention, REPEATED[class_name(type(attention))])
            return lambda k, v: (k.repeat(1, count, 1, 1), v.repeat(1, count, 1, 1))
        _SAME.add(type(attention))
    return None


_SAME: set[type[nn.Module]] = set()  # classes whose attention functions get what they cache, asked for in every layer
