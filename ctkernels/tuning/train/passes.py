"""The passes of a step: rows of one learner, or of several, through the model and back.

    rows of step 0   a b c        micro-batch 0   a b c d      forward -> losses -> sum over rows of loss / rows of
    rows of step 1   d e          micro-batch 1   e                       the row's own step -> backward

Rows run packed back to back (or right-padded) in micro-batches of at most `max_tokens` tokens. A row's loss is divided
by the number of rows of its step, so that loss and gradient do not depend on how rows are split, on the steps that run
beside it, nor on how many processes share the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctkernels.tuning.data.batches import Batch, Layout, make_batch, split_by_tokens
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.hf.continuations import passes
from ctkernels.tuning.objectives import Forward, Weights
from ctkernels.tuning.train.distributed import Ranks
from ctkernels.tuning.train.options import LoopOptions

Place = tuple[int, int]  # a step, and one of its rows


@dataclass(frozen=True)
class Step:
    """What one optimiser step of a learner takes.

    rows: of its epoch.  indices: those of this step.  seed: of what is drawn.
    """

    rows: Sequence[Row]
    indices: Sequence[int]
    seed: int

    @property
    def labels_per_row(self) -> float:
        """Mean number of answer tokens."""
        return sum(len(self.rows[i].answers[0]) for i in self.indices) / len(self.indices)


@dataclass(frozen=True)
class Pass:
    """Rows that run together.

    batch: theirs.  owners: the number of the step of each, which never decreases.
    factors: of the answers' loss of each, fp64 `[B]`.  shares: of each loss in what is minimised, fp64 `[B]`.
    weight: of the losses in their sum; 0 for a row that is repeated.  count: `Forward.passes`.
    """

    batch: Batch
    owners: tuple[int, ...]
    factors: Tensor
    shares: Tensor
    weight: float = 1.0
    count: int = 1

    def to(self, device: torch.device) -> Pass:
        """The same rows on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("batch", "factors", "shares")}
        return replace(self, **moved)


def layout_of(settings: LoopOptions) -> Layout:
    """How the rows of a batch lie: objectives that read options continue padded rows."""
    return settings.layout if settings.minimised.choices == "none" else "padded"


def add_gradients(
    steps: Sequence[Step],
    settings: LoopOptions,
    forward: Callable[[Batch, Sequence[int]], Forward],
    ranks: Ranks,
    device: torch.device,
    lead: int = 0,
    together: bool = False,
) -> Tensor:
    """Add the gradients of this process's rows to those of each step's mean loss.

    settings: of the objective, and how rows are batched, for all steps alike.
    forward: makes a batch ready to run, given the number of the step of each of its rows, which never decreases.
    lead, together: as in `make_passes`.

    Returns the sum of the losses of each step's rows of this process, fp64 `[len(steps)]`.
    """
    made = (each.to(device) for each in make_passes(steps, settings, ranks, lead, together))
    return run_passes(made, len(steps), settings, forward, device)


def make_passes(
    steps: Sequence[Step], settings: LoopOptions, ranks: Ranks, lead: int = 0, together: bool = False
) -> Iterator[Pass]:
    """The passes of this process for a step of each learner, on the CPU.

    lead: soft prompt positions in front of each row.
    together: whether the processes share the weights of the model, whose every pass all of them then have to make.
    """
    layout, objective = layout_of(settings), settings.minimised
    for at_once in zip(*_micro_batches(steps, settings, layout, lead, ranks), strict=True):
        places, weight = at_once[ranks.rank]
        owners, indices = zip(*places, strict=True)
        batch = replace(_batch(steps, places, layout, lead), row_ids=torch.tensor(indices))
        count = 1
        if together and objective.choices != "none":
            count = max(passes(_batch(steps, of_rank, layout, lead)) for of_rank, _ in at_once)
        factors = torch.ones(len(places), dtype=torch.float64)
        if settings.reduction == "tokens":
            per_row = torch.tensor([steps[step].labels_per_row for step in owners], dtype=torch.float64)
            factors = torch.tensor(batch.answer_sizes).to(factors) / per_row
        shares = torch.tensor([weight / len(steps[step].indices) for step in owners], dtype=torch.float64)
        yield Pass(batch, owners, factors, shares, weight, count)


def run_passes(
    made: Iterable[Pass],
    count: int,
    settings: LoopOptions,
    forward: Callable[[Batch, Sequence[int]], Forward],
    device: torch.device,
) -> Tensor:
    """Run passes on `device`, forward and backward; returns as `add_gradients` does, for `count` steps."""
    total = torch.zeros(count, dtype=torch.float64, device=device)
    for each in made:
        weights = Weights(settings.score, settings.mixed, each.factors)
        losses = settings.minimised.losses(replace(forward(each.batch, each.owners), passes=each.count), weights)
        (losses * each.shares.to(losses)).sum().backward()
        counts = [each.owners.count(step) for step in range(count)]
        total += each.weight * torch.stack([part.sum() for part in losses.detach().double().split(counts)])
    return total


def _batch(steps: Sequence[Step], places: Sequence[Place], layout: Layout, lead: int) -> Batch:
    return make_batch([steps[step].rows[i] for step, i in places], range(len(places)), layout, lead)


def _micro_batches(
    steps: Sequence[Step], settings: LoopOptions, layout: Layout, lead: int, ranks: Ranks
) -> list[list[tuple[list[Place], float]]]:
    """The rows of the micro-batches of each process, and the weight of their losses.

    All processes run equally many, since a sharded model's forward pass is a collective call: one with fewer of its own
    repeats a row with weight 0.
    """
    places = [(number, i) for number, step in enumerate(steps) for i in step.indices]
    batches = []
    for rank in range(ranks.size):
        share = ranks.share(places, rank)
        chosen = [steps[number].rows[i] for number, i in share]
        groups = split_by_tokens(chosen, settings.max_tokens, layout, lead)
        batches.append([([share[at] for at in group], 1.0) for group in groups])
    most = max(map(len, batches))
    return [of_rank + [([places[0]], 0.0)] * (most - len(of_rank)) for of_rank in batches]
