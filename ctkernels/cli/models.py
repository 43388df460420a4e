"""`ctkernels models`: which model classes a prefix can be attached to, and why not to the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ctkernels.cli.parse import UsageError

HELP = """usage: ctkernels models [--json] [NAME ...]

  Model types of transformers, the class of each, and whether a prefix can be attached to it, or the reason why not.
  NAME ...   only those whose model type or class contains one of the names
  --json     as JSON, with the configurations that were tried

A class that is not listed, or another configuration, is proved when a prefix is first attached to it, in seconds. What
was proved on this machine is listed, too; CTKERNELS_CACHE says where it is kept."""


def models_command(argv: Sequence[str]) -> None:
    """Print the table. Raises UsageError: an unknown option, a name that nothing has."""
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return
    names = [word for word in argv if not word.startswith("-")]
    unknown = [word for word in argv if word.startswith("-") and word != "--json"]
    if unknown:
        raise UsageError(f"unknown option {unknown[0]}")

    import transformers

    from ctkernels.tuning.hf.served import proved_here, shipped

    table = shipped()
    rows = [_row(name, entry) for name, entry in table["models"].items()]
    rows += [{"model_type": "", "here": True, **entry} for entry in proved_here()]
    rows = [row for row in rows if not names or any(name in row["model_type"] + row["class"] for name in names)]
    if names and not rows:
        raise UsageError(f"no model type and no class contains {' or '.join(names)}")
    versions = {"shipped_for": table["transformers"], "installed": transformers.__version__}
    if "--json" in argv:
        print(json.dumps({"transformers": versions, "models": rows}, indent=2))
        return
    _print(rows, versions)


def _row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = entry["configurations"]
    return {
        "model_type": name,
        "class": entry["class"],
        "reason": first["reason"],
        "difference": first.get("difference"),
        "effect": first.get("effect"),
        "refused": {other["name"]: other["reason"] for other in others if other["reason"] is not None},
        "configurations": entry["configurations"],
    }


def _print(rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ctkernels.cli.console import console

    table = Table("model type", "class", "prefix", "why")
    for row in rows:
        here = row.get("here", False)
        reasons = [row["reason"]] if row["reason"] else [f"{k}: {why}" for k, why in row.get("refused", {}).items()]
        verdict = "refused" if row["reason"] else "in part" if reasons else "served"
        name = "(this machine)" if here else row["model_type"]
        table.add_row(name, row["class"].rpartition(".")[2], verdict, Text("; ".join(reasons)))
    screen = console()
    screen.print(table)
    shipped = [row for row in rows if not row.get("here")]
    served = sum(row["reason"] is None for row in shipped)
    screen.print(f"{served} of {len(shipped)} model types are served, with transformers {versions['shipped_for']}")
    if versions["shipped_for"] != versions["installed"]:
        screen.print(
            f"transformers {versions['installed']} is installed: each class is proved when a prefix is first attached"
        )
