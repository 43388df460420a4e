"""Files that are either complete or not there: written beside their target, flushed to disk, then renamed onto it.

A reader never meets half a file, and a full disk or an exception leaves the old file as it was. While a temporary file
is written its owner holds a lock on it, which ends with the process: so what a killed process left behind can be told
from what another one is writing, and is removed later.

A run holds the lock of its output folder (`locked`), so that two runs never mix their results.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed
    fcntl = None  # type: ignore[assignment]

LOCK, HOLDER = ".ctkernels.lock", ".ctkernels.lock.json"  # who holds it: lock files of some platforms cannot be read
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
DAY = 24 * 3600.0
_looked: set[Path] = set()  # folders in which this process has looked for leftovers


class OutputError(ValueError):
    """A file or folder that cannot be written to as it is; the message names it and says why."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block writes there replaces `path` in one step when it ends.

    If the block raises (a full disk included), the temporary file is removed, `path` stays as it was, and the error
    passes through. Parent directories are created. After a normal exit the file has been flushed to the disk.

    Raises:
        OutputError: something at `path` that is not a regular file.
        OSError: the disk; it names `path`.
    """
    path = Path(path)
    check_target(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _looked:
            _looked.add(path.parent)
            remove_leftovers(path.parent)
        temporary, handle = _create_beside(path)
        try:
            yield temporary
            _flush(temporary, os.O_RDWR)
            temporary.replace(path)
            if os.name == "posix":  # makes the rename durable; elsewhere a directory cannot be opened
                _flush(path.parent, os.O_RDONLY)
        finally:
            try:
                temporary.unlink(missing_ok=True)
            finally:
                if handle is not None:
                    os.close(handle)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replace `path` by `data` in one step; on any error the old file stays and nothing else remains."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """`atomic_write_bytes` of `value` as indented UTF-8 JSON. Raises TypeError, before writing, for what JSON lacks."""
    atomic_write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def check_target(path: str | os.PathLike, folder: bool = False) -> None:
    """Refuse to write where something else lies than a regular file, or than a folder: a device, a FIFO, a link.

    Raises:
        OutputError: what lies there, or that a parent is not a folder.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise OutputError(f"{path}: a part of this path is a file, not a folder") from None
    if stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode):
        return
    raise OutputError(
        f"{path} must be a {'folder' if folder else 'regular file'}, or not exist yet; it is {_kind(mode)}"
    )


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading, without waiting at a FIFO or touching a device; a link is followed.

    Raises:
        ValueError: not a regular file.
        OSError: as `open`.
    """
    _require_regular(os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(handle).st_mode)  # it may have been replaced
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files in `folder` whose process is gone; those that another process is writing stay."""
    try:
        names = [entry.name for entry in Path(folder).iterdir() if TEMPORARY.fullmatch(entry.name)]
    except FileNotFoundError:
        return
    for name in names:
        with contextlib.suppress(OSError):  # another process has removed it, or owns it
            _remove_if_abandoned(Path(folder) / name)


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """A block that alone writes results into `folder`, which is created. The lock of a process that died is free.

    The lock is advisory: it keeps out those who ask for it, on this machine and on others that share the file system.
    Where the file system has no locks, a warning says so.

    Raises:
        OutputError: not a folder; another process, or another part of this one, holds the lock (pid and host named).
        OSError: the folder cannot be written to.
    """
    from filelock import FileLock, Timeout  # comes with torch

    folder = Path(folder)
    check_target(folder, folder=True)
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_target(folder / LOCK)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"{folder} is in use by {_holder(folder)}: wait for it to end, or choose another folder"
        ) from None
    except OSError as error:
        if not _has_no_locks(error):
            raise _with_name(error, folder / LOCK) from error
        warnings.warn(f"{folder}: this file system has no locks; let no other run write there", stacklevel=3)
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        atomic_write_json(folder / HOLDER, {**about, "command": " ".join(sys.argv[:2])})
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _create_beside(path: Path) -> tuple[Path, int | None]:
    """An empty temporary file, and a handle that holds its lock; None where there are no such locks."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        if fcntl is None:
            os.close(handle)
            return temporary, None
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else taken for a leftover before it was locked
            return temporary, handle
        os.close(handle)


def _remove_if_abandoned(temporary: Path) -> None:
    """Raises OSError where it is not."""
    if fcntl is None:
        if time.time() - temporary.stat().st_mtime > DAY:
            temporary.unlink()
        return
    handle = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # never waits at a FIFO
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
    finally:
        os.close(handle)


def _holder(folder: Path) -> str:
    """Who holds the lock of a folder, as far as its file says."""
    try:
        about = json.loads((folder / HOLDER).read_bytes())
        return f"process {about['pid']} on {about['host']} ({about['command']}, since {about['since']})"
    except (OSError, ValueError, TypeError, KeyError):  # between taking the lock and saying so
        return "another process"


def _has_no_locks(error: OSError) -> bool:
    return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` where it names nothing, or a temporary file."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if error.errno is None or (named is not None and not TEMPORARY.fullmatch(Path(os.fsdecode(named)).name)):
            raise
        raise _with_name(error, path) from error


def _with_name(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise ValueError(f"must be a regular file; it is {_kind(mode)}")


def _kind(mode: int) -> str:
    kinds = {stat.S_ISLNK: "a symbolic link", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    kinds |= {stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISDIR: "a folder", stat.S_ISREG: "a file"}
    return next((name for test, name in kinds.items() if test(mode)), "something else")


def _flush(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
