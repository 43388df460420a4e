"""Several prefixes in training side by side, over one frozen model:

    until all trainings are done:
        those that wait join, in order, while what is in training fits into `memory_bytes`
        a step of each: the rows of all of them in common passes (`passes.py`), a gradient for every prefix
        every training takes its own gradient: clipping, AdamW, learning rate, epoch, held-out items, checkpoint
        those that are done, or have failed, leave

A row sees its own prefix alone, and all that is drawn for it depends on its own training: each prefix comes to be what
it would be alone, up to the order of sums. A training whose objective or batches differ from the others' runs in passes
of its own, as does one whose loss or gradient is not finite in a common pass: so it fails only by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.train.learners import PrefixLearner, PrefixLearners
from ctkernels.tuning.train.passes import add_gradients
from ctkernels.tuning.train.trainer import Interrupted, Training, TrainingError, losses_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Start = Callable[[], Training]
SHARED = ("objective", "score", "mixed", "reduction", "layout", "max_tokens", "backend")  # settings of a common pass


def train_together(
    model: PreTrainedModel, starts: Mapping[str, Start], memory_bytes: int
) -> Iterator[tuple[str, Training | Exception]]:
    """Train prefixes of one model, and yield each by its name when it is done, or the error with which it failed.

    starts: make the trainings, whose learners are `PrefixLearner`s; each is called when its turn comes, the next one
        while it waits for memory.
    memory_bytes: bound of `memory`, for what is in training at once; one training may exceed it, alone.

    Raises:
        Interrupted: trainings ended behind an epoch and a checkpoint, as `RunControl.ends` asked them to; those that
            were waiting have not begun.
    """
    begun, interrupted = _begun(starts), False
    active: dict[str, Training] = {}
    with frozen(model):
        ready = next(begun, None)
        while ready or active:
            while ready:
                name, training = ready
                if isinstance(training, Exception) or training.done:  # by its checkpoint, or without epochs
                    yield ready
                elif active and memory([*active.values(), training]) > memory_bytes:
                    break
                else:
                    active[name] = training
                ready = next(begun, None)
            for name, error in [failed for group in _alike(active) for failed in _step(model, group).items()]:
                del active[name]
                yield name, error.with_traceback(None)  # whose frames hold all trainings of the group
            for name, training in [entry for entry in active.items() if entry[1].epoch_over]:
                outcome: Training | Exception = training
                try:
                    training.end_epoch()
                    if not training.done:
                        continue
                except Interrupted:
                    interrupted, begun, ready = True, iter(()), None
                    del active[name]
                    continue
                except Exception as error:
                    outcome = error
                del active[name]
                yield name, outcome
    if interrupted:
        raise Interrupted


def _begun(starts: Mapping[str, Start]) -> Iterator[tuple[str, Training | Exception]]:
    """The trainings, each begun when it is asked for, or the error of one that could not."""
    for name, start in starts.items():
        try:
            training = start()
            training.begin()
        except Exception as error:
            yield name, error
        else:
            yield name, training


def memory(trainings: Sequence[Training]) -> int:
    """Bytes that trainings take beside the activations of a micro-batch: values, gradients and two moments of each,
    what else they keep, and all prefixes side by side with their gradient."""
    own = sum(training.bytes for training in trainings)
    prefixes = (_learner(training).prefix.parameters() for training in trainings)
    longest = max(sum(x.nbytes for x in tensors) for tensors in prefixes)
    return own + (2 * len(trainings) * longest if len(trainings) > 1 else 0)


def _alike(trainings: Mapping[str, Training]) -> list[dict[str, Training]]:
    """The trainings whose passes may be common ones."""
    groups: dict[tuple[object, ...], dict[str, Training]] = {}
    for name, training in trainings.items():
        groups.setdefault(tuple(getattr(training.settings, x) for x in SHARED), {})[name] = training
    return list(groups.values())


def _step(model: PreTrainedModel, group: Mapping[str, Training]) -> dict[str, Exception]:
    """One optimiser step of trainings whose passes are common. Returns the errors of those that failed.

    If the passes fail, each half of the group runs by itself.
    """
    failed: dict[str, Exception] = {}
    try:
        losses, failure = _losses(model, list(group.values())), ""
    except Exception as error:
        if len(group) == 1:
            return dict.fromkeys(group, error)
        failure = f"{type(error).__name__}: {error}"  # not the error, which holds the tensors of the pass
    if failure:
        names, half = list(group), len(group) // 2
        for part in (names[:half], names[half:]):
            failed |= _step(model, {name: group[name] for name in part})
        if not failed:
            warnings.warn(
                f"{len(group)} prefixes could not run in one pass and ran in halves ({failure}); lower memory_bytes or "
                "max_tokens",
                stacklevel=2,
            )
        return failed
    for (name, training), loss in zip(group.items(), losses, strict=True):
        try:
            training.take(loss)
        except TrainingError as error:
            failed |= {name: error} if len(group) == 1 else _step(model, {name: training})
        except Exception as error:
            failed[name] = error
    return failed


def _losses(model: PreTrainedModel, trainings: Sequence[Training]) -> Sequence[Tensor]:
    """Run the passes of the next step of each; the sums of the losses of their rows."""
    settings, ranks = trainings[0].settings, trainings[0].run.ranks
    if len(trainings) == 1:
        with trainings[0].learner.attached(settings.backend):
            return [losses_of(trainings[0])]
    steps = [training.next_step() for training in trainings]
    learners = PrefixLearners([_learner(training) for training in trainings])
    with learners.attached(settings.backend):
        forward = partial(learners.forward, seeds=[step.seed for step in steps])
        return list(add_gradients(steps, settings, forward, ranks, model.device))


def _learner(training: Training) -> PrefixLearner:
    assert isinstance(training.learner, PrefixLearner)
    return training.learner
