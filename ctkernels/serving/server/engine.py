"""Engine: one thread that owns the model and answers requests in a batch that changes between steps.

    submit(request) -> queue -> [remove rows that ended | let waiting ones join | a step of all rows] -> ...

A listener gets what happens to its request, in the engine's thread: `Piece`s of text, then one `Finished` or `Failed`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from ctkernels.serving.server.batch import Batch
from ctkernels.serving.server.metrics import Metrics
from ctkernels.serving.server.sampling import GREEDY, Sampler, Sampling
from ctkernels.serving.server.text import AnswerText
from ctkernels.tuning.adapters.prefix import KVPrefix

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("ctkernels.serving")
JOIN_TOKENS = 2048  # padded prompt tokens of one pass, more only of a single prompt


class Busy(Exception):
    """The queue is full."""


class Closed(Exception):
    """The engine takes no more requests."""


class Piece(NamedTuple):
    """A piece of the answer's text."""

    text: str


class Finished(NamedTuple):
    """The end of an answer. why: an end token or a stop string, or as many tokens as were wanted."""

    why: Literal["stop", "length"]
    prompt_tokens: int
    tokens: int


class Failed(NamedTuple):
    """The end of a request without the end of its answer."""

    why: Literal["timeout", "error", "cancelled"]
    message: str


Listener = Callable[[Piece | Finished | Failed], None]


@dataclass(frozen=True)
class Request:
    """What to answer.

    prompt: at least one token.  max_tokens: at least 1.  ends: tokens that end the answer and are not in its text.
    stops: texts that do.  seconds: how long it may take, the time in the queue included; None: any.
    """

    prefix: KVPrefix
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine."""

    request: Request
    listener: Listener
    text: AnswerText
    choose: Sampler
    began: float = field(default_factory=time.monotonic)
    tokens: int = 0
    last: int = -1
    end: Finished | Failed | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Give the row back before the next step."""
        self.cancelled = True

    def check(self) -> None:
        """End it if nobody waits for it any more, or it took too long."""
        seconds = self.request.seconds
        if self.cancelled:
            self.end = Failed("cancelled", "the client has gone")
        elif seconds is not None and time.monotonic() - self.began > seconds:
            self.end = Failed("timeout", f"the answer took longer than {seconds:g} s")

    def take(self, logits: Tensor) -> None:
        """The next token."""
        request, self.last = self.request, self.choose(logits)
        self.tokens += 1
        if self.last in request.ends:
            self.end = Finished("stop", len(request.prompt), self.tokens)
            piece = self.text.end()
        else:
            piece = self.text.add(self.last)
            if self.text.stopped or self.tokens == request.max_tokens:
                self.end = Finished("stop" if self.text.stopped else "length", len(request.prompt), self.tokens)
                piece += self.text.end()
        if piece:
            self.listener(Piece(piece))


class Engine:
    """Answers requests for any prefixes of one model, up to `rows` at a time, with `queue` more that wait.

    The model belongs to the engine until `close`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: int = 16,
        queue: int = 64,
        metrics: Metrics | None = None,
        backend: str | None = None,
    ) -> None:
        self.rows, self.queue, self.metrics = rows, queue, metrics or Metrics()
        self._tokenizer = tokenizer
        self._batch = Batch(model, rows, backend)
        self._members: list[Ticket] = []  # row b of the batch
        self._waiting: deque[Ticket] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.metrics.waiting.set_function(lambda: len(self._waiting))
        self.metrics.rows.set_function(lambda: len(self._members))
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request.

        Raises:
            Busy: the queue is full.  Closed: after `close`.
        """
        ticket = Ticket(request, listener, AnswerText(self._tokenizer, request.stops), Sampler(request.sampling))
        with self._changed:
            if self._closing:
                raise Closed("the server is stopping")
            if len(self._waiting) >= self.queue:
                self.metrics.refused.inc()
                raise Busy(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def refuse(self) -> None:
        """Take no more requests; those that were taken are answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self) -> None:
        """Answer what was taken, then leave the model as it was."""
        self.refuse()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._members and not self._closing:
                    self._changed.wait()
                if self._closing and not self._waiting and not self._members:
                    break
            try:
                self._turn()
            except Exception as error:  # of a forward pass: memory, a prefix's file that was changed
                log.exception("a step of the batch failed")
                for ticket in self._members:
                    ticket.end = ticket.end or Failed("error", f"the model failed: {type(error).__name__}")
                self._batch.close()
                members, self._members = self._members, []
                self._report(members)
        self._batch.close()

    def _turn(self) -> None:
        """What happens between two tokens of a row, and one token of every row."""
        self._remove_ended()
        self._join()
        self._remove_ended()
        if self._members:
            self.metrics.steps.labels("decode").inc()
            self._take(self._members, self._batch.step([ticket.last for ticket in self._members]))
            self._remove_ended()

    def _take(self, tickets: Sequence[Ticket], logits: Tensor) -> None:
        for ticket, row in zip(tickets, logits, strict=True):
            if ticket.tokens == 0:
                self.metrics.first_token.observe(time.monotonic() - ticket.began)
            try:
                ticket.take(row)
            except Exception as error:  # such as drawing from logits that are not finite
                log.exception("an answer failed")
                ticket.end = Failed("error", f"no token can be chosen: {type(error).__name__}")

    def _remove_ended(self) -> None:
        for row in reversed(range(len(self._members))):
            ticket = self._members[row]
            if ticket.end is None:
                ticket.check()
            if ticket.end is not None:
                self._batch.leave(row)
                last = self._members.pop()
                if row < len(self._members):
                    self._members[row] = last
                self._report([ticket])

    def _join(self) -> None:
        """Let those that wait join, the first ones first, as far as there are rows and not too many tokens."""
        joining: list[Ticket] = []
        with self._changed:
            for ticket in self._waiting:
                ticket.check()
            gone = [ticket for ticket in self._waiting if ticket.end is not None]
            self._waiting = deque(ticket for ticket in self._waiting if ticket.end is None)
            while self._waiting and len(self._members) + len(joining) < self.rows:
                longest = max(len(each.request.prompt) for each in (*joining, self._waiting[0]))
                if joining and longest * (len(joining) + 1) > JOIN_TOKENS:
                    break
                joining.append(self._waiting.popleft())
        self._report(gone)
        if not joining:
            return
        self.metrics.steps.labels("join").inc()
        try:
            requests = [ticket.request for ticket in joining]
            logits = self._batch.join([r.prompt for r in requests], [r.prefix for r in requests])
        except Exception as error:  # the rows that were there go on
            log.exception("a batch of prompts failed")
            for ticket in joining:
                ticket.end = Failed("error", f"the model failed on the prompt: {type(error).__name__}")
            self._report(joining)
            return
        self._members += joining
        self.metrics.prompt_tokens.inc(sum(len(request.prompt) for request in requests))
        self._take(joining, logits)

    def _report(self, ended: Sequence[Ticket]) -> None:
        for ticket in ended:
            assert ticket.end is not None
            self.metrics.answers.labels(ticket.end.why).inc()
            self.metrics.tokens.inc(ticket.tokens)
            self.metrics.whole_answer.observe(time.monotonic() - ticket.began)
            ticket.listener(ticket.end)
