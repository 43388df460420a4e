"""The prefixes of a store's folder, for an engine that has the model in a form of its own.

files = PrefixFiles("prefixes", AutoConfig.from_pretrained(model), weights)
files.describe("routing")      # checked against the model; reads no tensor
files.read(placed)             # its keys and values, of this very content
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from ctkernels.serving.vllm.memory import Kept
from ctkernels.serving.vllm.moving import Mover
from ctkernels.serving.vllm.salts import Placed
from ctkernels.tuning.adapters.file import PrefixFileError, Summary, faults, read_file, summary
from ctkernels.tuning.adapters.prefix import KVPrefix, PrefixMetadata
from ctkernels.tuning.adapters.store import PrefixFolder
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.hf.fingerprint import Weights
from ctkernels.tuning.hf.models import other_architecture

CHECKSUM_DIGITS = 32  # of 64, as many as fit into a salt
DESCRIPTIONS_BYTES = 64 << 20
Layers = list[tuple[Tensor, Tensor]]  # keys and values [Hk, P, D] of every layer


@dataclass(frozen=True)
class Description:
    """A prefix that this engine can serve.

    placed: its name, length and content.  context: a token id for each of its P tokens.  text_format: of its rows.
    """

    placed: Placed
    context: tuple[int, ...]
    text_format: TextFormat


class PrefixFiles:
    """The prefixes in a folder that `PrefixStore` writes. All methods may be called by several threads at once.

    Args:
        directory: of the store.
        config: of the engine's model.
        weights: fingerprint of its weights; None: weights are not compared.
        filler: token id that stands for a prefix whose file holds no context.
    """

    def __init__(
        self, directory: str | os.PathLike, config: PreTrainedConfig, weights: Weights | None, filler: int = 0
    ) -> None:
        self.folder, self.config, self.weights, self.filler = PrefixFolder(directory), config, weights, filler
        self._described: Kept[Any, Description] = Kept(DESCRIPTIONS_BYTES)
        self._lock = threading.Lock()
        self._mover: Mover | None = None

    def describe(self, name: str) -> Description:
        """A prefix by name, as its file is now.

        Raises:
            UnknownPrefixError: no such name; near ones are named.
            PrefixFileError: a damaged file, or a prefix that this engine cannot serve, with the reason.
        """
        version = self.folder.version(name)
        found = self._described.get(version)
        if found is None:
            path = self.folder.path(name)
            about = summary(path, "adapter")
            with faults(path):
                found = self._checked(name, about)
            self._described.put(version, found, 8 * len(found.context) + 1024)
        return found

    def read(self, wanted: Placed) -> Layers:
        """Keys and values of a prefix, on the CPU, for rows that begin at position P.

        Raises:
            PrefixFileError: as `describe`; the file was replaced or has another content than is wanted.
        """
        path, version = self.folder.path(wanted.name), self.folder.version(wanted.name)
        found = self.describe(wanted.name).placed
        if (found.checksum, found.length) != (wanted.checksum, wanted.length):
            raise PrefixFileError(f"{path}: was replaced after the request had chosen it")
        prefix = KVPrefix.from_parts(read_file(path, "adapter"))
        if self.folder.version(wanted.name) != version:
            raise PrefixFileError(f"{path}: was replaced while it was read")
        keys: list[Tensor] = [key.detach() for key in prefix.keys]
        if prefix.first_position != prefix.length:
            with faults(path):
                keys = self._moves().moved(keys, prefix.length - prefix.first_position)
        return list(zip(keys, (value.detach() for value in prefix.values), strict=True))

    def _checked(self, name: str, about: Summary) -> Description:
        metadata = PrefixMetadata(**about.description["metadata"])
        _check_kind(about)
        if other := other_architecture(metadata, self.config):
            raise ValueError(
                f"made for {metadata.model_class} {metadata.model_id!r}; the engine's model "
                f"{self.config.name_or_path!r} has {other}"
            )
        own_id = str(self.config.name_or_path)
        known = self.weights is not None and metadata.weights is not None
        if known and (message := metadata.other_weights(self.weights, own_id)):
            raise ValueError(message)
        length = about.shapes["keys.0"][1]
        if length == 0:
            raise ValueError("is empty: a request without a prefix is the same")
        if about.description["first_position"] != length:
            self._moves()  # raises, if that model's keys cannot be moved
        context = about.description.get("context") or [self.filler] * length
        if len(context) != length:
            raise ValueError(f"damaged: its context has {len(context)} tokens, its keys {length}")
        text_format = TextFormat(**metadata.settings.get("text_format", {}))
        return Description(Placed(name, length, about.checksum[:CHECKSUM_DIGITS]), tuple(context), text_format)

    def _moves(self) -> Mover:
        with self._lock:
            if self._mover is None:
                self._mover = Mover(self.config)
            return self._mover


def _check_kind(about: Summary) -> None:
    """Refuse what vLLM has no place for."""
    kinds = {name.partition(".")[0]: name for name in about.shapes}
    for kind, why in REFUSED.items():
        if kind in kinds or kind in about.description:
            raise ValueError(f"{why}; vLLM cannot serve it")
    unknown = [name for kind, name in kinds.items() if kind not in ("keys", "values", "prompt")]
    if unknown:
        raise ValueError(f"holds a tensor {unknown[0]}, of which nothing is known")
    if not about.checksum:
        raise ValueError("was written by an earlier version: store it again")


REFUSED: Mapping[str, str] = {
    "states": "holds states of layers that keep one in place of keys and values",
    "bias": "adds a bias to the logits of its tokens",
    "lora": "belongs to a LoRA update of the weights",
    "demonstrations": "puts demonstrations in words before each input",
}


def folder_of_store(directory: str | os.PathLike) -> Path:
    """The folder of a store, which must be there.

    Raises:
        ValueError: it is not.
    """
    if not Path(directory).is_dir():
        raise ValueError(f"store must be the folder of a PrefixStore, got {str(directory)!r}, which is no folder")
    return Path(directory)
