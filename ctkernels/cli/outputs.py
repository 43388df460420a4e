"""Output folders of the commands: whose files lie in them, and which of them may be replaced."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ctkernels.cli.parse import MARK, UsageError, read_yaml
from ctkernels.tuning.storage import check_target


def check_run(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder of `ctkernels tune` that holds another run, or files of somebody else under the names of a run's.

    Raises:
        UsageError: what lies there, and what may be done.
        OutputError: not a folder.
    """
    if resume and overwrite:
        raise UsageError("resume continues the run in OUT and overwrite replaces it; give one of them")
    check_target(out, folder=True)
    there = _ours(out, RUN)
    if there and not (resume or overwrite):
        names = ", ".join(str(path.relative_to(out)) for path in there)
        raise UsageError(
            f"{out} already holds a run ({names}); add --resume to continue it, --overwrite to replace it, or choose "
            "another --out"
        )


def check_sweep(out: Path) -> None:
    """Refuse a folder of a sweep in which files of somebody else have the names of its own. Raises as `check_run`."""
    check_target(out, folder=True)
    _ours(out, SWEEP)


def check_scores(out: Path) -> None:
    """Refuse a file for the scores of `ctkernels eval` that something else wrote. Raises as `check_run`."""
    check_target(out)
    _ours(out.parent, ((glob.escape(out.name), _json(dict, "model", "results")),))


def remove_run(out: Path) -> None:
    """Remove the results of the run in a folder, and nothing else."""
    for path in _ours(out, RUN):
        path.unlink(missing_ok=True)


Recognised = tuple[str, Callable[[Path], bool]]  # a pattern of names, and whether this package wrote such a file


def _ours(out: Path, files: Iterable[Recognised]) -> list[Path]:
    """The files that are there. Raises UsageError if something else wrote one of them."""
    found = []
    for pattern, is_ours in files:
        for path in sorted(out.glob(pattern)):
            if path.is_symlink() or not is_ours(path):
                raise UsageError(
                    f"{path} was not written by this command of ctkernels, or is damaged, and is not replaced: move it "
                    "away, or choose another --out"
                )
            found.append(path)
    return found


def _configuration(*keys: str) -> Callable[[Path], bool]:
    """Whether `as_yaml` wrote a file: with its mark, or, by an earlier version, with these keys."""

    def ours(path: Path) -> bool:
        try:
            with path.open(encoding="utf-8") as file:
                return file.readline().strip() == MARK or set(keys) <= read_yaml(str(path)).keys()
        except (OSError, ValueError):
            return False

    return ours


def _json(kind: type, *keys: str) -> Callable[[Path], bool]:
    """Whether a file holds an object, or a list of objects, with these keys."""

    def ours(path: Path) -> bool:
        try:
            value: Any = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        entries = value if isinstance(value, list) else [value]
        return isinstance(value, kind) and all(isinstance(e, dict) and set(keys) <= e.keys() for e in entries)

    return ours


def _is_history_by_line(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return all({"epoch", "loss"} <= json.loads(line).keys() for line in lines[:-1])  # the last one may be cut off
    except (OSError, ValueError, AttributeError):
        return False


def _is_search(path: Path) -> bool:
    from ctkernels.cli.search import read_trials

    try:
        read_trials(path)
    except UsageError:
        return False
    return True


def _saved(kind: str) -> Callable[[Path], bool]:
    """Whether a file holds an adapter, or a checkpoint."""

    def ours(path: Path) -> bool:
        from ctkernels.tuning.adapters.file import PrefixFileError, read_header

        try:
            return read_header(path).get("format") == f"ctkernels-{kind}"
        except PrefixFileError:
            return False

    return ours


RUN: tuple[Recognised, ...] = (
    ("config.yaml", _configuration("method", "checkpoint_every", "resume", "out")),
    ("history.json", _json(list, "epoch", "loss")),
    ("search.json", _is_search),
    ("history.jsonl", _is_history_by_line),
    ("checkpoint/**/checkpoint.safetensors", _saved("checkpoint")),
    ("prefix/adapter.safetensors", _saved("adapter")),
    ("prefix/prefix.json", _json(dict, "format", "format_version")),  # of earlier versions
)
SWEEP: tuple[Recognised, ...] = (
    ("config.yaml", _configuration("suite", "methods", "seeds", "out")),
    ("report.json", _json(dict, "title", "summaries")),
    ("report.md", lambda path: (path.parent / "report.json").is_file()),  # written together
)
