"""NLP-LR: the low-resource classification and question-answering tasks of MetaICL (Min et al., arXiv 2110.15943).

    FOLDER/TASK/TASK_16_SEED_{train,dev,test}.jsonl        fields input, output, options

The seed selects the files. Fewer than 16 demonstrations are drawn from the 16, by class where there are classes; more
are read from files of that number (`TASK_32_SEED_...`). The score is macro-F1 if all items have the same options,
otherwise accuracy.
"""

from __future__ import annotations

from pathlib import Path

from ctkernels.tuning.data.demonstrations import load_metaicl
from ctkernels.tuning.data.suites.base import Suite, SuiteOptions, Task, draw

SHOTS = 16


def list_tasks(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and any(p.glob(f"{p.name}_*_*_*.jsonl")))


def load_task(folder: Path, name: str, seed: int, options: SuiteOptions) -> Task:
    shots = options.shots or SHOTS
    splits = [load_metaicl(folder, name, seed, split, max(shots, SHOTS)) for split in ("train", "dev", "test")]
    train, validation, test = map(tuple, splits)
    if shots < SHOTS:
        (train, _) = draw(train, seed, shots, by_class=True)
    return Task(name, train, validation, test)


NLP_LR = Suite(
    "nlp_lr",
    "TASK/TASK_16_SEED_{train,dev,test}.jsonl, as MetaICL writes them",
    list_tasks,
    load_task,
    shots=f"{SHOTS}, named by the seed",
    score="macro-F1 where all items share their options, else accuracy",
    source="https://github.com/facebookresearch/MetaICL",
)
