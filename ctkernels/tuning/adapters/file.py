"""The one file format of this package: a safetensors file whose header describes its tensors.

    tensors     an adapter: keys.0 values.0 ...   states.NAME ...   prompt   lora.NAME_IN_PEFT ...   see `adapter.py`
                a checkpoint: parameter/NAME   optimizer/NUMBER/NAME                           see `train/checkpoint.py`
    header      ctkernels   JSON: format, format_version, versions of the writers, and what the tensors mean
                checksum    of that JSON and of all tensors

A prefix, an adapter, an entry of a store and a checkpoint are one such file each, replaced in one step: there is the
old one or the new one, whatever happens. In a folder it is `adapter.safetensors`, perhaps with a model card beside it.

This module knows tensors and JSON alone, not what they are made into.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

import ctkernels
from ctkernels.tuning.adapters import card, legacy
from ctkernels.tuning.digest import combined, digests
from ctkernels.tuning.storage import atomic_write_bytes, check_target, open_regular

FORMAT_VERSION = 2  # 1: what `legacy.py` reads
FILE_NAME = "adapter.safetensors"
RUN_FOLDER = "prefix"  # of the adapter in the folder of a run
HEADER, CHECKSUM = "ctkernels", "checksum"
LONGEST_HEADER = 1 << 25  # bytes; what describes a thousand demonstrations takes some hundred thousand
Kind = Literal["adapter", "checkpoint"]


class PrefixFileError(ValueError):
    """A saved prefix that cannot be used; the message names the file and the reason."""


class Saved(NamedTuple):
    """What a file holds: its path, its description (JSON values) and its tensors by name."""

    path: Path
    description: dict[str, Any]
    tensors: dict[str, Tensor]


class Summary(NamedTuple):
    """What a file says of itself: its description, its checksum ("" in one of an earlier version) and the shapes of its
    tensors by name."""

    description: dict[str, Any]
    checksum: str
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class MappedFile:
    """A file whose tensors are mapped, as it was then. Copies of the tensors have no file."""

    path: Path
    inode: tuple[int, int]
    size: int
    changed: int

    @classmethod
    def at(cls, path: Path) -> MappedFile:
        """Raises PrefixFileError for a missing file."""
        with faults(path):
            status = path.stat()
        return cls(path, (status.st_dev, status.st_ino), status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        """Refuse to go on with a file that another program has written into. One that was replaced or removed is kept
        by the system, out of everybody's reach.

        Raises:
            PrefixFileError: a file of another size, which would end this process (SIGBUS), or of another time.
        """
        try:
            now = MappedFile.at(self.path)
        except PrefixFileError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return
            raise
        if now.inode == self.inode and now != self:
            raise PrefixFileError(
                f"{self.path}: another program has written into it while it was mapped ({self.size} bytes then, "
                f"{now.size} now)"
            )

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def write_file(
    path: str | os.PathLike, kind: Kind, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Replace `path` by a file with these tensors and their description (JSON values), in one step.

    Raises:
        PrefixFileError: a tensor with a value that is not finite, named.
        TypeError: a description that JSON cannot hold.
        OSError: the disk.  Whatever is raised, what was there before is unharmed and nothing half-written remains.
    """
    own = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    versions = {module.__name__: str(module.__version__) for module in (ctkernels, torch, transformers)}
    text = json.dumps(
        {"format": f"ctkernels-{kind}", "format_version": FORMAT_VERSION, "versions": versions, **description}
    )
    check_finite(own, path)
    # not `save_file`: it writes to a temporary file of its own, which a killed process leaves behind, makes files that
    # no other user can read, and its errors are not OSErrors
    header = {"format": "pt", HEADER: text, CHECKSUM: checksum(text, own)}
    atomic_write_bytes(path, safetensors.torch.save(own, header))


def write_folder(
    directory: str | os.PathLike, description: Mapping[str, Any], tensors: Mapping[str, Tensor], with_card: bool = False
) -> None:
    """Write an adapter into `directory`, and perhaps a model card. A card that is there is kept up to date.

    What an earlier version saved there is removed afterwards. Raises as `write_file`, and:
        OutputError: `directory` is not a folder, or something in it in the place of a file is none.
    """
    directory = Path(directory)
    check_target(directory, folder=True)
    path = directory / FILE_NAME
    write_file(path, "adapter", description, tensors)
    legacy.remove_folder(directory)
    before = None
    while (with_card or (directory / card.FILE_NAME).is_file()) and before != (now := _version(path)):
        # once more if another process saved meanwhile: the card that stays must be of the adapter that stays
        before = now
        card.write(directory, read_header(path), FILE_NAME, ctkernels.__version__, with_card)


def read_file(path: str | os.PathLike, kind: Kind, mapped: bool = False, verify: bool = True) -> Saved:
    """What a file holds, or the file of the adapter in a folder, or in that of a run; what earlier versions wrote is
    converted.

    Args:
        mapped: the tensors are views of the file, read when they are used, and must not be changed. A program that cuts
            the file off ends the process that reads them then: see `MappedFile`. Otherwise they have memory of their
            own.
        verify: compare the checksum and look for values that are not finite, which reads all of the file.

    Raises:
        PrefixFileError: a missing, damaged, foreign or too new file; a value that is not finite, its tensor named.
    """
    path = Path(path)
    with faults(path):
        if path.is_dir():
            path = adapter_folder(path)
            if legacy.is_folder(path) and not (path / FILE_NAME).exists():
                return _read_old_folder(path)
            path = path / FILE_NAME
    with faults(path):
        header, tensors = _map(path) if mapped else _load(path)
        description, text = _of_format(kind, _description(header)), header.get(HEADER)
        if verify and text is not None and header[CHECKSUM] != checksum(text, tensors):
            raise ValueError("damaged: its tensors or their description are not those that were written (checksum)")
        if verify:
            require_finite(tensors)
    return Saved(path, description, tensors)


def adapter_folder(folder: str | os.PathLike) -> Path:
    """Where an adapter lies: in `folder`, or, if that is the folder of a run of `ctkernels tune`, in `prefix` there."""
    own, inner = Path(folder), Path(folder, RUN_FOLDER)
    holds_own, holds_inner = ((path / FILE_NAME).exists() or legacy.is_folder(path) for path in (own, inner))
    return inner if holds_inner and not holds_own else own


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The description in a file, of any kind, without its tensors; it is not compared with the checksum.

    Raises:
        PrefixFileError: a missing or damaged file, or one that ctkernels did not write.
    """
    with faults(path), open_regular(path) as file:
        description = _description(metadata(file))
        if not isinstance(description, dict):
            raise ValueError("not saved by ctkernels")
        return description


def metadata(file: BinaryIO) -> dict[str, str]:
    """The metadata in the header of a safetensors file, which is read up to its tensors.

    Raises:
        ValueError: a header that is longer than the file, or than `LONGEST_HEADER`, or that is no JSON object.
    """
    start, size = file.read(8), os.fstat(file.fileno()).st_size
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("damaged or cut off: it ends before its header does")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes; more than {LONGEST_HEADER} are not read")
    header = json.loads(file.read(length))
    found = header.get("__metadata__") or {} if isinstance(header, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("damaged: its header is not that of a safetensors file")
    return found


def summary(path: str | os.PathLike, kind: Kind) -> Summary:
    """What a file says of itself, without reading its tensors; it is not compared with the checksum.

    Raises:
        PrefixFileError: a missing, damaged, foreign or too new file.
    """
    with faults(path):
        with open_regular(path) as file:
            header = metadata(file)
            description = _of_format(kind, _description(header))
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            tensors = {name: x for name, x in json.loads(file.read(length)).items() if name != "__metadata__"}
        return Summary(description, header.get(CHECKSUM, ""), {name: tuple(x["shape"]) for name, x in tensors.items()})


@contextmanager
def faults(path: str | os.PathLike) -> Iterator[None]:
    """A block that makes something of a file: what it raises becomes a PrefixFileError that names the file."""
    try:
        yield
    except (PrefixFileError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError as error:
        inner = "" if error.filename in (None, str(path)) else f"{error.filename}: "
        raise PrefixFileError(f"{path}: {inner}no such file or folder") from error
    except OSError as error:
        raise PrefixFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise PrefixFileError(f"{path}: damaged or cut off: {error}") from error
    except RecursionError as error:
        raise PrefixFileError(f"{path}: damaged: its description is not valid JSON: it is nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PrefixFileError(f"{path}: damaged: its description is not valid JSON: {error}") from error
    except ValueError as error:
        raise PrefixFileError(f"{path}: {error}") from error
    except KeyError as error:
        raise PrefixFileError(f"{path}: damaged: {error} is missing") from error
    except MemoryError as error:
        raise PrefixFileError(f"{path}: larger than the memory that is left") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise PrefixFileError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Refuse to write values that are not finite to `path`.

    Raises:
        PrefixFileError: the tensor, named.
    """
    try:
        require_finite(tensors)
    except ValueError as error:
        raise PrefixFileError(f"{path}: not written: {error}") from None


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of any safetensors file, all sizes compared with that of the file, all values finite.

    Raises:
        PrefixFileError: a missing or damaged file; a value that is not finite, its tensor named.
    """
    with faults(path):
        header, tensors = _load(Path(path))
        require_finite(tensors)
        return header, tensors


def _version(path: Path) -> tuple[int, int, int]:
    """Differs between a file and the one that replaced it."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_old_folder(path: Path) -> Saved:
    try:
        description, tensors = legacy.read_folder(path)
    except FileNotFoundError:
        if (path / FILE_NAME).exists():  # written anew meanwhile
            return read_file(path, "adapter")
        raise
    require_finite(tensors)
    return Saved(path, description, tensors)


def _load(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with open_regular(path) as file:
        header = metadata(file)
        file.seek(0)
        data = file.read()  # a mapping would follow whoever writes into the file, or cuts it off
    return header, safetensors.torch.load(data)  # which compares all sizes with that of the file


def _map(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """As `_load`. safetensors opens the file twice, for its header and for its tensors; both must be of one file."""
    while True:
        file = MappedFile.at(path)
        try:
            with open_regular(path) as opened:
                metadata(opened)
            with safe_open(path, "pt") as opened:
                found = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception:
            if MappedFile.at(path) == file:
                raise
        else:
            if MappedFile.at(path) == file:
                return found


def _description(header: Mapping[str, str]) -> Any:
    """What a header says of the file; None of a foreign file."""
    text = header.get(HEADER)
    return legacy.description(header) if text is None else json.loads(text)


def _of_format(kind: Kind, description: Any) -> dict[str, Any]:
    if not isinstance(description, dict) or description.get("format") != f"ctkernels-{kind}":
        hint = "; import_peft reads adapters that peft saved" if kind == "adapter" else ""
        raise ValueError(f"not {'an' if kind == 'adapter' else 'a'} {kind} saved by ctkernels{hint}")
    version = description.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"format version {version}, this ctkernels {ctkernels.__version__} reads up to {FORMAT_VERSION}; it was "
            f"written by {description.get('versions')}"
        )
    return description


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a description and of tensors, 64 hexadecimal digits."""
    return hashlib.sha256(f"{text}\0{combined(digests(tensors.items()))}".encode()).hexdigest()


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() and x.numel() and not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"tensor {name} holds values that are not finite")
