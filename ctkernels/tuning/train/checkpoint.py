"""One file that holds everything a run needs to go on: parameters, optimiser state, history, and what it was run with.

The file is replaced in one step, so a run killed at any moment leaves the checkpoint before or the one after, never a
mixture. Resuming under other settings, data or another model is refused by the name of what differs.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctkernels.tuning.adapters import legacy
from ctkernels.tuning.adapters.file import PrefixFileError, faults, read_file, write_file
from ctkernels.tuning.hf.fingerprint import weights_fingerprint
from ctkernels.tuning.train.options import ADDED, RENAMED

FILE_NAME = "checkpoint.safetensors"


class CheckpointError(PrefixFileError):
    """A checkpoint that cannot be read, or that belongs to another run."""


class Checkpoint:
    """The checkpoint of one run in `folder`.

    Args:
        folder: directory of the checkpoint file.
        run: what the run depends on, as JSON values by name (settings, data, model); compared when resuming.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(folder) / FILE_NAME
        self.run = dict(run)

    def exists(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.path.is_file()

    def save(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
        """Replace the checkpoint by the state after `len(history)` epochs.

        parameters: and whatever else a learner keeps (`Learner.state`).

        Raises:
            CheckpointError: a value that is not finite.
            OSError: the disk is full or not writable.  The checkpoint before stays whole.
        """
        tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
        try:
            write_file(self.path, "checkpoint", {"run": self.run, "history": history}, tensors)
        except PrefixFileError as error:
            raise CheckpointError(str(error)) from error

    def load(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> list[dict]:
        """Restore parameters and optimiser in place and return the history.

        Raises:
            CheckpointError: not a checkpoint, of another run, or of other shapes.
        """
        with _checkpoint_errors(self.path):
            _, description, tensors = read_file(self.path, "checkpoint")
            run, now, history = description["run"], self.run, description["history"]
            if description["format_version"] == legacy.VERSION:
                run, now = legacy.comparable({RENAMED.get(name, name): value for name, value in run.items()}, now)
                warnings.warn(
                    f"{self.path} was written by an earlier version of ctkernels: whether the model and start_from are "
                    "what they were then cannot be compared any more",
                    stacklevel=4,
                )
            differing = changes(run, now)
            if differing:
                raise CheckpointError(
                    f"cannot resume from {self.path}: {differing}; restore what differs, or start again elsewhere"
                )
            saved = {name.removeprefix("parameter/"): t for name, t in tensors.items() if name.startswith("parameter/")}
            shapes = {name: (t.shape, t.dtype) for name, t in saved.items()}
            if shapes != {name: (p.shape, p.dtype) for name, p in parameters.items()}:
                raise CheckpointError(f"{self.path} holds parameters of other names, shapes or types than this run's")
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer/"):
                    _, index, key = name.split("/")
                    state.setdefault(int(index), {})[key] = tensor
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(saved[name])
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return history


@contextmanager
def _checkpoint_errors(path: Path) -> Iterator[None]:
    try:
        with faults(path):
            yield
    except CheckpointError:
        raise
    except PrefixFileError as error:
        raise CheckpointError(str(error)) from error


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a run depends on and that differs from a saved one, by name; "" if nothing does."""
    now = json.loads(json.dumps(now))
    saved = {**{name: value for name, value in ADDED.items() if name in now}, **saved}
    differing = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    return "; ".join(f"{name} was {saved.get(name)!r} and is now {now.get(name)!r}" for name in differing)


def fingerprint(parts: Iterable[Any]) -> str:
    """A short hash of values with a faithful repr."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights and of their types; the same however the model is spread over processes, which
    all have to ask."""
    types = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return fingerprint((weights_fingerprint(model), types))
