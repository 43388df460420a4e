"""Fixtures of the tuning tests."""

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved model with its tokenizer, and a task."""
    folder = tmp_path_factory.mktemp("cli")
    make_model("llama", torch.float32).save_pretrained(folder / "model")
    char_tokenizer().save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl", DEMONSTRATIONS)
    write_jsonl(folder / "test.jsonl", DEMONSTRATIONS[::-1])
    return folder
