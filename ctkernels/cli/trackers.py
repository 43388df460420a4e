"""`--log-with`: the epochs of a run in TensorBoard or Weights & Biases, by accelerate's trackers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctkernels.cli.parse import FailedRun, UsageError
from ctkernels.tuning.evaluation.sweep.spec import split_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctkernels.tuning.train.trainer import EpochRecord

    Log = Callable[[EpochRecord, int], None]

# name -> the packages that write it, of which one is enough
PACKAGES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",)}
VALUES = ("loss", "lr", "grad_norm", "held_out", "seconds")  # of a record


def checked(words: tuple[str, ...]) -> list[str]:
    """The trackers of some words, apart or joined by commas.

    Raises:
        UsageError: one that is unknown, or whose packages are missing.
    """
    names = split_words(words)
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"log_with must be {' or '.join(PACKAGES)}, got {name!r}")
        if find_spec("accelerate") is None or not any(map(find_spec, PACKAGES[name])):
            raise UsageError(
                f"--log-with {name} needs packages that are not installed: pip install 'ctkernels[{name}]'"
            )
    return names


@contextmanager
def trackers(names: Sequence[str], out: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """Yield a function that logs an epoch, as the step of its number from 1.

    out: TensorBoard's files lie in its folder `tensorboard`, in a folder of their own for each start.
    settings: logged once.

    Raises:
        FailedRun: a tracker that does not start, with its reason.
    """
    with ExitStack() as stack:
        running = []
        for name in names:
            running.append(_started(name, out, settings))
            stack.callback(running[-1].finish)

        def log(record: EpochRecord, number: int) -> None:
            before = f"{record.stage}/" if record.stage else ""
            values = {before + name: getattr(record, name) for name in VALUES if getattr(record, name) is not None}
            for tracker in running:
                if record.held_out_start is not None:
                    tracker.log({f"{before}held_out": record.held_out_start}, step=number - 1)
                tracker.log(values, step=number)

        yield log


def _started(name: str, out: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=True)  # which accelerate's own log asks for; nothing is computed through it
    tracker: TensorBoardTracker | WandBTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker(time.strftime("%Y%m%d-%H%M%S"), logging_dir=out / name)
    else:
        tracker = WandBTracker("ctkernels", name=out.name)
    plain = (bool, int, float, str)
    try:
        tracker.start()
        tracker.store_init_configuration({k: v if isinstance(v, plain) else str(v) for k, v in settings.items()})
    except Exception as error:  # of whatever kind these packages raise
        raise FailedRun(f"--log-with {name} cannot start: {error}") from error
    return tracker
