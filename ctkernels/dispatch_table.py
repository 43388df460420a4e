"""Which of the two GPU backends "auto" takes, by architecture, type, head dimension and direction.

CUDA C++, unless a measurement says otherwise: on a GPU, `make gpu-check` times both backends and writes a file of rows,
of which the first one that matches a call decides (`CTKERNELS_DISPATCH=FILE`, or `use`):

    {"rows": [{"architecture": "sm_90", "dtype": "bf16", "head_dim": 64, "direction": "backward", "backend": "triton"}]}

Fields are patterns as in file names ("sm_8?"). A field that is left out, or "*", matches everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

VARIABLE = "CTKERNELS_DISPATCH"
DIRECTIONS = ("forward", "backward")
GPU_BACKENDS = ("cuda", "triton")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# On every architecture. No GPU has measured either backend. The host's part of a call is known to be smaller in C++:
# Triton's launches are planned in Python.
DEFAULT = "cuda"
HEAD_DIMENSIONS = (64, 80, 96, 128, 256)  # any other counts as the next larger one, to which the kernels pad it


class Row(NamedTuple):
    """The backend of the calls that match the other four fields, all of which are patterns."""

    architecture: str = "*"
    dtype: str = "*"
    head_dim: str = "*"
    direction: str = "*"
    backend: str = DEFAULT


_rows: list[Row] | None = None  # None: the environment variable has not been read


def use(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | None) -> None:
    """Set the table: the rows of a file, or mappings with the fields of `Row`. None: no rows, so `DEFAULT` alone.

    Raises:
        ValueError: not a valid table; the message names the row and the field.
        OSError: the file cannot be read.
    """
    global _rows
    _rows = [] if source is None else read(source)
    pick.cache_clear()


def column(head_dim: int) -> int:
    """The one of `HEAD_DIMENSIONS` that a head dimension counts as."""
    return next((D for D in HEAD_DIMENSIONS if head_dim <= D), HEAD_DIMENSIONS[-1])


def heads(D: int, Dv: int) -> tuple[int, int]:
    """`column(D)`, and 0 if that says all: Dv is D, and no larger than the table's. Else 256 or 512, which holds both.

    Constants, by comparisons alone, though torch.compile may know D and Dv as symbols only."""
    if HEAD_DIMENSIONS[-1] < D or HEAD_DIMENSIONS[-1] < Dv:
        return column(D), 2 * HEAD_DIMENSIONS[-1]
    return column(D), 0 if Dv == D else HEAD_DIMENSIONS[-1]


@cache
def pick(architecture: str, dtype: torch.dtype, head_dim: int, direction: str) -> str:
    """The backend of the first row that matches an architecture ("sm_90"), a type, one of `HEAD_DIMENSIONS` and a
    direction, else `DEFAULT`."""
    if _rows is None:
        use(os.environ.get(VARIABLE) or None)
    call = (architecture, DTYPES.get(dtype, str(dtype)), str(head_dim), direction)
    for row in _rows or ():
        if all(fnmatchcase(value, pattern) for value, pattern in zip(call, row[:4], strict=True)):
            return row.backend
    return DEFAULT


def read(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a file or of mappings. Raises as `use`."""
    where = "the dispatch table"
    rows: Iterable[Mapping[str, Any]]
    if not isinstance(source, (str, os.PathLike)):
        rows = source
    else:
        where = f"the dispatch table {source}"
        try:
            record = json.loads(Path(source).read_text())
        except ValueError as error:
            raise ValueError(f"{where} must be JSON, got: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
            raise ValueError(f'{where} must hold {{"rows": [...]}}')
        rows = record["rows"]
    return [_row(f"{where}, row {number}", fields) for number, fields in enumerate(rows)]


def _row(where: str, fields: Mapping[str, Any]) -> Row:
    if not isinstance(fields, Mapping) or "backend" not in fields:
        raise ValueError(f"{where} must be an object with a backend, got {fields!r}")
    row = Row(**{name: str(fields[name]) for name in Row._fields if name in fields})
    if unknown := fields.keys() - {*Row._fields, "seconds"}:  # "seconds" tells people why
        raise ValueError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    names = {"dtype": tuple(DTYPES.values()), "head_dim": tuple(map(str, HEAD_DIMENSIONS)), "direction": DIRECTIONS}
    for name, known in names.items():
        if not any(fnmatchcase(value, getattr(row, name)) for value in known):
            raise ValueError(f"{where}: {name} must be * or one of {', '.join(known)}, got {getattr(row, name)!r}")
    if row.backend not in GPU_BACKENDS:
        raise ValueError(f"{where}: backend must be one of {', '.join(GPU_BACKENDS)}, got {row.backend!r}")
    return row
