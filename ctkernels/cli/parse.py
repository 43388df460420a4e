"""The words of a command, and a YAML file below them, as one mapping from names to values.

`--lr 1e-3` on the command line is `lr: 1e-3` in the file; flags win over the file. An unknown key or flag is refused
with the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints


class UsageError(ValueError):
    """A wrong command line or configuration file; the message is one line."""


class FailedRun(Exception):
    """A run that could not do all it was asked for; the message is one line."""


class Unset(enum.Enum):
    """A setting that was not given. None is a value of some settings."""

    DEFAULT = enum.auto()


LONGEST_FILE = 1 << 20  # bytes of a configuration
MARK = "# Settings of a run, written by ctkernels and replaced by the next run here"
Config = TypeVar("Config")  # a dataclass of options


class CommandLine:
    """What a command was told: its flags, and the keys of the file that `--config FILE` names.

    prog: the command, for its help text.

    Raises:
        UsageError: `--config` without a file or with several; a file that cannot be read, or that is no mapping.
    """

    def __init__(self, prog: str, argv: Sequence[str]) -> None:
        self.prog = prog
        self._flags = _by_name(argv)
        self._file: str | None = None
        self._keys: dict[Any, Any] = {}
        if "config" in self._flags:
            self._file = _config_file(self._flags.pop("config"))
            self._keys = read_yaml(self._file)

    def has(self, name: str) -> bool:
        """Whether a setting is given, by a flag or in the file."""
        return name in self._flags or name in self._keys

    def parse(self, kind: type[Config]) -> Config:
        """The configuration.

        Raises:
            UsageError: an unknown flag or key, or a value of the wrong type.
            SystemExit: with status 0, after --help.
        """
        import tyro

        named = {"": self._flags[""], **self._arguments(kind), **self._flags}
        arguments = [word for name, words in named.items() for word in _spell_none(name, words)]
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                config, unknown = tyro.cli(kind, prog=self.prog, args=arguments, return_unknown_args=True)
        except SystemExit as stop:
            if stop.code:
                raise UsageError(_first_sentence(complaint.getvalue())) from None
            raise
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("--"):
                raise UsageError(f"unexpected argument {name!r}")
            raise UsageError(f"unknown option {name}{_nearest(name[2:].replace('-', '_'), kind, '--')}")
        return config

    def _arguments(self, kind: type) -> dict[str, list[str]]:
        """The keys of the file as flags, so that one parser types and checks both."""
        types = get_type_hints(kind)
        names = {f.name for f in fields(kind)}
        arguments: dict[str, list[str]] = {}
        for key, value in self._keys.items():
            if key not in names:
                raise UsageError(f"{self._file}: unknown key {key!r}{_nearest(str(key), kind, '')}")
            if isinstance(value, dict):
                raise UsageError(f"{self._file}: {key} must be a plain value, got a mapping")
            if value is None and type(None) not in get_args(types[key]):
                continue  # the default
            if types[key] is bool and isinstance(value, bool):
                arguments[key] = [f"--{key}" if value else f"--no_{key}"]
            elif isinstance(value, list):
                arguments[key] = [f"--{key}", *(self._entry(key, entry) for entry in value)]
            else:
                arguments[key] = [f"--{key}={value}"]
        return arguments

    def _entry(self, key: str, value: Any) -> str:
        """An entry of a list of the file, which is never taken for an option."""
        if not isinstance(value, (str, int, float)):
            raise UsageError(f"{self._file}: {key} must be a list of plain values, got a {type(value).__name__} in it")
        word = str(value)
        if isinstance(value, str) and word.startswith("-"):
            raise UsageError(f"{self._file}: no entry of {key} may begin with a dash, got {word[:40]!r}")
        return word


def read_yaml(path: str) -> dict[Any, Any]:
    """The names and values of a YAML file.

    Raises:
        UsageError: a file that cannot be read, is too long or nested too deeply, or is no mapping; a name given twice.
    """
    import yaml

    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_FILE + 1)  # a device may have no end
        if len(data) > LONGEST_FILE:
            raise UsageError(f"{path} has more than the {LONGEST_FILE} bytes that are read of a configuration")
        loader = yaml.SafeLoader(data.decode("utf-8"))
        try:
            root = loader.get_single_node()
            names = [name for name, _ in root.value] if isinstance(root, yaml.MappingNode) else []
            seen: set[str] = set()
            for name in filter(lambda node: isinstance(node, yaml.ScalarNode), names):
                if name.value in seen:
                    raise UsageError(f"{path}:{name.start_mark.line + 1}: {name.value} is given twice")
                seen.add(name.value)
            values = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply for a configuration") from None
    except UsageError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place, why = ("", error) if mark is None else (f":{mark.line + 1}", error.problem)
        raise UsageError(f"{path}{place} is not YAML: {' '.join(str(why).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must map names to values, got {type(values).__name__}")
    return values


def plain_values(config: Any) -> dict[str, Any]:
    """The configuration as plain values by name, without what was not given."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in asdict(config).items() if value is not Unset.DEFAULT}


def as_yaml(config: Any) -> str:
    """The configuration as a YAML file that `--config` accepts."""
    import yaml

    return f"{MARK}\n{yaml.safe_dump(plain_values(config), sort_keys=False)}"


def _by_name(argv: Sequence[str]) -> dict[str, list[str]]:
    """Each flag with its values, by name; of equal ones the last. What stands before the first one is under ""."""
    flags: dict[str, list[str]] = {"": []}
    words = flags[""]
    for word in argv:
        if word.startswith("--") or word == "-h":
            name = word.lstrip("-").partition("=")[0].replace("-", "_")
            if name == "config" and name in flags:
                raise UsageError("--config takes one file, got several")
            flags.pop(name, None)
            words = flags[name] = []
        words.append(word)
    return flags


def _config_file(words: Sequence[str]) -> str:
    """The file of `--config FILE` or `--config=FILE`."""
    _, *given = (*words[0].split("=", 1), *words[1:])
    if not given:
        raise UsageError("--config needs a file")
    if len(given) > 1:
        raise UsageError(f"unexpected argument {given[1]!r}")
    return given[0]


def _spell_none(name: str, words: Sequence[str]) -> list[str]:
    """The words of a flag, with `none` as the flag parser has it, `None`, where a setting of a method may be None."""
    ends = [word for word in words if word == "none" or word.endswith("=none")]
    if not ends or not _may_be_none(name):
        return list(words)
    return [word.removesuffix("none") + "None" if word in ends else word for word in words]


def _may_be_none(name: str) -> bool:
    from ctkernels.tuning.methods.settings import SETTINGS  # loads transformers

    return name in SETTINGS and type(None) in get_args(SETTINGS[name].kind)


def _first_sentence(box: str) -> str:
    """The message of the flag parser, which draws it into a box with help texts below a rule."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if not line or line.startswith("──")), len(lines))
    return " ".join(lines[:end]) or "wrong usage"


def _nearest(name: str, kind: type, dashes: str) -> str:
    """`; did you mean ...?` with the name that a setting has now, or one that is spelled alike; "" if there is none."""
    from ctkernels.tuning.train.options import RENAMED  # loads transformers

    names = [f.name for f in fields(kind)] + ["config"]
    close = [RENAMED[name]] if RENAMED.get(name) in names else difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {dashes}{close[0].replace('_', '-') if dashes else close[0]}?" if close else ""
