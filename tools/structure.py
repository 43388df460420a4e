#!/usr/bin/env python3
"""Files per folder, and the import arrows between the modules of the package, upward and circular ones by name.

    python tools/structure.py [FOLDER]        of this checkout, or of another one

An arrow goes from a module to each module that one of its import statements names: at the top, inside a function, or
under TYPE_CHECKING. An arrow is upward if its target stands above its source in `ORDER`; arrows into a package that
only re-exports count as arrows to that package's `__init__`.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import networkx  # a dependency of torch

# From the ground up. A module may import what stands on its own line or on a line above it.
ORDER = (
    ("ctkernels.mask", "ctkernels.problem", "ctkernels.dispatch_table"),
    ("ctkernels.backends",),
    ("ctkernels.dispatch",),
    ("ctkernels.ops",),
    ("ctkernels.attention",),
    ("ctkernels",),  # the package itself, which exports the op
    ("ctkernels.tuning.digest", "ctkernels.tuning.storage"),
    ("ctkernels.tuning.data",),
    ("ctkernels.tuning.hf",),
    ("ctkernels.tuning.adapters",),
    ("ctkernels.tuning.train",),
    ("ctkernels.tuning.methods",),
    ("ctkernels.tuning.evaluation",),
    ("ctkernels.tuning",),
    ("ctkernels.cli",),
    ("ctkernels.testing",),
)
Arrow = tuple[str, str]


def modules(root: Path, package: str = "ctkernels") -> dict[str, Path]:
    """Name -> file of every module of the package below `root`."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def targets(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a file's import statements name. All imports in this package are absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in known else node.module


def arrows(known: Mapping[str, Path]) -> set[Arrow]:
    """All import arrows between different modules."""
    return {(source, target) for source, path in known.items() for target in targets(path, known) if source != target}


def level(module: str) -> int:
    """Its place in `ORDER`: of the longest name there that it is, or lies in."""
    places = [(len(name), place) for place, names in enumerate(ORDER) for name in names if _within(module, name)]
    return max(places)[1]


def _within(module: str, name: str) -> bool:
    return module == name or (module.startswith(f"{name}.") and name not in ("ctkernels", "ctkernels.tuning"))


def upward(found: Iterable[Arrow]) -> list[Arrow]:
    """The arrows that point to a higher place."""
    return sorted(arrow for arrow in found if level(arrow[0]) < level(arrow[1]))


def circles(found: Iterable[Arrow]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(sorted(found)))
    return sorted(sorted(group) for group in groups if len(group) > 1)


def main(folder: Path) -> None:
    known = modules(folder)
    per_folder = Counter(path.parent.relative_to(folder).as_posix() for path in known.values())
    for name, count in sorted(per_folder.items()):
        print(f"{count:4} {name}")
    found = arrows(known)
    print(f"{len(known)} modules, {len(found)} arrows")
    up = [arrow for arrow in found if all(_known(end) for end in arrow)]
    print(f"upward: {len(upward(up))}", *(f"  {source} -> {target}" for source, target in upward(up)), sep="\n")
    groups = circles(found)
    print(f"circular: {sum(map(len, groups))} modules", *("  " + ", ".join(group) for group in groups), sep="\n")


def _known(module: str) -> bool:
    return any(_within(module, name) for names in ORDER for name in names)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
