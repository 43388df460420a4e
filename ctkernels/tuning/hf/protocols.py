"""The members of a prefix that this folder uses. `KVPrefix`, `PrefixSet` and prefixes in training have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Origin(Protocol):
    """The model that a prefix was made for, and its settings."""

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
    def architecture(self) -> Mapping[str, Any]:
        """`models.architecture` of the model's configuration; empty in older files."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that the prefix was made with, by name."""


class PrefixLike(Protocol):
    """One prefix, which all rows read.

    A prefix in training may compute its keys and values each time they are read.
    """

    @property
    def keys(self) -> Iterable[Tensor]:
        """Per layer `[Hk, P, D]`, after rotary embedding."""

    @property
    def values(self) -> Iterable[Tensor]:
        """Per layer `[Hk, P, D]`."""

    @property
    def states(self) -> Mapping[str, Tensor]:
        """What layers begin with that keep a state, by name (`states.state_name`); empty for most models."""

    @property
    def length(self) -> int:
        """P, the number of prefix tokens."""

    @property
    def first_position(self) -> int:
        """Position id of a row's first own token."""

    @property
    def metadata(self) -> Origin:
        """The model that it was made for."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The tensors that may require a gradient."""


class PrefixSetLike(Protocol):
    """G prefixes side by side. Each row reads one of them."""

    @property
    def prefixes(self) -> Sequence[PrefixLike]:
        """The G prefixes."""

    @property
    def trainable(self) -> bool:
        """Whether gradients reach the prefixes."""

    @property
    def keys(self) -> Iterable[Tensor]:
        """Per layer `[G, Hk, P, D]`, P the longest."""

    @property
    def values(self) -> Iterable[Tensor]:
        """Per layer `[G, Hk, P, D]`."""

    @property
    def states(self) -> Mapping[str, Tensor]:
        """`[G, ...]` each, by name."""

    @property
    def lengths(self) -> Tensor:
        """P of each prefix, int64 `[G]`."""

    @property
    def first_positions(self) -> Tensor:
        """`first_position` of each prefix, int64 `[G]`."""


def check_file(prefix: object) -> None:
    """Refuse a prefix whose file is mapped and was written into since. Those in training have none. Raises
    PrefixFileError, as `KVPrefix.check_file`."""
    check = getattr(prefix, "check_file", None)
    if check is not None:
        check()
