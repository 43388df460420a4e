"""BIG-Bench Hard (Suzgun et al., arXiv 2210.09261).

    FOLDER/TASK.json        {"examples": [{"input": ..., "target": ...}, ...]}

The seed draws 10 demonstrations and 20 validation items (with `shots`: demonstrations by class where all items share
their options); all others are test items. Options are read from the text:
`(A) ...` is chosen by its letter, `- Yes` by its text. If no options are listed, a task with two different answers is a
choice between them, and any other task is generated up to the end of the line. Inputs are never cut: the question is at
their end.

With `preset` "bbh" the text is the paper's: an instruction, what the task is and how to answer, then `Q: ...`, `A: ...`
with an empty line between pairs. What the task is comes from cot-prompts/TASK.txt of the published distribution, in the
folder or beside it, where it is there, and from `DESCRIPTIONS` otherwise.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from ctkernels.tuning.data.demonstrations import DataError, Demonstration, parse_demonstration
from ctkernels.tuning.data.formats import TextFormat
from ctkernels.tuning.data.suites.base import Suite, SuiteOptions, Task, draw

SHOTS = 10
VALIDATION = 20
UNCUT = 1 << 20  # more tokens than any item has
TEMPLATE = "Q: {input}\nA: {output}"
DESCRIPTIONS = {  # in words of our own
    "boolean_expressions": "Work out whether a Boolean expression is true or false.",
    "causal_judgement": "Judge what a person would say about the cause of an event.",
    "date_understanding": "Find a date from what a text says about other days.",
    "disambiguation_qa": "Say whom a pronoun refers to, or that it could be several people.",
    "dyck_languages": "Close all brackets that are still open, in the right order.",
    "formal_fallacies": "Decide whether an argument follows from its premises alone.",
    "geometric_shapes": "Name the shape that an SVG path draws.",
    "hyperbaton": "Choose the sentence whose adjectives are in the usual order.",
    "logical_deduction": "Find the order of some objects from clues about them.",
    "movie_recommendation": "Choose the film that is most like some other films.",
    "multistep_arithmetic_two": "Compute the value of an arithmetic expression.",
    "navigate": "Decide whether some steps lead back to where they begin.",
    "object_counting": "Count the objects of a kind in a list.",
    "penguins_in_a_table": "Answer a question about a table of penguins.",
    "reasoning_about_colored_objects": "Answer a question about objects and their colours.",
    "ruin_names": "Choose the change of a name that is funny.",
    "salient_translation_error_detection": "Name the kind of mistake in a translation from German.",
    "snarks": "Choose the statement that is sarcastic.",
    "sports_understanding": "Decide whether a sentence about sports is plausible.",
    "temporal_sequences": "Find the time at which a person could have been somewhere.",
    "tracking_shuffled_objects": "Follow who has which object while people swap them.",
    "web_of_lies": "Decide whether a person tells the truth from what others say.",
    "word_sorting": "Sort words by the alphabet.",
}


def list_tasks(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.json"))


def load_task(folder: Path, name: str, seed: int, options: SuiteOptions) -> Task:
    items = read_examples(folder / f"{name}.json")
    shots = options.shots or SHOTS
    if len(items) <= shots + VALIDATION:
        raise DataError(f"{name}: {len(items)} examples are too few for {shots} demonstrations and {VALIDATION} others")
    train, validation, test = draw(items, seed, shots, VALIDATION, by_class=options.shots is not None)
    text_format = TextFormat(max_pair_tokens=UNCUT)
    if not items[0].options:
        text_format = TextFormat("\n", max_pair_tokens=UNCUT)  # an answer may have several words
    if options.preset == "bbh":
        text_format = TextFormat("\n\n", UNCUT, instruction=instruction(folder, name, items[0]), template=TEMPLATE)
    if items[0].options:
        return Task(name, train, validation, test, "accuracy", "options", text_format)
    return Task(name, train, validation, test, "exact_match", "generation", text_format, max_new_tokens=48)


def read_examples(path: Path) -> list[Demonstration]:
    """The examples of a task. All have options, or none has.

    One published example has an answer that is not among its options, and another one has a single option. Such
    examples are left out, with a warning that names them.
    """
    records = _read(path)
    listed = [listed_options(record.input) for record in records]
    answers = sorted({record.output for record in records})
    kept, broken = [], []
    for record, options in zip(records, listed, strict=True):
        if not any(listed):
            options = tuple(answers) if len(answers) == 2 else ()
        elif len(options) < 2 or record.output not in options:
            broken.append(record.source)
            continue
        kept.append(Demonstration(record.input, record.output, options or None, record.source))
    if broken:
        shown = ", ".join(str(source) for source in broken[:3]) + (", ..." if len(broken) > 3 else "")
        warnings.warn(f"left out, because the answer is not one of at least two options: {shown}", stacklevel=2)
    return kept


def listed_options(text: str) -> tuple[str, ...]:
    """The options at the end of an input, `(A)` for `(A) ...` and `Yes` for `- Yes`; empty without a list."""
    _, found, lines = text.rpartition("\nOptions:\n")
    if not found:
        return ()
    letters = re.findall(r"^(\([A-Z]\))", lines, re.MULTILINE)
    return tuple(letters or (line[2:].strip() for line in lines.splitlines() if line.startswith("- ")))


def instruction(folder: Path, name: str, item: Demonstration) -> str:
    """What a task is, and how to answer it.

    Raises:
        DataError: a prompt file of another form than the published ones.
    """
    how = "Write the answer alone."
    if item.options and item.options[0].startswith("("):
        how = "Write the letter of the answer alone, such as (A)."
    elif item.options:
        how = f"Write {' or '.join(item.options)} alone."
    for path in (folder / "cot-prompts" / f"{name}.txt", folder.parent / "cot-prompts" / f"{name}.txt"):
        if path.is_file():
            _, rule, text = path.read_text(encoding="utf-8").partition("\n-----\n")
            described = text.strip().partition("\n")[0]
            if not rule or not described:
                raise DataError(f"{path}: expected a line of dashes, and below it what the task is")
            return f"{described} {how}"
    described = next((text for start, text in DESCRIPTIONS.items() if name.startswith(start)), "")
    return f"{described} {how}".strip()


def _read(path: Path) -> list[Demonstration]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # of JSON, and of UTF-8
        raise DataError(f"{path}: not JSON: {error}") from None
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, list) or not examples:
        raise DataError(f'{path}: expected {{"examples": [...]}} with at least one example')
    items = []
    for number, example in enumerate(examples, start=1):
        source = f"{path}: example {number}"
        if isinstance(example, dict) and "target" in example:
            example = {"input": example.get("input"), "output": _stripped(example["target"])}
        items.append(parse_demonstration(example, source))
    return items


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


BBH = Suite(
    "bbh",
    "TASK.json with examples of input and target",
    list_tasks,
    load_task,
    shots=f"{SHOTS}, drawn by the seed",
    score="accuracy; exact match where no options are listed",
    source="https://github.com/suzgunmirac/BIG-Bench-Hard",
)
