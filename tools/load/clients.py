"""Clients of a server under load: they ask, compare every answer with the known one, and some leave in mid-stream."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx2

LEAVE = 0.25  # share of the streams that are left before their end
OUTCOMES = ("whole", "streamed", "left", "refused", "wrong", "failed", "unfinished")
BAD = ("wrong", "failed", "unfinished")


@dataclass(frozen=True)
class Known:
    """A request and its answer: text, and tokens with the end token."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    text: str
    tokens: int


@dataclass
class Found:
    """What clients met: how often each outcome, tokens of whole answers, and sentences about the first bad ones."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, outcome: str, example: str = "") -> None:
        """Count an outcome."""
        self.outcomes[outcome] += 1
        if outcome in BAD and len(self.examples) < 20:
            self.examples.append(f"{outcome}: {example}")

    @property
    def bad(self) -> int:
        """How many requests had a wrong answer, an error or no end."""
        return sum(self.outcomes[outcome] for outcome in BAD)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "outcomes": {outcome: self.outcomes[outcome] for outcome in OUTCOMES}}


async def ask(http: httpx2.AsyncClient, known: Known, chance: random.Random, found: Found) -> None:
    """One request, whole or as a stream, and what comes of it."""
    body: dict[str, Any] = {
        "model": known.model,
        "prompt": list(known.prompt),
        "max_tokens": known.max_tokens,
        "temperature": 0,
        "stream": chance.random() < 0.7,
    }
    leaves_after = chance.randint(0, known.tokens) if body["stream"] and chance.random() < LEAVE else None
    try:
        if not body["stream"]:
            response = await http.post("/v1/completions", json=body)
            if not await _refused(response.status_code, found, response.text):
                answer = response.json()
                found.tokens += answer["usage"]["completion_tokens"]
                right = (known.text, known.tokens)
                said = (answer["choices"][0]["text"], answer["usage"]["completion_tokens"])
                found.note("whole" if said == right else "wrong", f"{said}, not {right}")
            return
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if await _refused(response.status_code, found, ""):
                return
            await _read(response, known, leaves_after, found)
    except httpx2.TimeoutException as error:
        found.note("unfinished", f"{type(error).__name__}")
    except httpx2.HTTPError as error:
        found.note("failed", f"{type(error).__name__}: {error}")


async def _read(response: httpx2.Response, known: Known, leaves_after: int | None, found: Found) -> None:
    """Compare a stream with the known text; leave it after some events."""
    text, events, why = "", 0, None
    async for line in response.aiter_lines():
        if leaves_after is not None and events > leaves_after:
            break
        if not line.startswith("data: {"):
            if line == "data: [DONE]":
                break
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return found.note("failed", event["error"]["message"])
        events += 1
        text += event["choices"][0]["text"]
        why = event["choices"][0]["finish_reason"]
        if not known.text.startswith(text):
            return found.note("wrong", f"{text!r}, not {known.text!r}")
    if why is not None:
        found.tokens += known.tokens
        return found.note("streamed" if text == known.text else "wrong", f"{text!r}, not {known.text!r}")
    found.note("unfinished" if leaves_after is None else "left", "a stream without an end")


async def _refused(status: int, found: Found, text: str) -> bool:
    """Whether there is no answer."""
    if status == 429:
        found.note("refused")
        await asyncio.sleep(0.5)
    elif status != 200:
        found.note("failed", f"status {status} {text[:200]}")
    return status != 200


async def campaign(
    address: str, pool: Sequence[Known], clients: int, seconds: float, requests: float = math.inf, seed: int = 0
) -> Found:
    """Let `clients` ask at once, until the time is over or each has made so many requests. All hear the end."""
    found = Found()
    no_limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=300, limits=no_limits) as http:
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            chance, made = random.Random(f"{seed} {number}"), 0
            while time.monotonic() < end and made < requests:
                await ask(http, chance.choice(pool), chance, found)
                made += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
        for _ in range(100):  # a client that left is noticed within a second
            if _idle((await http.get("/metrics")).text):
                return found
            await asyncio.sleep(0.1)
    found.note("unfinished", "rows or requests remain when all clients have gone")
    return found


def _idle(metrics: str) -> bool:
    return "\nctkernels_rows 0.0\n" in metrics and "\nctkernels_waiting 0.0\n" in metrics
