"""The JSON that clients send: the parts of OpenAI's API that are served, and the tuning of a prefix.

What is not served (several answers, log-probabilities, penalties, tools ...) is an error unless it says what happens
anyway. Sizes are limited here, or in `Limits` where the person who starts the server may choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator, model_validator

STOPS, STOP_CHARACTERS = 4, 256
LEAST_TEMPERATURE = 0.01  # below, logits overflow


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. seconds: how long it may take."""

    body_bytes: int = 1 << 20
    max_tokens: int = 1024
    seconds: float = 300.0
    demonstrations: int = 1000
    epochs: int = 200

    def __post_init__(self) -> None:
        for name in ("body_bytes", "max_tokens", "demonstrations", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}")


Stop = Annotated[StrictStr, Field(min_length=1, max_length=STOP_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    include_usage: StrictBool = False


class GenerationBody(_Body):
    """What completions and chats have in common."""

    model: Annotated[StrictStr, Field(max_length=1024)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: Any = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, stop: Any) -> Any:
        if stop is None or isinstance(stop, str) or _all(stop, str):
            return stop
        raise ValueError("must be a text or a list of texts")

    @model_validator(mode="after")
    def _not_almost_zero(self) -> GenerationBody:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {LEAST_TEMPERATURE}, got {self.temperature}")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def counts_in_stream(self) -> bool:
        """Whether the last event of a stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. prompt: a text, or tokens, which directly follow the prefix. input, in its place: of the
    prefix's task; it becomes tokens as in tuning, and the answer ends at the task's delimiter."""

    prompt: StrictStr | list[StrictInt] | None = None
    input: StrictStr | None = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    logprobs: Literal[None] = None
    suffix: Literal[None] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, prompt: Any) -> Any:
        if prompt is None or isinstance(prompt, str) or _all(prompt, int):
            return prompt
        raise ValueError("must be one text or the list of its tokens")

    @model_validator(mode="after")
    def _one_of_both(self) -> CompletionBody:
        if (self.prompt is None) == (self.input is None):
            raise ValueError(f"give prompt or input, got {'both' if self.input is not None else 'none'}")
        return self


class TextPart(_Body):
    type: Literal["text"]
    text: StrictStr


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: Literal[None] = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None


class TuningBody(_Body):
    """`POST /v1/prefixes`. demonstrations: JSONL, as `ctkernels tune` reads it from a file.  replace: a prefix that has
    the name already.  stream: answer with the events of the tuning instead of at once."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    demonstrations: StrictStr
    epochs: Annotated[StrictInt, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    delimiter: Annotated[StrictStr, Field(min_length=1, max_length=64)] = "\n"
    replace: StrictBool = False
    stream: StrictBool = False


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """The tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def in_words(errors: Sequence[Any]) -> tuple[str, str]:
    """What is wrong with a body, from pydantic's errors, and where."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return f"{place} is not supported by this server", place
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}", place
