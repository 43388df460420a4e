"""`ctkernels serve`: what is checked before an engine starts, and what the engine is told."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctkernels import cli


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
    assert cli.run(["serve", "--model", "m", "--store", str(tmp_path)]) == 0
    words = ["--engine", "vllm", "--port", "81", "--memory-gib", "0.5", "--allow-other-weights"]
    rest = ["--max-model-len", "64", "--", "x"]
    assert cli.run(["serve", "--model", "m", "--store", str(tmp_path), *words, "--", *rest]) == 0
    plain, full = served
    assert plain == Settings("m", tmp_path, "127.0.0.1", 8000, 1 << 30, False, ())
    assert full == Settings("m", tmp_path, "127.0.0.1", 81, 1 << 29, True, tuple(rest))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--store", "."], "model is required"),
        (["--model", "m"], "store must be the folder of a PrefixStore (--store), got none"),
        (["--model", "m", "--store", "nowhere"], "got 'nowhere', which is no folder"),
        (["--model", "m", "--store", ".", "--memory-gib", "-1"], "memory_gib must be >= 0, got -1.0"),
        (["--model", "m", "--store", ".", "--engine", "x"], "engine"),
        (["--model", "m", "--store", ".", "--max-model-len", "64"], "unknown option --max-model-len"),
    ],
)
def test_wrong_usage(served, capsys, words, message):
    assert cli.run(["serve", *words]) == 2
    assert message in capsys.readouterr().err and not served


def test_without_vllm(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ctkernels.cli.serve.find_spec", lambda name: None)
    assert cli.run(["serve", "--model", "m", "--store", str(tmp_path)]) == 2
    assert "engine vllm needs vLLM, which is not installed: it comes with the extra [vllm]" in capsys.readouterr().err
