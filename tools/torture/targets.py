"""Every kind of file that the package writes, as something that is saved with a number and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctkernels.tuning import Adapter, KVPrefix, PrefixStore, export_peft, import_peft
from ctkernels.tuning.adapters.file import Saved, write_folder
from ctkernels.tuning.evaluation.sweep.cells import CellResult, read_cell
from ctkernels.tuning.train.checkpoint import Checkpoint


class OtherValues(Exception):
    """A file was read whose values were never saved together."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    save(folder, number): writes the version of this number.  load(folder): the number of the version that lies there;
    raises what its kind raises for a file that cannot be used.  checked: whether a damaged byte is always found.
    """

    name: str
    save: Callable[[Path, int], object]
    load: Callable[[Path], int]
    checked: bool = True


def targets(prefix: KVPrefix, model: Any) -> list[Target]:
    """Adapter, checkpoint, entry of a store, with and without mapping, cell of a sweep, adapter in peft's format."""
    description, tensors = prefix.parts()
    parameter = torch.nn.Parameter(torch.zeros(3000))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)

    def filled(number: int) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(x, number) for name, x in tensors.items()}

    def of(number: int) -> KVPrefix:
        return KVPrefix.from_parts(Saved(Path("memory"), json.loads(json.dumps(description)), filled(number)))

    def save_checkpoint(folder: Path, number: int) -> None:
        with torch.no_grad():
            parameter.fill_(number)
        Checkpoint(folder, {"lr": 1}).save({"p": parameter}, optimizer, [{"epoch": number}])

    def load_checkpoint(folder: Path) -> int:
        (record,) = Checkpoint(folder, {"lr": 1}).load({"p": parameter}, optimizer)
        if not torch.equal(parameter, torch.full_like(parameter, record["epoch"])):
            raise OtherValues("a checkpoint of two epochs")
        return int(record["epoch"])

    def load_cell(folder: Path) -> int:
        found = read_cell(folder / "13.json")
        if found is None:
            raise FileNotFoundError(folder / "13.json")
        return found.seed

    def store(folder: Path, **options: bool) -> PrefixStore:
        return PrefixStore(folder, model, **options)

    def cell(number: int) -> CellResult:
        return CellResult("task", "icl", number, {}, predictions=["x" * 50] * 100)

    return [
        Target(
            "adapter",
            lambda folder, number: write_folder(folder, description, filled(number), with_card=True),
            lambda folder: number_of(Adapter.from_pretrained(folder).prefix),
        ),
        Target("checkpoint", save_checkpoint, load_checkpoint),
        Target(
            "store",
            lambda folder, number: store(folder).put("a/b", of(number)),
            lambda folder: number_of(store(folder).get("a/b")),
        ),
        Target(
            "mapped store",
            lambda folder, number: store(folder).put("a/b", of(number)),
            lambda folder: number_of(store(folder, mapped=True).get("a/b")),
        ),
        Target("cell", lambda folder, number: cell(number).write(folder / "13.json"), load_cell, checked=False),
        Target(
            "peft",
            lambda folder, number: export_peft(of(number), folder),
            lambda folder: number_of(import_peft(folder, model).prefix),
            checked=False,
        ),
    ]


def number_of(prefix: KVPrefix) -> int:
    """The one number that all values of a prefix are."""
    numbers = {x for p in prefix.parameters() for x in p.detach().unique().tolist()}
    if len(numbers) != 1:
        raise OtherValues(f"{len(numbers)} numbers in one prefix")
    return int(numbers.pop())
