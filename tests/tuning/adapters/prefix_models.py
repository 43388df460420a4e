"""A PrefixModel of a tiny model, and the rows that it is trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_model import PrefixModel
from ctkernels.tuning.data.formats import encode_rows
from tests.tuning.runs import TOKENIZER

COLLATE = DataCollatorForSeq2Seq(TOKENIZER)


def rows() -> list[dict[str, Any]]:
    """The demonstrations as the dataset that Trainer takes."""
    return [row.example() for row in encode_rows(TOKENIZER, DEMONSTRATIONS)]


def batch(*indices: int) -> dict[str, Tensor]:
    """Some of them, or all, padded on the right."""
    return dict(COLLATE([row for i, row in enumerate(rows()) if not indices or i in indices]))


def make_prefix(model) -> KVPrefix:
    return KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)


def prefix_model(
    name: str = "llama", dtype: torch.dtype = torch.float32, drop_p: float = 0.0, **changes
) -> PrefixModel:
    model = make_model(name, dtype, **changes)
    return PrefixModel(model, make_prefix(model), drop_p)


def values(model: PrefixModel | KVPrefix) -> list[Tensor]:
    """Copies of all trained values."""
    return [p.detach().clone() for p in model.parameters()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))
