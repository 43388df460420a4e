"""Tuning in the background: one task at a time, on a twin of the served model, published in the store by its name.

What happens is told as events: `started`, an `epoch` each, and at the end `published`, `cancelled` or `failed`.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctkernels.serving.server.metrics import Metrics
from ctkernels.tuning.adapters.store import PrefixStore
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import TextFormat, encode_context
from ctkernels.tuning.hf.limits import check_context_length
from ctkernels.tuning.methods.base import require_demonstrations
from ctkernels.tuning.methods.table import get_method
from ctkernels.tuning.methods.tune import tune

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.tuning.train.options import Options
    from ctkernels.tuning.train.trainer import EpochRecord

log = logging.getLogger("ctkernels.serving")
METHOD = "ct-kv"
ENDS = ("published", "cancelled", "failed")
Event = dict[str, Any]


class Occupied(Exception):
    """Another task is being tuned."""


class _Cancelled(Exception):
    pass


@dataclass(frozen=True)
class Task:
    """What to tune, checked by `Tuner.task`."""

    name: str
    demonstrations: tuple[Demonstration, ...]
    settings: Options
    text_format: TextFormat


class Tuning:
    """One task on its way, and what has happened to it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.cancelled = False
        self.events: list[Event] = []
        self._lock = threading.Lock()
        self._followers: list[Callable[[Event], None]] = []

    @property
    def running(self) -> bool:
        """Whether its end has not come."""
        return not self.events or self.events[-1]["event"] not in ENDS

    def tell(self, event: str, **values: Any) -> None:
        """Record an event and tell it to all followers."""
        with self._lock:
            self.events.append({"event": event, "name": self.task.name, **values})
            for follower in self._followers:
                follower(self.events[-1])

    def follow(self, follower: Callable[[Event], None]) -> None:
        """Call `follower` with everything that has happened, and that will."""
        with self._lock:
            for event in self.events:
                follower(event)
            self._followers.append(follower)

    def leave(self, follower: Callable[[Event], None]) -> None:
        """Tell it no more."""
        with self._lock:
            self._followers.remove(follower)


class Tuner:
    """Tunes one task at a time.

    model: whose weights the twin shares; make the tuner before anything is attached to it.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: PrefixStore, metrics: Metrics
    ) -> None:
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
        self._model: PreTrainedModel = copy.deepcopy(model, shared)
        self._tokenizer, self._store, self._metrics = tokenizer, store, metrics
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.last: Tuning | None = None

    def task(
        self,
        name: str,
        demonstrations: Sequence[Demonstration],
        settings: dict[str, Any],
        text_format: TextFormat,
    ) -> Task:
        """A task, after all that can be refused before the model runs.

        Raises:
            ValueError: settings or a delimiter that cannot be used; DataError: too few demonstrations, or too long.
        """
        method = get_method(METHOD)
        own = method.settings(**settings)
        require_demonstrations(method, len(demonstrations), own)
        context = encode_context(self._tokenizer, demonstrations, text_format)
        check_context_length(self._model, len(context.input_ids))
        return Task(name, tuple(demonstrations), own, text_format)

    def start(self, task: Task) -> Tuning:
        """Begin in the background.

        Raises:
            Occupied: another task is being tuned.
        """
        with self._lock:
            if self.last is not None and self.last.running:
                raise Occupied("another task is being tuned; DELETE /v1/tuning cancels it")
            tuning = self.last = Tuning(task)
            self._thread = threading.Thread(target=self._run, args=(tuning,), name="tuner", daemon=True)
            self._thread.start()
        return tuning

    def cancel(self) -> Tuning | None:
        """End the running task with its epoch; returns it."""
        if self.last is None or not self.last.running:
            return None
        self.last.cancelled = True
        return self.last

    def close(self) -> None:
        """Cancel what runs, and wait for it."""
        self.cancel()
        if self._thread is not None:
            self._thread.join()

    def _run(self, tuning: Tuning) -> None:
        task = tuning.task

        def on_epoch(record: EpochRecord, learner: nn.Module) -> None:
            tuning.tell("epoch", epoch=record.epoch, loss=record.loss, seconds=record.seconds)
            if tuning.cancelled:
                raise _Cancelled

        epochs = getattr(task.settings, "epochs", None)
        tuning.tell("started", demonstrations=len(task.demonstrations), epochs=epochs)
        try:
            result = tune(
                self._model,
                self._tokenizer,
                task.demonstrations,
                METHOD,
                task.settings,
                task.text_format,
                on_epoch=on_epoch,
            )
            if tuning.cancelled:
                raise _Cancelled
            self._store.put(task.name, result.prefix)
        except _Cancelled:
            tuning.tell("cancelled")
        except (DataError, ArithmeticError) as error:  # of the demonstrations, a loss that is not finite
            tuning.tell("failed", message=str(error))
        except Exception as error:
            log.exception("tuning %r failed", task.name)
            tuning.tell("failed", message=f"{type(error).__name__}; the server's log says more")
        else:
            tuning.tell("published", tokens=result.prefix.length)
        self._metrics.tunings.labels(tuning.events[-1]["event"]).inc()
