"""The scheduler's part: which tokens of a prefix go into which blocks of which request.

    prompt     | P placeholder tokens ......................... | the request's own tokens
    blocks     |  0  |  1  |  2  |  3  |  4  |                  its last block with prefix tokens may hold own ones, too
    cached     | vLLM's own cache |  loaded: only the rest      |  computed

vLLM asks again when a request is scheduled anew after preemption; what its own cache has kept meanwhile counts then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctkernels.serving.vllm.salts import Placed, placed


@dataclass(frozen=True)
class Load:
    """Tokens [first, first + count) of a prefix for a request whose blocks are `blocks`.

    refused: why the request must fail, in place of a prefix.
    """

    request: str
    prefix: Placed | None
    first: int
    count: int
    blocks: tuple[int, ...]
    refused: str = ""

    def touched(self, block_size: int) -> list[int]:
        """The blocks that it writes to."""
        return list(self.blocks[self.first // block_size : -(-(self.first + self.count) // block_size)])

    def slots(self, block_size: int) -> Tensor:
        """Where each token goes in the cache, int64 `[count]`: block * block size + place in the block."""
        tokens = torch.arange(self.first, self.first + self.count)
        return torch.tensor(self.blocks)[tokens // block_size] * block_size + tokens % block_size


class Plan:
    """The loads of the next step."""

    def __init__(self) -> None:
        self._loads: list[Load] = []
        self._matched: dict[str, tuple[Placed | None, int]] = {}  # by request: its prefix, and tokens that vLLM has
        self._refused: dict[str, str] = {}

    def refuse(self, request: str, why: str) -> None:
        """Let a request fail when it is scheduled."""
        self._refused[request] = why

    def forget(self, request: str) -> None:
        """A request has ended."""
        self._refused.pop(request, None)
        self._matched.pop(request, None)

    def matched(self, request: str, salt: str | None, tokens: int, prompt_tokens: int, computed: int) -> int:
        """How many tokens behind the `computed` ones, which vLLM has, are loaded.

        Args:
            tokens: of the request, with those that it generated before it was preempted.  prompt_tokens: of its prompt.
        """
        prefix = None
        try:
            prefix = placed(salt)
            if prefix is not None and prefix.length >= prompt_tokens:
                raise ValueError(f"a prompt of {prompt_tokens} tokens has none behind a prefix of {prefix.length}")
        except ValueError as error:
            self.refuse(request, str(error))
        self._matched[request] = prefix, computed
        if request in self._refused:  # "loaded", so that the failed load ends the request
            return max(0, tokens - 1 - computed)
        return 0 if prefix is None else max(0, prefix.length - computed)

    def allocated(self, request: str, blocks: Sequence[int], count: int) -> None:
        """A request was given its blocks, and is to have `count` tokens loaded."""
        if count > 0:
            prefix, computed = self._matched[request]
            self._loads.append(Load(request, prefix, computed, count, tuple(blocks), self._refused.get(request, "")))

    def take(self) -> list[Load]:
        """The loads since the last call."""
        loads, self._loads = self._loads, []
        return loads
