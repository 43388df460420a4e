"""`train_learner`: a training from its begin to its end, its steps as CUDA graphs if they can be."""

from __future__ import annotations

from ctkernels.tuning.hf.forward import frozen
from ctkernels.tuning.train.graphs import CapturedSteps, captured_steps
from ctkernels.tuning.train.trainer import EpochRecord, Training, losses_of


def train_learner(training: Training) -> list[EpochRecord]:
    """Run a training that has not begun. Returns the history; errors as in `methods.tune`."""
    steps = captured_steps(training)
    with frozen(training.model, but=training.parameters.values()):
        training.begin()
        while not training.done:
            run_epoch(training, steps)
    return training.end()


def run_epoch(training: Training, steps: CapturedSteps | None) -> None:
    """The next epoch of a training that has begun. `steps` takes its steps; None: it takes them itself."""
    with training.learner.attached(training.settings.backend) if steps is None else steps.running():
        while not training.epoch_over:
            if steps is None:
                training.take(losses_of(training))
            else:
                steps.take()
    training.end_epoch()
