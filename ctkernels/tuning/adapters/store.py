"""PrefixStore: many prefixes of one model on disk, the ones in use in memory.

    store = PrefixStore("prefixes", model, memory_bytes=4 << 30)
    store.put("routing", prefix)
    with store.attach(["routing", "sentiment", "routing"]):        # one batch, a task per row
        model.generate(**rows)

One file per prefix, `QUOTED NAME.safetensors` (see `file.py`): a name is there with all that belongs to it, or not at
all. With `mapped=True` processes that serve the same prefix share its memory. The first time that a store gets a prefix
it compares the checksum.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.file import MappedFile, PrefixFileError, faults, read_file, read_header, write_file
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_set import PrefixSet
from ctkernels.tuning.evaluation.calibration import Offsets
from ctkernels.tuning.hf.attach import Attachment, check_fit
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.storage import check_target, file_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Version = tuple[str, int, int, int]  # name, inode, time of change in ns, size of the file


class UnknownPrefixError(PrefixFileError):
    """No prefix has this name."""


class PrefixFolder:
    """The files of a store, by the names of their prefixes."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.path(name).is_file()

    def __iter__(self) -> Iterator[str]:
        """Names on disk, in alphabetical order."""
        files = self.directory.iterdir() if self.directory.is_dir() else ()
        return iter(sorted(unquote(f.name[: -len(SUFFIX)]) for f in files if f.suffix == SUFFIX and f.name[0] != "."))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def path(self, name: str) -> Path:
        """Where the prefix of this name is kept. Raises ValueError for a name that is empty or too long."""
        return self.directory / f"{file_name(name)}{SUFFIX}"

    def version(self, name: str) -> Version:
        """What another file in the place of this one does not have.

        Raises:
            PrefixFileError: no such name (near ones are named).
        """
        try:
            status = self.path(name).stat()
        except FileNotFoundError:
            raise self.unknown(name) from None
        return name, status.st_ino, status.st_mtime_ns, status.st_size

    def unknown(self, name: str) -> PrefixFileError:
        """The error for a name that is not there, with near ones."""
        near = get_close_matches(name, list(self), n=3)
        hint = f"; near names are {', '.join(map(repr, near))}" if near else ""
        return UnknownPrefixError(f"{self.directory}: no prefix named {name!r}{hint}")


class PrefixStore(PrefixFolder):
    """Prefixes by name. All methods may be called by several threads at once.

    Args:
        directory: of the files; made when the first prefix is put.
        model: which all prefixes are for; read ones are checked against it and put on its device.
        memory_bytes: how much the prefixes kept in memory may take together, the least recently used leaving first. A
            larger prefix is read anew each time. What a batch uses stays until the batch is done with it.
        dtype: how prefixes are written; None keeps their own type. bfloat16 halves fp32, and equals it in a bf16 model.
        mapped: prefixes are views of their files, read as their keys are used and shared with other processes. No other
            program may write into such a file; a store never does, it replaces it. Before each forward pass a file that
            was cut off or changed raises PrefixFileError. One that is cut off during a pass ends this process (SIGBUS),
            and compiled models do not look. Otherwise a prefix has memory of its own.
        verify: compare the checksum of each file, and look for values that are not finite, when it is first read.
        allow_other_weights: as in `KVPrefix.from_pretrained`.

    Raises:
        TypeError: a model class that is not supported, a dtype that is none of fp32, bf16, fp16, fp64.
        ValueError: a negative budget.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: PreTrainedModel,
        memory_bytes: int = 1 << 30,
        dtype: torch.dtype | None = None,
        verify: bool = True,
        mapped: bool = False,
        allow_other_weights: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {dtype}")
        if memory_bytes < 0:
            raise ValueError(f"memory_bytes must be >= 0, got {memory_bytes}")
        super().__init__(directory)
        self.memory_bytes, self.dtype, self.verify = memory_bytes, dtype, verify
        self.mapped, self.allow_other_weights = mapped, allow_other_weights
        self._decoder = find_decoder(model)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Version, KVPrefix] = OrderedDict()  # least recently used first
        self._loading: dict[Version, Future[KVPrefix]] = {}
        self._seen: dict[str, Version] = {}  # what was read and found in order, by name
        self._bytes = 0

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the prefixes that are kept."""
        return self._bytes

    def put(self, name: str, prefix: KVPrefix | Adapter) -> None:
        """Write a prefix, replacing one of this name in one step; batches that read the old one go on with it. Of an
        adapter the offsets of its options are written, too.

        Raises:
            ValueError: a prefix for another model; a value that is not finite; a name that is empty or too long; an
                adapter with more than a prefix: an update of the weights, demonstrations in words.
            OutputError: the store's directory is no folder, or something else than a file has the name.
            OSError: the disk; the old prefix is unharmed.
        """
        offsets: Offsets | None = None
        if isinstance(prefix, Adapter):
            if prefix.lora is not None:
                raise ValueError("a store holds prefixes, and does not apply the LoRA update that this adapter has")
            if prefix.demonstrations:
                raise ValueError("a store holds prefixes, and not the demonstrations in words that this adapter has")
            prefix, offsets = prefix.prefix, prefix.offsets
        check_fit(prefix, self._decoder)
        check_target(self.directory, folder=True)
        path, dtype = self.path(name), self.dtype or prefix.keys[0].dtype
        description, tensors = prefix.parts()
        if offsets is not None:
            description["offsets"] = asdict(offsets)
        write_file(path, "adapter", description, {key: x.detach().to("cpu", dtype) for key, x in tensors.items()})
        with self._lock:
            self._forget(name)

    def remove(self, name: str) -> None:
        """Delete a prefix from disk and memory.

        Raises:
            PrefixFileError: no such name.
        """
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            raise self.unknown(name) from None
        with self._lock:
            self._forget(name)

    def get(self, name: str) -> KVPrefix:
        """A prefix, from memory or disk; shared by all who ask for it and frozen: make a copy to train it.

        Raises:
            PrefixFileError: no such name (near ones are named), a damaged file, or one of another model.
        """
        version = self.version(name)  # another process may have put it anew
        with self._lock:
            if version in self._kept:
                self._kept.move_to_end(version)
                return self._kept[version]
            loading, mine = self._loading.get(version), False
            if loading is None:
                loading, mine = self._loading.setdefault(version, Future()), True
        if not mine:
            return loading.result()
        try:
            prefix = self._read(name, version)
        except BaseException as error:
            with self._lock:
                del self._loading[version]
            loading.set_exception(error)
            raise
        with self._lock:
            del self._loading[version]
            self._keep(version, prefix)
        loading.set_result(prefix)
        return prefix

    def offsets(self, name: str) -> Offsets | None:
        """What is subtracted from the losses of the task's options (`Adapter.offsets`), or None; read from disk.

        Raises:
            PrefixFileError: as `get`.
        """
        self.version(name)  # an error, if there is no such name
        path = self.path(name)
        with faults(path):
            return Offsets.of(read_header(path))

    def attach(self, names: Sequence[str], backend: str | None = None) -> Attachment:
        """A context manager in which row b of a batch reads the prefix `names[b]` (see `PrefixSet.attach`).

        A batch whose rows share one prefix reads it in place; different ones are copied side by side.

        Raises:
            PrefixFileError: as `get`.  ValueError: no names; a model that has a prefix attached (on entering).
        """
        if not names:
            raise ValueError("names must hold the name of a prefix for each row, got none")
        different = list(dict.fromkeys(names))
        prefixes = [self.get(name) for name in different]
        if len(prefixes) == 1:
            return prefixes[0].attach(self._decoder.model, backend=backend)
        index = [different.index(name) for name in names]
        return PrefixSet(prefixes).attach(self._decoder.model, index, backend=backend)

    def _read(self, name: str, version: Version) -> KVPrefix:
        path, decoder = self.path(name), self._decoder
        first = self._seen.get(name) != version
        try:
            file, saved = None, None
            while saved is None or (self.mapped and MappedFile.at(path) != file):  # not that one, if it was replaced
                file = MappedFile.at(path)
                saved = read_file(path, "adapter", mapped=self.mapped, verify=first and self.verify)
        except PrefixFileError as error:
            raise (self.unknown(name) if isinstance(error.__cause__, FileNotFoundError) else error) from None
        with faults(path):
            if "lora" in saved.description:
                raise ValueError("its prefix belongs to a LoRA update of the weights, which a store does not apply")
            dtypes = (decoder.dtype, decoder.prefix_dtype)
            own = {key: x if x.dtype in dtypes else x.to(dtypes[1]) for key, x in saved.tensors.items()}
            prefix = KVPrefix.from_parts(saved._replace(tensors=own))
            prefix.place(decoder.devices).requires_grad_(False)
            views = {x.untyped_storage().data_ptr() for x in saved.tensors.values()}
            if self.mapped and any(p.untyped_storage().data_ptr() in views for p in prefix.parameters()):
                prefix.file = file
            check_fit(prefix, decoder)
            if not first:
                prefix.assume_weights(decoder.model)
            prefix.compare_weights(decoder.model, path, self.allow_other_weights)
        self._seen[name] = version
        return prefix

    def _keep(self, version: Version, prefix: KVPrefix) -> None:
        """Add to memory in the place of older versions, and let others go; called with the lock held."""
        self._forget(version[0])
        size = _size(prefix)
        if size > self.memory_bytes:
            return
        while self._bytes + size > self.memory_bytes:
            _, other = self._kept.popitem(last=False)
            self._bytes -= _size(other)
        self._kept[version] = prefix
        self._bytes += size

    def _forget(self, name: str) -> None:
        """Let all versions of a name go; called with the lock held."""
        for version in [version for version in self._kept if version[0] == name]:
            self._bytes -= _size(self._kept.pop(version))


def _size(prefix: KVPrefix) -> int:
    return sum(p.numel() * p.element_size() for p in prefix.parameters())
