"""The text of an answer while its tokens come: what can be sent already, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a part of a character is decoded as


class AnswerText:
    """Text of tokens that come one by one, up to the first of the stop strings.

    What could be the beginning of a stop string, or of a character of several tokens, is held back until more is known.

    stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []
        self._sent = 0  # characters
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be sent now that `token` has come."""
        self._tokens.append(token)
        text = self._decoded()
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._send(text[: min(found)])
        safe = len(text.rstrip(INCOMPLETE))
        return self._send(text[: min([safe, *(_begins(text, stop) for stop in self._stops)])])

    def end(self) -> str:
        """What was held back, as no more tokens come."""
        return "" if self.stopped else self._send(self._decoded())

    def _decoded(self) -> str:
        decode = self._tokenizer.decode
        return str(decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _send(self, text: str) -> str:
        new = text[self._sent :]
        self._sent += len(new)
        return new


def _begins(text: str, stop: str) -> int:
    """Where the longest end of `text` is that `stop` begins with; its length if there is none."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)
