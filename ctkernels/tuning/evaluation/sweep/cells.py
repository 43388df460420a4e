"""The unit of a sweep: one method on one task with one seed, and the file that holds its result.

    OUT/cells/TASK/METHOD/SEED.json

A file is either complete or missing. So a sweep can be killed at any time; later it computes the missing cells.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.storage import atomic_write_json, open_regular

CHECKSUM = "checksum"
LONGEST_NAME = 200  # bytes; file systems take 255


class SweepError(ValueError):
    """Finished cells that belong to another sweep, or that cannot be read."""


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    task: str
    spec: MethodSpec
    seed: int

    def __str__(self) -> str:
        return f"{self.spec} on {self.task}, seed {self.seed}"

    def path(self, out: Path) -> Path:
        """The file of the result, in `out` whatever the names are. (`@` for `:`, which Windows does not allow.)"""
        method = folder_name(str(self.spec).replace(":", "@"))
        return out / "cells" / folder_name(self.task) / method / f"{self.seed}.json"


@dataclass(frozen=True)
class CellResult:
    """The result of a cell.

    task, method, seed: which cell.  run: everything that the numbers depend on, as JSON values by name.
    error: why there is no result, or None. With an error all further fields are empty.
    metric, score, accuracy, gold_loss, items, predictions: as in `EvalResult`; with views, those of the votes; of an
        ensemble, those of its mean losses.
    labels: outputs of the demonstrations as the method saw them in the first view, in order, where they have options.
    nll, ece, calibrated, majority: as in `EvalResult`, of cells without views. calibrated is also None where it was
        asked for and the items do not share their options.
    losses: training loss of each epoch of the first view, all stages together.
    steps: optimiser steps of the first view, all stages together.
    seconds: time of tuning, all views together.  seconds_eval: time of evaluation.
    cpu_seconds: CPU time of tuning, of all threads of the process. Other programs on the machine change it least.
    """

    task: str
    method: str
    seed: int
    run: dict[str, Any]
    error: str | None = None
    metric: str = ""
    score: float = 0.0
    accuracy: float = 0.0
    gold_loss: float = 0.0
    items: int = 0
    predictions: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    seconds_eval: float = 0.0
    cpu_seconds: float = 0.0
    nll: float | None = None
    ece: float | None = None
    calibrated: dict[str, Any] | None = None
    majority: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Replace the cell's file, which has a checksum of the result."""
        atomic_write_json(path, {**asdict(self), CHECKSUM: _checksum(asdict(self))})


def folder_name(text: str) -> str:
    """A text as the name of one folder: what could be a path, or is not allowed everywhere, is written as %XX."""
    name = re.sub(r'^\.|[. ]$|[\x00-\x1f\x7f/\\:*?"<>|%]', lambda found: f"%{ord(found[0]):02X}", text)
    if len(name.encode()) <= LONGEST_NAME:
        return name or "%"
    return f"{name.encode()[:150].decode(errors='ignore')}%{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _checksum(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def read_cell(path: Path) -> CellResult | None:
    """The result in a cell's file, or None if there is no such file.

    Raises:
        SweepError: a file that is not the result of a cell, that is damaged, or that cannot be read.
    """
    try:
        with open_regular(path) as file:
            saved = json.loads(file.read())
        known = saved.pop(CHECKSUM, None) if isinstance(saved, dict) else None
        if known is not None and known != _checksum(saved):  # cells of earlier versions have none
            raise ValueError("it was changed, or is damaged: another checksum")
        return CellResult(**saved)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise SweepError(f"{path} is not the result of a cell ({error}); remove it to compute it again") from None
