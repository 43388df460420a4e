"""MMLU (Hendrycks et al., arXiv 2009.03300): four choices, answered by their letter.

    FOLDER/{dev,val,test}/SUBJECT_{dev,val,test}.csv    question, four choices, answer (0-3 or A-D), header or not

The items of `dev` (5) and `val`, if there are any, become demonstrations, and validation items beyond 16. The seed
draws from `test` what is missing for 16 demonstrations and 20 validation items; those are not test items. With `shots`,
demonstrations are drawn from all of these by the letters of their answers.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.suites.base import Suite, SuiteOptions, Task, draw

SHOTS = 16
VALIDATION = 20
LETTERS = ("A", "B", "C", "D")
UNCUT = 1 << 20  # more tokens than any item has


def list_tasks(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix("_test.csv") for p in folder.glob("test/*_test.csv"))


def load_task(folder: Path, name: str, seed: int, options: SuiteOptions) -> Task:
    shots = options.shots or SHOTS
    others = [folder / split / f"{name}_{split}.csv" for split in ("dev", "val")]
    reserved = [item for path in others if path.is_file() for item in read_csv(path)]
    tested = read_csv(folder / "test" / f"{name}_test.csv")
    missing = max(0, shots + VALIDATION - len(reserved))
    if missing >= len(tested):
        raise DataError(f"{name}: {len(tested)} test items are too few to draw {missing} of them and test the others")
    borrowed, test = draw(tested, seed, missing)
    if options.shots is not None:
        train, validation, _ = draw((*reserved, *borrowed), seed, shots, VALIDATION, by_class=True)
        return Task(name, train, validation, test, "accuracy", "options", TextFormat(max_pair_tokens=UNCUT))
    train = tuple(reserved[:shots])
    rest = (*reserved[shots:], *borrowed)
    needed = shots - len(train)
    # in random order: otherwise the position of a demonstration would tell where it comes from
    (train, _) = draw((*train, *rest[:needed]), seed, shots)
    validation = rest[needed : needed + VALIDATION]
    return Task(name, train, validation, test, "accuracy", "options", TextFormat(max_pair_tokens=UNCUT))


def read_csv(path: Path) -> list[Demonstration]:
    """The items of a file.

    Raises:
        DataError: the file cannot be read, or a row is unusable: `FILE:LINE: why`.
    """
    items = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if reader.line_num == 1 and row[-1:] == ["answer"]:
                    continue
                items.append(_item(row, f"{path}:{reader.line_num}"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not CSV in UTF-8: {error}") from None
    if not items:
        raise DataError(f"{path}: the file holds no item")
    return items


def _item(row: list[str], source: str) -> Demonstration:
    if len(row) != 6:
        raise DataError(f"{source}: expected question, four choices and answer, got {len(row)} columns")
    question, *choices, answer = row
    answers = {**dict(zip("0123", LETTERS, strict=True)), **dict(zip(LETTERS, LETTERS, strict=True))}
    if answer.strip() not in answers:
        raise DataError(f"{source}: the answer must be 0 to 3 or A to D, got {answer!r}")
    if not question.strip():
        raise DataError(f"{source}: the question must not be blank")
    lines = [question.strip(), *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True)), "Answer:"]
    return Demonstration("\n".join(lines), answers[answer.strip()], LETTERS, source)


MMLU = Suite(
    "mmlu",
    "{dev,val,test}/SUBJECT_{dev,val,test}.csv",
    list_tasks,
    load_task,
    shots=f"{SHOTS}: `dev`, `val`, then test items that are not scored",
    score="accuracy",
    source="https://github.com/hendrycks/test",
)
