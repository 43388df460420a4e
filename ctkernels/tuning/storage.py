"""Files that are either complete or not there: written beside their target, flushed to disk, then renamed onto it.

A reader never meets half a file, a full disk or an exception leaves the old file as it was, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block writes there replaces `path` in one step when it ends.

    If the block raises (a full disk included), the temporary file is removed, `path` stays as it was, and the error
    passes through. Parent directories are created. After a normal exit the file has been flushed to the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _flush(temporary, os.O_RDWR)
        temporary.replace(path)
        if os.name == "posix":  # makes the rename durable; elsewhere a directory cannot be opened
            _flush(path.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replace `path` by `data` in one step; on any error the old file stays and nothing else remains."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """`atomic_write_bytes` of `value` as indented UTF-8 JSON. Raises TypeError, before writing, for what JSON lacks."""
    atomic_write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _flush(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
