"""Tasks of one's own in JSONL, as two suites: `jsonl`, and `generation`.

    FOLDER/TASK/{train,dev,test}.jsonl       fields input, output, perhaps options or references; dev is optional

A folder with a train.jsonl in it is one task. `shots` demonstrations are drawn by the seed, by class where all lines
share their options; without `shots` all lines of train.jsonl are used, in their order. In `generation` an answer ends
with its line, and the score is corpus BLEU (sacrebleu) against `output` and the further `references`; exact match is
reported, too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ctkernels.tuning.data.demonstrations import DataError, load_jsonl
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.suites.base import Suite, SuiteOptions, Task, draw


def list_tasks(folder: Path) -> list[str]:
    if (folder / "train.jsonl").is_file():
        return [folder.resolve().name]
    return sorted(p.parent.name for p in folder.glob("*/train.jsonl"))


def load_task(folder: Path, name: str, seed: int, options: SuiteOptions, *, generation: bool = False) -> Task:
    home = folder / name if (folder / name / "train.jsonl").is_file() else folder
    train, test = (tuple(load_jsonl(home / f"{split}.jsonl")) for split in ("train", "test"))
    validation = tuple(load_jsonl(home / "dev.jsonl")) if (home / "dev.jsonl").is_file() else ()
    if options.shots is not None:
        if options.shots > len(train):
            raise DataError(f"{home / 'train.jsonl'}: {len(train)} demonstrations, fewer than {options.shots} shots")
        train, _ = draw(train, seed, options.shots, by_class=True)
    if not generation:
        return Task(name, train, validation, test)
    return Task(name, train, validation, test, "bleu", "generation", TextFormat("\n"), max_new_tokens=64)


JSONL = Suite("jsonl", "TASK/{train,dev,test}.jsonl", list_tasks, load_task)
GENERATION = Suite(
    "generation",
    "TASK/{train,dev,test}.jsonl of input and output",
    list_tasks,
    partial(load_task, generation=True),
    score="BLEU (sacrebleu); exact match beside",
)
