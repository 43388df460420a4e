"""The README's Python runs as it stands, on a tiny model in the place of the pretrained one."""

import re
from pathlib import Path

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_op_block():
    names = {}
    exec(BLOCKS[0], names)
    prefix_k, q = names["prefix_k"], names["q"]
    assert names["out"].shape == q.shape
    assert prefix_k.grad.shape == prefix_k.shape and prefix_k.grad.abs().sum() > 0


@pytest.fixture
def tiny_checkpoint(tmp_path):
    model = make_model("llama", torch.float32, max_position_embeddings=4096)
    model.save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tuning_block(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    code = BLOCKS[1].replace(".models/smollm2-135m", str(tiny_checkpoint))
    assert code != BLOCKS[1]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    accuracy = float(capsys.readouterr().out.splitlines()[0])
    assert 0 <= accuracy <= 1
    assert len(names["result"].history) == 25
    assert torch.equal(names["prefix"].keys[0], names["result"].prefix.keys[0])
