#!/usr/bin/env python3
"""Files per folder, and the import arrows between the package's modules, with the upward and circular ones by name.

    python tools/structure.py [FOLDER]        of this checkout, or of another one

An arrow goes from a module to each module that one of its import statements names: at the top, inside a function, or
under TYPE_CHECKING. An arrow is upward if its target comes later than its source in `ORDER`. An import of a name that a
package re-exports is an arrow to that package's `__init__`.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path

import networkx  # a dependency of torch

# From the ground up. A module may import what is on its own line or on an earlier one. The longest fitting name counts.
ORDER = (
    ("ctkernels.mask", "ctkernels.dispatch_table"),
    ("ctkernels.problem",),
    ("ctkernels.backends",),
    ("ctkernels.dispatch",),
    ("ctkernels.prepare",),
    ("ctkernels.ops",),
    ("ctkernels.attention",),
    ("ctkernels",),  # the package itself, which exports the op
    ("ctkernels.tuning.digest", "ctkernels.tuning.storage"),
    ("ctkernels.tuning.data",),
    ("ctkernels.tuning.hf",),
    (  # of any prefix
        "ctkernels.tuning.evaluation.scoring",
        "ctkernels.tuning.evaluation.calibration",
        "ctkernels.tuning.evaluation.evaluate",
    ),
    ("ctkernels.tuning.adapters",),
    ("ctkernels.tuning.objectives",),
    ("ctkernels.tuning.train",),
    ("ctkernels.tuning.methods",),
    ("ctkernels.tuning.evaluation",),
    ("ctkernels.tuning", "ctkernels.tuning.lm_eval"),
    ("ctkernels.serving",),
    ("ctkernels.cli", "ctkernels.__main__"),
    ("ctkernels.testing",),
)
FOLDERS = ("ctkernels", "tools", "benchmarks", "examples", "docs", "tests")  # whose files may import each other's
Arrow = tuple[str, str]


def modules(root: Path, package: str = "ctkernels") -> dict[str, Path]:
    """Name -> file of every module of the package below `root`."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path, path: Path) -> Iterator[tuple[str, str]]:
    """The module and the name in it (empty for `import module`) of every import statement of a file below `root`."""
    package = ".".join(path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, name.name) for name in node.names)


def arrows(root: Path, known: Mapping[str, Path]) -> set[Arrow]:
    """All import arrows between different modules of the package below `root`."""
    found = set()
    for source, path in known.items():
        for module, name in imports(root, path):
            target = f"{module}.{name}" if f"{module}.{name}" in known else module
            if target in known and target != source:
                found.add((source, target))
    return found


def folder_arrows(root: Path) -> set[Arrow]:
    """(folder, other folder) for each two of `FOLDERS` where a file of the first imports one of the second."""
    found = set()
    for folder in FOLDERS:
        for path in (root / folder).rglob("*.py"):
            found |= {(folder, module.partition(".")[0]) for module, _ in imports(root, path)}
    return {(folder, other) for folder, other in found if other in FOLDERS and other != folder}


def level(module: str) -> int | None:
    """Its place in `ORDER`: that of the longest name there that it is, or is inside of; None if there is none."""
    places = [(len(name), place) for place, names in enumerate(ORDER) for name in names if _within(module, name)]
    return max(places)[1] if places else None


def _within(module: str, name: str) -> bool:
    return module == name or (module.startswith(f"{name}.") and name not in ("ctkernels", "ctkernels.tuning"))


def upward(found: Iterable[Arrow]) -> list[Arrow]:
    """The arrows that point to a higher place; those to or from a module without a place are left out."""
    places = ((arrow, level(arrow[0]), level(arrow[1])) for arrow in sorted(found))
    return [arrow for arrow, source, target in places if source is not None and target is not None and source < target]


def circles(found: Iterable[Arrow]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(sorted(found)))
    return sorted(sorted(group) for group in groups if len(group) > 1)


def main(root: Path) -> None:
    known = modules(root)
    per_folder = Counter(path.parent.relative_to(root).as_posix() for path in known.values())
    for name, count in sorted(per_folder.items()):
        print(f"{count:4} {name}")
    found = arrows(root, known)
    print(f"{len(known)} modules, {len(found)} arrows")
    print(f"upward: {len(upward(found))}", *(f"  {source} -> {target}" for source, target in upward(found)), sep="\n")
    groups = circles(found)
    print(f"circular: {sum(map(len, groups))} modules", *("  " + ", ".join(group) for group in groups), sep="\n")
    print("folders:", *(f"  {source} -> {target}" for source, target in sorted(folder_arrows(root))), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])
