"""Fixtures of the tuning tests."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

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


@pytest.fixture
def full_disk():
    """`with full_disk(count):` the system ends every file at `count` bytes, in the middle of a write."""

    @contextmanager
    def limited(count: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
