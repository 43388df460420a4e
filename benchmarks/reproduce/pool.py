"""The tasks of all suites under one protocol: every public item once, split into demonstrations, validation and test.

    OUT/tasks/SUITE.TASK/{train,dev,test}.jsonl        the layout of the suite `jsonl`

The published splits of these suites differ in form and size. Here all items of a task are put together, those with the
same input once, and shuffled by a fixed seed. `train` is the pool from which the seed of a run draws its
demonstrations. Letters of BBH, `(A)`, are answered without the brackets: as one token, so that all of them are scored
by one run.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ctkernels.tuning.data.demonstrations import DataError, Demonstration, load_jsonl
from ctkernels.tuning.data.suites import bbh, get_suite, mmlu
from ctkernels.tuning.storage import atomic_write_bytes

SHUFFLE = 2026
VALIDATION, VALIDATION_SHARE = 64, 0.2  # items, and at most this share of a task
TEST, TEST_SHARE = 200, 0.45
SPLITS = ("train", "dev", "test")


def make_pool(data: Path | None, shipped: Path, out: Path) -> list[str]:
    """Write the tasks of the suites nlp_lr, bbh and mmlu below `data`, and those in `shipped`; returns their names."""
    names = []
    for suite, folder in [*((s, data / s) for s in ("nlp_lr", "bbh", "mmlu") if data), ("jsonl", shipped)]:
        if not folder.is_dir():
            raise DataError(f"data must hold the folders nlp_lr, bbh and mmlu, got {data} without {folder.name}")
        for task in get_suite(suite).list_tasks(folder):
            items = distinct(read_items(suite, folder, task))
            if not items:
                continue  # answers are generated
            name = f"{suite}.{task}"
            for split, part in zip(SPLITS, split_items(items), strict=True):
                atomic_write_bytes(out / name / f"{split}.jsonl", "".join(map(_line, part)).encode())
            names.append(name)
    return names


def read_items(suite: str, folder: Path, task: str) -> list[Demonstration]:
    """All public items of a task, of all its files."""
    if suite == "nlp_lr":
        return [item for path in sorted((folder / task).glob("*.jsonl")) for item in load_jsonl(path)]
    if suite == "bbh":
        return [_without_brackets(item) for item in bbh.read_examples(folder / f"{task}.json")]
    if suite == "mmlu":
        paths = [folder / split / f"{task}_{split}.csv" for split in ("dev", "val", "test")]
        return [item for path in paths if path.is_file() for item in mmlu.read_csv(path)]
    home = folder / task
    return [item for split in SPLITS if (path := home / f"{split}.jsonl").is_file() for item in load_jsonl(path)]


def distinct(items: Iterable[Demonstration]) -> list[Demonstration]:
    """The items with options, one of those with the same input."""
    found: dict[str, Demonstration] = {}
    for item in items:
        if item.options:
            found.setdefault(" ".join(item.input.split()), item)
    return list(found.values())


def split_items(items: Sequence[Demonstration]) -> list[list[Demonstration]]:
    """The pool of demonstrations, the validation items and the test items."""
    shuffled = random.Random(SHUFFLE).sample(list(items), len(items))
    validation = min(VALIDATION, int(VALIDATION_SHARE * len(items)))
    end = validation + min(TEST, int(TEST_SHARE * len(items)))
    return [shuffled[end:], shuffled[:validation], shuffled[validation:end]]


def _without_brackets(item: Demonstration) -> Demonstration:
    options = item.options or ()
    if not options or not all(re.fullmatch(r"\([A-Z]\)", option) for option in options):
        return item
    return replace(item, output=item.output[1:-1], options=tuple(option[1:-1] for option in options))


def _line(item: Demonstration) -> str:
    record = {"input": item.input, "output": item.output, "options": item.options}
    if item.references:
        record["references"] = item.references
    return json.dumps(record, ensure_ascii=False) + "\n"
