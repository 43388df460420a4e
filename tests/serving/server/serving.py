"""What tests of the server share: a tiny model with stored prefixes, answers of `generate`, and a running server."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence

import httpx2
import torch
import uvicorn
from transformers import PreTrainedModel

from ctkernels.serving.server.app import make_app
from ctkernels.serving.server.engine import Engine, Failed, Finished, Piece, Request
from ctkernels.serving.server.guard import LOOPBACK, Guard
from ctkernels.serving.server.metrics import Metrics
from ctkernels.serving.server.protocol import Limits
from ctkernels.serving.server.service import Service
from ctkernels.serving.server.tuner import Tuner
from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import CHARACTERS, DEMONSTRATIONS, SPECIAL, char_tokenizer
from ctkernels.tuning import KVPrefix, PrefixStore

VOCABULARY = len(SPECIAL) + len(CHARACTERS)  # every token of the tiny models is a character
NAME = "tiny"
PREFIXES = {"team-a/routing": slice(0, 2), "team b: Ä": slice(2, 4), "long": slice(0, 5)}


def tiny(name: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """A tiny model whose tokens are those of `char_tokenizer`."""
    return make_model(name, dtype, vocab_size=VOCABULARY, max_position_embeddings=256, **changes)


def stored(folder, model: PreTrainedModel) -> PrefixStore:
    """A store with the prefixes of `PREFIXES`."""
    store = PrefixStore(folder, model)
    for name, part in PREFIXES.items():
        store.put(name, KVPrefix.from_demonstrations(model, char_tokenizer(), DEMONSTRATIONS[part]))
    return store


def alone(model: PreTrainedModel, request: Request) -> list[int]:
    """The tokens that `generate` gives for a greedy request of one row, its end token among them."""
    with request.prefix.attach(model):
        return continued(model, request.prompt, request.max_tokens, eos_token_id=sorted(request.ends) or None)


def continued(model: PreTrainedModel, prompt: Sequence[int], count: int, **settings) -> list[int]:
    """`count` tokens of `generate`, greedily unless told otherwise."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


class Heard:
    """A listener that waits for the end."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.end: Finished | Failed | None = None
        self.first, self._ended = threading.Event(), threading.Event()

    def __call__(self, event: Piece | Finished | Failed) -> None:
        if isinstance(event, Piece):
            self.pieces.append(event.text)
            self.first.set()
        else:
            assert self.end is None, "a request ends once"
            self.end = event
            self._ended.set()

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def wait(self, seconds: float = 60) -> Finished | Failed:
        assert self._ended.wait(seconds), "no end of the request"
        return self.end


class Running:
    """A server in a thread of this process, and a client."""

    def __init__(self, service: Service, engine: Engine, address: str, headers: dict[str, str]) -> None:
        self.service, self.engine, self.address = service, engine, address
        self.client = httpx2.Client(base_url=address, headers=headers, timeout=60)

    def post(self, path: str, **body) -> httpx2.Response:
        return self.client.post(path, json=body)

    def stream(self, path: str, **body) -> list[dict]:
        """The events of a streamed answer, without the closing one."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@contextlib.contextmanager
def running(
    model: PreTrainedModel,
    store: PrefixStore,
    token: str | None = None,
    limits: Limits | None = None,
    chat_template: str | None = None,
    rows: int = 4,
    queue: int = 8,
) -> Iterator[Running]:
    """A server of this model."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = chat_template
    metrics = Metrics()
    tuner = Tuner(model, tokenizer, store, metrics)
    service = Service(model, tokenizer, store, NAME, tuner, limits)
    engine = Engine(model, tokenizer, rows, queue, metrics)
    app = Guard(make_app(service, engine), service.limits.body_bytes, token, LOOPBACK)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        yield Running(service, engine, f"http://127.0.0.1:{listening.getsockname()[1]}", headers)
    finally:
        server.should_exit = True
        thread.join(30)
        tuner.close()
        engine.close()
        listening.close()


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Tokens that are characters."""
    return tuple(int(t) % len(CHARACTERS) + len(SPECIAL) for t in tokens(length, seed=seed))
