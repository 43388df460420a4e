#!/usr/bin/env python3
"""Writes the tables of docs/methods.md from the tables of methods, objectives, settings, presets and suites.

python docs/generate_methods.py            writes the tables
python docs/generate_methods.py --check    fails if they are not what it would write
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ctkernels.tuning.data.suites import SUITES  # noqa: E402
from ctkernels.tuning.methods import METHODS, PRESETS  # noqa: E402
from ctkernels.tuning.methods.settings import SETTINGS, written  # noqa: E402
from ctkernels.tuning.objectives import OBJECTIVES  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def methods() -> str:
    """One line per method, with its file and the papers that the file names."""
    rows = []
    for name, method in METHODS.items():
        module = sys.modules[method.fit.__module__]
        file = module.__name__.replace(".", "/") + ".py"
        papers = re.findall(r"\d{4}\.\d{5}", module.__doc__ or "")
        links = ", ".join([f"[{Path(file).name}](../{file})", *(f"[{p}](https://arxiv.org/abs/{p})" for p in papers)])
        trains, start = (x.replace("lora", "LoRA") for x in (method.trains, method.transfers))
        rows.append([f"`{name}`", method.summary, trains, start, str(method.needs_demonstrations), links])
    return table(["method", "what it is", "trains", "`start_from` brings", "demonstrations, at least", "source"], rows)


def objectives() -> str:
    """One line per objective, with its file."""
    rows = []
    for name, objective in OBJECTIVES.items():
        file = sys.modules[objective.losses.__module__].__name__.replace(".", "/") + ".py"
        reads = {"none": "no", "optional": "where there are some", "required": "yes"}[objective.choices]
        rows.append([f"`{name}`", objective.summary, reads, f"[{Path(file).name}](../{file})"])
    return table(["objective", "what is minimised", "needs options", "source"], rows)


def settings() -> str:
    """One line per setting: its default, or those of the methods that have another; who reads it; what it means."""
    rows = []
    for name, setting in SETTINGS.items():
        readers = "all" if len(setting.methods) == len(METHODS) else setting.readers or "all that train"
        rows.append([f"`{name}`", setting.defaults, readers, setting.meaning])
    return table(["setting", "default", "read by", "meaning"], rows)


def presets() -> str:
    """One line per method that has some, one column per benchmark."""
    rows = []
    for name in METHODS:
        if any(name in preset for preset in PRESETS.values()):
            values = [preset.get(name, {}) for preset in PRESETS.values()]
            rows.append(
                [f"`{name}`", *(", ".join(f"{key} {written(v)}" for key, v in value.items()) for value in values)]
            )
    return table(["method", *(f"`{name}`" for name in PRESETS)], rows)


def suites() -> str:
    rows = []
    for name, suite in SUITES.items():
        source = f" ([source]({suite.source}))" if suite.source else ""
        rows.append([f"`{name}`", f"{suite.summary}{source}", suite.shots, suite.score])
    return table(
        ["suite", "files below `--data-dir` (or a folder of the suite's name in it)", "demonstrations", "score"], rows
    )


def page(text: str) -> str:
    """The page with its tables written anew, each between `<!-- NAME -->` and `<!-- /NAME -->`."""
    for write in (methods, objectives, settings, presets, suites):
        name = write.__name__
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{PAGE.name} has no place for the table of {name}: {start.strip()} ... {end.strip()}")
        text = f"{before}{start}{write()}{end}{after}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    text = PAGE.read_text()
    if not options.check:
        PAGE.write_text(page(text))
    elif page(text) != text:
        raise SystemExit("docs/methods.md is not current: run python docs/generate_methods.py")


if __name__ == "__main__":
    main()
