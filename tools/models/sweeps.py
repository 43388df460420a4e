"""Work on many model classes, each in a process of its own, since one may crash or hang; and the tables of results."""

from __future__ import annotations

import json
import multiprocessing
import queue
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from ctkernels.tuning.storage import atomic_write_bytes

Item = TypeVar("Item")


def each_in_a_process(
    work: Callable[[Item], dict[str, Any]], items: Iterable[Item], seconds: float
) -> Iterator[tuple[Item, dict[str, Any] | None]]:
    """Each item with `work(item)`, in their order; None where nothing came within `seconds`."""
    context = multiprocessing.get_context("fork")
    for item in items:
        answers = context.Queue()
        process = context.Process(target=_answer, args=(answers, work, item))
        process.start()
        try:
            result = answers.get(timeout=seconds)
        except queue.Empty:
            result = None
        process.join(1)
        process.kill()
        yield item, result


def _answer(answers: Any, work: Callable[[Item], dict[str, Any]], item: Item) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    answers.put(work(item))


def write_table(path: Path, head: Mapping[str, Any], name: str, rows: Mapping[str, Any]) -> None:
    """The JSON object `{**head, name: rows}`, one line for each of `rows`."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
    start = json.dumps({**head, name: {}})[:-2]
    atomic_write_bytes(path, f"{start}\n{lines}\n}}}}\n".encode())
