"""Demonstrations that are held out of training, to choose an epoch and settings by them.

A row under leave-one-out does not see its own demonstration, but its loss is what training minimises: it validates
nothing. Pairs that no row trains do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import torch

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.suites.base import stratified
from ctkernels.tuning.evaluation.scoring import Scorer
from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.methods.base import Method, Run

Holdout = int | Literal["auto"]
FOLDS = 3  # parts of few demonstrations, each of which is held out once
FEW = 32  # up to so many demonstrations
MOST = 64  # largest number that "auto" holds out of more than that
Fold = tuple[tuple[Demonstration, ...], tuple[Demonstration, ...]]  # trained, held out


def held_out_loss(run: Run[Any], adapter: Adapter, items: Sequence[Demonstration]) -> float:
    """Of items that all have options, the mean of -log of the right options' probability, normalised over options;
    else the mean cross-entropy of the outputs' tokens. In nats."""
    settings = run.settings
    if all(item.options for item in items):
        common = {"by": "options", "calibrate": "none", "score": settings.score, "backend": settings.backend}
        found = adapter.evaluate(run.model, run.tokenizer, items, max_tokens=settings.max_tokens, **common)
        assert found.nll is not None  # of items with options
        return found.nll
    encoder = adapter.encoder(run.tokenizer, model=run.model)
    scorer = Scorer(run.model, encoder, adapter.prefix, settings.max_tokens, settings.backend)
    with torch.no_grad(), frozen(run.model), adapter.weights(run.model):
        return fmean(scorer.output_losses(items))


def require_epochs(method: Method, held_out: Sequence[Demonstration], patience: int | None) -> None:
    """Refuse held-out pairs of a method without epochs to choose from, and a patience without pairs. Raises
    ValueError."""
    if held_out and method.trains == "nothing":
        raise ValueError(f"held_out chooses among epochs, and {method.name} trains nothing")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, or None, got {patience}")
    if patience is not None and not held_out:
        raise ValueError("patience counts epochs by the loss of held-out pairs, and held_out is empty")


def folds(demonstrations: Sequence[Demonstration], holdout: Holdout, seed: int) -> list[Fold]:
    """Ways to hold out a part of the demonstrations, drawn by class where all share their options.

    holdout: a number, held out in one way. "auto": up to 32 demonstrations are dealt into three parts, each of which is
        held out once; of more, a quarter, at most 64, is held out in one way.

    Raises:
        DataError: fewer than three demonstrations, or a number that does not leave two of them to train.
    """
    count = len(demonstrations)
    if count < 3:
        raise DataError(f"holdout needs at least 3 demonstrations, two to train and one to hold out, got {count}")
    if holdout == "auto" and count <= FEW:
        dealt = _dealt(demonstrations, min(FOLDS, count), seed)
    else:
        size = min(MOST, count // 4) if holdout == "auto" else holdout
        if not 1 <= size <= count - 2:
            raise DataError(
                f"holdout must be 'auto' or from 1 to {count - 2}, so that two of the {count} demonstrations are "
                f"trained, got {size}"
            )
        order = _shuffled(count, seed)
        dealt = [{order[place] for place in stratified([demonstrations[index] for index in order], size)}]
    return [
        (
            tuple(pair for index, pair in enumerate(demonstrations) if index not in out),
            tuple(pair for index, pair in enumerate(demonstrations) if index in out),
        )
        for out in dealt
    ]


def _dealt(demonstrations: Sequence[Demonstration], parts: int, seed: int) -> list[set[int]]:
    """Indices of each of some parts: those of a class are dealt one after the other."""
    order = _shuffled(len(demonstrations), seed)
    order.sort(key=lambda index: demonstrations[index].output if demonstrations[index].options else "")
    return [set(order[part::parts]) for part in range(parts)]


def _shuffled(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)
