#!/usr/bin/env python3
"""Writes docs/api.md: the public names with their signatures and docstrings. `make docs` calls it.

The page is built, not committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ctkernels.tuning.storage import atomic_write_bytes

# module -> its public names, or None for its __all__
MODULES: dict[str, tuple[str, ...] | None] = {
    "ctkernels": None,
    "ctkernels.dispatch": ("availability", "cpu_info", "set_cpu_isa"),
    "ctkernels.tuning": None,
    "ctkernels.serving.llama": None,
}
HEAD = "Written from the docstrings by `make docs`. `ctkernels.tuning` needs `pip install 'ctkernels[tuning]'`."


def names(module: ModuleType, listed: tuple[str, ...] | None) -> Iterator[tuple[str, Any]]:
    """Public functions, classes and tables of a module."""
    for name in listed or sorted(module.__all__):
        if not name.startswith("_"):
            yield name, getattr(module, name)


class Unquoted(str):
    """An annotation that `inspect` shows as it is written, without quotes."""

    __repr__ = str.__str__


def unquote(annotation: Any) -> Any:
    return Unquoted(annotation) if isinstance(annotation, str) else annotation


def signature(name: str, value: Any) -> str:
    """`name(arguments) -> result`; long ones have one argument per line."""
    try:
        text = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    shown = [p for p in text.parameters.values() if p.name not in ("self", "cls")]
    parameters = [str(p.replace(annotation=unquote(p.annotation))) for p in shown]
    kinds = [p.kind for p in shown]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    if keyword_only in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(keyword_only), "*")
    result = "" if text.return_annotation is inspect.Signature.empty else f" -> {text.return_annotation}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def members(value: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties with a docstring, in the order of the source."""
    for name, member in vars(value).items():
        function = getattr(member, "__func__", member)
        public = not name.startswith("_") and (
            isinstance(member, (property, classmethod, staticmethod)) or callable(member)
        )
        if public and inspect.getdoc(function):
            yield name, member


def section(name: str, value: Any) -> str:
    if isinstance(value, dict):
        rows = "\n".join(f"- `{key}`" for key in value)
        return f"### {name}\n\nA table with the names\n\n{rows}\n"
    if isinstance(value, str):
        return f"### {name}\n\nA string.\n"
    parts = [f"### {name}", f"```python\n{signature(name, value)}\n```", document(value)]
    if inspect.isclass(value):
        for title, member in members(value):
            function = getattr(member, "__func__", member)
            shown = f"{name}.{title}" if isinstance(member, property) else signature(f"{name}.{title}", function)
            parts += [f"```python\n{shown}\n```", document(member.fget if isinstance(member, property) else function)]
    return "\n\n".join(part for part in parts if part) + "\n"


def document(value: Any) -> str:
    """The docstring as a block of text, since it may hold tables and pictures of masks."""
    text = inspect.getdoc(value) or ""
    if dataclasses.is_dataclass(value) and text.startswith(f"{getattr(value, '__name__', '')}("):
        return ""  # written by dataclasses, not by us
    return f"```text\n{text}\n```" if text else ""


def page() -> str:
    parts = ["# API reference", HEAD]
    for module_name, listed in MODULES.items():
        module = importlib.import_module(module_name)
        parts += [f"## {module_name}", *(section(name, value).strip() for name, value in names(module, listed))]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("api.md"))
    options = parser.parse_args(argv)
    atomic_write_bytes(options.out, page().encode())
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
