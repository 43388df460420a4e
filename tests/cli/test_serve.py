"""`ctkernels serve`: what is refused at the start, what vLLM is told, and an end that leaves no request without its
answer."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch

from ctkernels.cli import serve
from ctkernels.cli.main import run
from ctkernels.cli.parse import CommandLine
from ctkernels.cli.serve import ServeConfig
from ctkernels.serving.server import ServerOptions
from ctkernels.serving.server.engine import Engine
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning import KVPrefix, PrefixStore


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "store is required"),
        (["--store", "{files}/store"], "model is required"),
        (["--store", "{files}/train.jsonl", "--model", "{files}/model"], "train.jsonl"),
        (["--store", "{files}/store", "--host", "0.0.0.0"], "host '0.0.0.0' can be reached from other machines; give"),
        (["--store", "{files}/store", "--host", "example.org"], "can be reached from other machines"),
        (["--store", "{files}/store", "--token", ""], "token must be ASCII characters without spaces around them"),
        (["--store", "{files}/store", "--rows", "0"], "rows must be at least 1, got 0"),
        (["--store", "{files}/store", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--store", "{files}/store", "--memory-gib", "-1"], "memory_gib must be >= 0, got -1.0"),
        (["--store", "{files}/store", "--engine", "other"], "engine"),
        (["--store", "{files}/store", "--memory-gib", "-1"], "memory_gib must be >= 0, got -1.0"),
        (["--store", "{files}/store", "--", "--max-model-len", "9"], "options behind -- are for the engine vllm"),
        (["--store", "{files}/nowhere", "--engine", "vllm"], "nowhere': no folder"),
        (
            ["--store", "{files}", "--engine", "vllm", "--max-tokens", "9"],
            "--max-tokens is for the engine own",
        ),
        (["--store", "{files}", "--engine", "vllm"], "needs vLLM, which is not installed: it comes with the extra"),
    ],
)
def test_what_is_refused(files, capsys, given, message):
    """In one line, before a model is loaded."""
    assert run(["serve", *(word.format(files=files) for word in given)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ctkernels: error: ") and message in line


def test_where_a_server_may_listen():
    """On this machine without a token; beyond it with one, or if that is said."""
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert ServerOptions("model", host=host).token is None
    for given in ({"token": "s3cret"}, {"open_to_all": True}):
        assert ServerOptions("model", host="0.0.0.0", **given).host == "0.0.0.0"
    for host in ("0.0.0.0", "::", "192.168.1.2", ""):
        with pytest.raises(ValueError, match="can be reached from other machines"):
            ServerOptions("model", host=host)


def test_what_is_not_installed_is_named(files, capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert run(["serve", "--store", f"{files}/store", "--model", f"{files}/model"]) == 2
    assert "engine own needs uvicorn, which the extra [serve] installs" in capsys.readouterr().err


def test_the_command_of_the_guide():
    """It parses as it stands."""
    guide = (Path(__file__).parents[2] / "docs/guides/serve.md").read_text()
    (command,) = re.findall(r"^ctkernels serve (.*?) +#", guide, re.MULTILINE)
    config = CommandLine("ctkernels serve", shlex.split(command)).parse(ServeConfig)
    assert config.store == Path("runs/store")
    assert (config.engine, config.host, config.port) == ("own", "127.0.0.1", 8000)


@dataclass
class Settings:
    """As `ServeSettings`, which needs vLLM to be imported."""

    model: str
    store: Path
    host: str
    port: int
    memory_bytes: int
    allow_other_weights: bool
    rest: tuple


@pytest.fixture
def served(monkeypatch):
    """The settings of the engines that were started."""
    started: list[Settings] = []
    launch = SimpleNamespace(ServeSettings=Settings, serve=started.append)
    monkeypatch.setitem(sys.modules, "ctkernels.serving.vllm.launch", launch)
    find = importlib.util.find_spec
    monkeypatch.setattr("ctkernels.cli.serve.find_spec", lambda name: name == "vllm" or find(name))
    return started


def test_the_engine_is_told_what_was_asked_for(served, tmp_path):
    assert run(["serve", "--model", "m", "--store", str(tmp_path), "--engine", "vllm"]) == 0
    words = ["--engine", "vllm", "--port", "81", "--memory-gib", "0.5", "--allow-other-weights"]
    rest = ["--max-model-len", "64", "--", "x"]
    assert run(["serve", "--model", "m", "--store", str(tmp_path), *words, "--", *rest]) == 0
    plain, full = served
    assert plain == Settings("m", tmp_path, "127.0.0.1", 8000, 1 << 30, False, ())
    assert full == Settings("m", tmp_path, "127.0.0.1", 81, 1 << 29, True, tuple(rest))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_sigterm_in_the_middle_of_answers(tmp_path, capsys, monkeypatch):
    """Running ones and those in the queue are finished, new ones turned away, and the command ends with status 0."""
    make_model("llama", torch.float32, vocab_size=43, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None  # so that answers are long
    tokenizer.save_pretrained(tmp_path / "model")
    model = make_model("llama", torch.float32, vocab_size=43, max_position_embeddings=1024)
    PrefixStore(tmp_path / "store", model, allow_other_weights=True).put(
        "task", KVPrefix.from_demonstrations(model, char_tokenizer(), DEMONSTRATIONS)
    )
    port = free_port()
    seen: dict[str, object] = {}

    headers = {"authorization": "Bearer t"}
    body = {"model": "task", "prompt": "a", "max_tokens": 100, "temperature": 1.0, "seed": 1, "stream": True}

    def client() -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as http:
            try:
                until(lambda: http.get("/health").status_code == 200)
                seen["models"] = [entry["id"] for entry in http.get("/v1/models").json()["data"]]
                other = {"model": "tiny", "prompt": "b", "max_tokens": 3}
                waiting = threading.Thread(target=lambda: seen.update(other=http.post("/v1/completions", json=other)))
                with http.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.iter_lines()
                    parts = [next(lines)]
                    waiting.start()
                    until(lambda: "ctkernels_waiting 1.0" in http.get("/metrics").text)
                    os.kill(os.getpid(), signal.SIGTERM)
                    parts += [line for line in lines if line]
                waiting.join()
                seen["parts"] = [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
                with pytest.raises(httpx2.ConnectError):
                    httpx2.get(f"http://127.0.0.1:{port}/health")
                seen["done"] = parts[-1]
            finally:
                if "done" not in seen:
                    os.kill(os.getpid(), signal.SIGTERM)

    turn = Engine._turn
    monkeypatch.setattr(Engine, "_turn", lambda engine: (time.sleep(0.01), turn(engine)))  # as a larger model
    monkeypatch.setenv("CTKERNELS_TOKEN", "t")
    thread = threading.Thread(target=client)
    thread.start()
    where = ["--model", str(tmp_path / "model"), "--store", str(tmp_path / "store"), "--port", str(port)]
    status = run(["serve", *where, "--rows", "1", "--name", "tiny"])
    thread.join()
    assert status == 0
    assert seen["models"] == ["tiny", "tiny:task"]
    assert seen["done"] == "data: [DONE]" and seen["parts"][-1]["choices"][0]["finish_reason"] == "length"
    assert seen["other"].status_code == 200 and seen["other"].json()["usage"]["completion_tokens"] > 0
    assert capsys.readouterr().out == f"serving tiny and 1 prefixes on http://127.0.0.1:{port}\nstopped\n"


def until(true: Callable[[], bool]) -> None:
    """Wait for it, also for a server that cannot be reached yet."""
    for _ in range(200):
        with contextlib.suppress(httpx2.ConnectError):
            if true():
                return
        time.sleep(0.05)
    raise AssertionError("it does not become true")
