"""Fixtures of the tuning tests."""

import pytest
import torch

from tests.tuning.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from tests.tuning.tiny_models import make_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved model with its tokenizer, and a task."""
    folder = tmp_path_factory.mktemp("cli")
    make_model("llama", torch.float32).save_pretrained(folder / "model")
    char_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl", DEMONSTRATIONS)
    write_jsonl(folder / "test.jsonl", DEMONSTRATIONS[::-1])
    return folder
