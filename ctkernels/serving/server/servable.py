"""Which models can be served in a batch whose rows have different lengths: those for which it is proved at the start.

A tiny random instance of the model's class and configuration, in fp64, continues rows that join and leave behind three
prefixes. Every logit must be that of the stock model on the row's whole sequence (see `hf.proof`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctkernels.serving.server.batch import Batch
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.proof import EQUAL, Bench, Prefix, difference
from ctkernels.tuning.hf.served import in_a_line, trusting
from ctkernels.tuning.hf.tiny import make_tiny, shrink

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_servable(model: PreTrainedModel) -> None:
    """Refuse a model that rows of different prefixes and lengths cannot share.

    Raises:
        TypeError: as `find_decoder`; or such a class, named with the reason.
    """
    decoder = find_decoder(model)
    name = type(decoder.model).__name__
    if decoder.keepers:
        kinds = ", ".join(dict.fromkeys(type(keeper).__name__ for keeper in decoder.keepers))
        raise TypeError(f"{name} cannot be served: its layers keep a state ({kinds}), which the batch has no slots for")
    try:
        with full_precision(), torch.device("cpu"), trusting(), torch.no_grad():
            found = _difference(Bench(make_tiny(type(decoder.model), shrink(decoder.model.config))))
    except Exception as error:  # of whatever the class may check
        raise TypeError(f"{name} cannot be served: a tiny instance fails in a batch: {in_a_line(error)}") from error
    if not found <= EQUAL:
        raise TypeError(f"{name} cannot be served: in a batch its results differ by {found:.1g} from those alone")


def _difference(bench: Bench) -> float:
    """The largest one of any token's logits between a changing batch and the stock model."""
    contexts = [bench.context, bench.context[:5], bench.context[:0]]
    rows = [bench.rows[1], bench.rows[1].flip(0), bench.tokens(len(bench.rows[1]))]
    expected = [_logits(bench, context, row) for context, row in zip(contexts, rows, strict=True)]
    batch, worst = Batch(bench.model, size=3), 0.0
    members: list[int] = []  # number of each row of the batch
    done = [0, 0, 0]  # tokens of each

    def compare(numbers: list[int], logits: Tensor) -> None:
        nonlocal worst
        actual = [expected[number][done[number] - 1] for number in numbers]
        worst = max(worst, difference([logits], [torch.stack(actual)]))

    def join(numbers: list[int], lengths: list[int]) -> None:
        prompts = [rows[number][:length].tolist() for number, length in zip(numbers, lengths, strict=True)]
        logits = batch.join(prompts, [prefixes[number] for number in numbers])
        for number, length in zip(numbers, lengths, strict=True):
            done[number] = length
        members.extend(numbers)
        compare(numbers, logits)

    def steps(count: int) -> None:
        for _ in range(count):
            logits = batch.step([int(rows[number][done[number]]) for number in members])
            for number in members:
                done[number] += 1
            compare(members, logits)

    prefixes = [Prefix(bench.decoder, context) for context in contexts]
    join([0], [4])
    steps(2)
    join([1, 2], [1, 6])
    steps(2)
    batch.leave(0)
    members[:] = [2, 1]
    steps(2)
    batch.close()
    return worst


def _logits(bench: Bench, context: Tensor, row: Tensor) -> Tensor:
    return bench.model(torch.cat((context, row))[None]).logits[0, len(context) :]
