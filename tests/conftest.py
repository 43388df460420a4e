"""Settings shared by all tests: property-based tests draw the same examples on every run, a thorough profile more.

`CTKERNELS_TEST_PROFILE=thorough pytest tests/op` draws thirty times as many examples, new ones on every run;
`interpreter` draws fewer, for kernels that Triton's interpreter runs, some thousand times slower than compiled ones.
"""

import os
import tempfile

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
    """What is proved about model classes is kept between runs, away from the user's own."""
    kept = config.cache.mkdir("ctkernels") if hasattr(config, "cache") else tempfile.mkdtemp()
    os.environ.setdefault("CTKERNELS_CACHE", str(kept))
