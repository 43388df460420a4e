"""What this folder needs of a prefix. `KVPrefix`, `PrefixSet` and prefixes under training provide it; so may others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Origin(Protocol):
    """Which model a prefix was made for, and with which settings."""

    @property
    def model_class(self) -> str:
        """Name of the model's class."""

    @property
    def model_id(self) -> str:
        """The model's `name_or_path`."""

    @property
    def config_hash(self) -> str:
        """`models.config_hash` of the model's configuration."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was made with, by name."""


class PrefixLike(Protocol):
    """One prefix, read by all rows.

    A prefix under training may compute its keys and values each time that they are asked for.
    """

    @property
    def keys(self) -> Iterable[Tensor]:
        """Per layer `[Hk, P, D]`, after rotary embedding."""

    @property
    def values(self) -> Iterable[Tensor]:
        """Per layer `[Hk, P, D]`."""

    @property
    def length(self) -> int:
        """P, the number of prefix tokens."""

    @property
    def first_position(self) -> int:
        """Position id of a row's first own token."""

    @property
    def metadata(self) -> Origin:
        """What it was made for."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """What may require a gradient."""


class PrefixSetLike(Protocol):
    """G prefixes side by side, which take no gradient; each row reads one of them."""

    @property
    def prefixes(self) -> Sequence[PrefixLike]:
        """The G prefixes."""

    @property
    def keys(self) -> Iterable[Tensor]:
        """Per layer `[G, Hk, P, D]`, P the longest."""

    @property
    def values(self) -> Iterable[Tensor]:
        """Per layer `[G, Hk, P, D]`."""

    @property
    def lengths(self) -> Tensor:
        """P of each prefix, int64 `[G]`."""

    @property
    def first_positions(self) -> Tensor:
        """`first_position` of each prefix, int64 `[G]`."""
