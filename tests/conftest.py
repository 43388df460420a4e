"""Settings and fixtures shared by all tests. Property-based tests draw the same examples on every run.

`CTKERNELS_TEST_PROFILE=thorough pytest tests/op` draws thirty times as many examples, new ones on every run;
`interpreter` draws fewer, for kernels that Triton's interpreter runs, some thousand times slower than compiled ones.
"""

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

COMMON = dict(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.register_profile("default", derandomize=True, database=None, max_examples=30, **COMMON)
settings.register_profile("interpreter", derandomize=True, database=None, max_examples=8, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("CTKERNELS_TEST_PROFILE", "default"))


def pytest_configure(config):
    """What is proved about model classes is kept between runs, apart from the user's own proofs."""
    kept = config.cache.mkdir("ctkernels") if hasattr(config, "cache") else tempfile.mkdtemp()
    os.environ.setdefault("CTKERNELS_CACHE", str(kept))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved model with its tokenizer, and a task."""
    import torch  # here, so that the tests of the op run where transformers is missing

    from ctkernels.testing.models import make_model
    from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl

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
