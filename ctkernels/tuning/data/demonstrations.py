"""Demonstrations: the pairs of a task, read from files. An unusable pair raises an error with its file and line.

Two layouts are read. Both have one JSON object per line, with `input`, `output` and perhaps `options` or `references`:

    load_jsonl("train.jsonl")
    load_metaicl("DIR", task="sick", seed=13, split="train")    # DIR/sick/sick_16_13_train.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

METAICL_SPLITS = ("train", "dev", "test")


class DataError(ValueError):
    """Data that cannot be used. The message starts with the place, `FILE:LINE`, if it is known."""


@dataclass(frozen=True)
class Demonstration:
    """One pair of a task. Test items have the same form.

    Args:
        input: what the model reads; not blank.
        output: what it should answer; not blank.
        options: the answers to choose from, for a task of choice. `output` is one of them; duplicates are removed.
        references: further right answers, which BLEU compares with in addition to `output`. With options, each is one
            of them or its index in the list as it is given.
        source: where the pair comes from (`FILE:LINE`); used only in messages.
        task: name of its task, where pairs of several tasks are trained together (meta-prefix); not compared.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a blank field, fewer than two options, an output that is not one of them, an index of no option.
    """

    input: str
    output: str
    options: tuple[str, ...] | None = None
    source: str | None = field(default=None, compare=False)
    references: tuple[str, ...] = ()
    task: str | None = field(default=None, compare=False)
    may_be_blank: ClassVar[bool] = False  # whether `input` may be blank

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {_show(value)}")
            _require_unicode(name, value)
            if not value.strip() and not (self.may_be_blank and name == "input"):
                raise ValueError(f"{name} must not be blank, got {value!r}")
        if self.task is not None and not isinstance(self.task, str):
            raise TypeError(f"task must be a string, got {_show(self.task)}")
        kinds = str if self.options is None else (str, int)
        if not isinstance(self.references, (list, tuple)) or not all(
            isinstance(r, kinds) and not isinstance(r, bool) for r in self.references
        ):
            allowed = "strings" if self.options is None else "options or their indices"
            raise TypeError(f"references must be a list of {allowed}, got {_show(self.references)}")
        object.__setattr__(self, "references", tuple(self.references))
        if self.options is None:
            return
        if not isinstance(self.options, (list, tuple)):
            raise TypeError(f"options must be a list of strings, got {_show(self.options)}")
        for option in self.options:
            if not isinstance(option, str):
                raise TypeError(f"options must be strings, got {_show(option)}")
            _require_unicode("options", option)
            if not option.strip():
                raise ValueError(f"options must not be blank, got {option!r}")
        object.__setattr__(self, "references", tuple(map(self._reference, self.references)))
        # Some items of MetaICL list an option twice. Predictions are texts, so it counts once.
        object.__setattr__(self, "options", tuple(dict.fromkeys(self.options)))
        if len(self.options) < 2:
            raise ValueError(f"options must name at least two answers, got {list(self.options)}")
        if self.output not in self.options:
            raise ValueError(f"output {self.output!r} is not one of the options {list(self.options)}")

    @property
    def right(self) -> frozenset[str]:
        """The right answers among its options; the output alone for a task without options."""
        return frozenset((self.output, *(self.references if self.options else ())))

    def _reference(self, reference: str | int) -> str:
        """One of the options, given as itself or by its index."""
        options = self.options or ()
        if isinstance(reference, int):
            if not 0 <= reference < len(options):
                raise ValueError(f"references must be options or indices below {len(options)}, got {reference}")
            return options[reference]
        if reference not in options:
            raise ValueError(f"references: {reference!r} is not one of the options {list(options)}")
        return reference


class ContentFree(Demonstration):
    """An item without content, perhaps with an empty input: what a model says to it comes from elsewhere."""

    may_be_blank = True


def parse_demonstration(record: Any, source: str) -> Demonstration:
    """A demonstration from a decoded JSON object with `input`, `output` and perhaps `options`, `references` and
    `task`.

    Other fields are ignored.

    Raises:
        DataError: the pair is unusable. The message starts with `source`.
    """
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected an object with input and output, got {_show(record)}")
    for name in ("input", "output"):
        if name not in record:
            raise DataError(f"{source}: the field {name!r} is missing; the fields are {sorted(record)}")
    options = record.get("options")
    try:
        # MetaICL writes "options": [] for a task without options
        options = None if options == [] else options
        references, task = record.get("references") or (), record.get("task")
        return Demonstration(record["input"], record["output"], options, source, references, task)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: {error}") from None


def as_demonstrations(pairs: Any, name: str) -> tuple[Demonstration, ...]:
    """Pairs as people have them: demonstrations, mappings with their fields (a list of dicts, a `datasets.Dataset`), or
    the path of a JSONL file.

    name: of the argument, for messages.

    Raises:
        TypeError: no such thing.
        DataError: a pair that is unusable.
    """
    if isinstance(pairs, (str, Path)):
        return tuple(load_jsonl(pairs))
    if (
        isinstance(pairs, Mapping)
        and all(isinstance(key, str) for key in pairs)
        and not {"input", "output"} <= {*pairs}
    ):
        raise TypeError(
            f"{name} must be a list of pairs, got a mapping with {', '.join(pairs)}; give one of its values"
        )
    if isinstance(pairs, (Mapping, Demonstration)) or not isinstance(pairs, Iterable):
        raise TypeError(f"{name} must be a list of pairs, got {_show(pairs)}")
    return tuple(
        pair
        if isinstance(pair, Demonstration)
        else parse_demonstration(dict(pair) if isinstance(pair, Mapping) else pair, f"{name}[{index}]")
        for index, pair in enumerate(pairs)
    )


def load_jsonl(path: str | Path) -> list[Demonstration]:
    """All pairs of a JSONL file (UTF-8, one object per line; blank lines are skipped).

    Raises:
        DataError: the file cannot be read, has no pair, or has an unusable line: `FILE:LINE: why` of the first one.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return parse_jsonl(data, str(path))


def parse_jsonl(data: bytes, name: str) -> list[Demonstration]:
    """All pairs of the content of a JSONL file; errors as `load_jsonl`, with `name` in the place of the file's."""
    demonstrations = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        source = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                demonstrations.append(parse_demonstration(json.loads(text), source))
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 at byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{source}: not a JSON object: {error.msg} at column {error.colno}") from None
    if not demonstrations:
        raise DataError(f"{name}: the file holds no input/output pair")
    return demonstrations


def load_metaicl(folder: str | Path, task: str, seed: int, split: str, shots: int = 16) -> list[Demonstration]:
    """One split of a task in the MetaICL layout, `FOLDER/TASK/TASK_SHOTS_SEED_SPLIT.jsonl`.

    Raises:
        DataError: an unknown task, seed or split (the message lists what there is); as `load_jsonl`.
    """
    folder = Path(folder)
    if split not in METAICL_SPLITS:
        raise DataError(f"split must be one of {', '.join(METAICL_SPLITS)}, got {split!r}")
    if not (folder / task).is_dir():
        tasks = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise DataError(f"{folder} has no task {task!r}; {_list('tasks there', tasks)}")
    path = folder / task / f"{task}_{shots}_{seed}_{split}.jsonl"
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.jsonl"))
        raise DataError(f"{path.parent} has no file {path.name}; {_list('files there', found)}")
    return load_jsonl(path)


def _require_unicode(name: str, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can say so, tokenizers cannot read it
        raise ValueError(f"{name} must be Unicode text, got one half of a surrogate pair in {text[:40]!r}")


def _show(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _list(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{what}: {shown}" if names else f"no {what}"
