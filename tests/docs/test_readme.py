"""The README's Python and commands run as they stand, on a tiny model in the place of the pretrained one."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^ctkernels .*$", README.replace("\\\n", " "), re.MULTILINE)


def test_op_block():
    names = {}
    exec(BLOCKS[0], names)
    prefix_k, q = names["prefix_k"], names["q"]
    assert names["out"].shape == q.shape
    assert prefix_k.grad.shape == prefix_k.shape and prefix_k.grad.abs().sum() > 0


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the examples and, where `make demo` puts the pretrained model, a tiny one."""
    model = make_model("llama", torch.float32, max_position_embeddings=4096)
    model.save_pretrained(tmp_path / ".models/smollm2-135m")
    char_tokenizer().save_pretrained(tmp_path / ".models/smollm2-135m")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tuning_block(clone, capsys):
    names = {}
    exec(BLOCKS[1], names)
    accuracy = float(capsys.readouterr().out.splitlines()[0])
    assert 0 <= accuracy <= 1
    assert len(names["result"].history) == 25
    assert torch.equal(names["prefix"].keys[0], names["result"].prefix.keys[0])


def test_commands(clone, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert [command.split()[1] for command in COMMANDS] == ["tune", "eval"]
    for command in COMMANDS:
        assert cli.run(shlex.split(command)[1:]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("zero-shot", "icl", "runs/routing-cli"))


def test_it_is_a_tour_of_two_pages():
    assert len(README.splitlines()) <= 155
