"""What different files say about versions and extras agrees."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PINNED = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))


def test_the_lower_bound_of_torch_is_the_one_that_is_tested():
    (bound,) = set(re.findall(r'"torch>=([\d.]+)"', PYPROJECT))
    (oldest,) = re.findall(r"^OLDEST \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert oldest == f"{bound}.0"


def test_every_extra_is_pinned_and_no_pin_is_below_its_bound():
    """requirements.txt is what the tests run with; torch itself is installed before it."""
    pins = {re.sub(r"[_.]", "-", name).lower(): version for name, version in PINNED.items()}
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", PYPROJECT, re.DOTALL)[1]
    listed = re.findall(r'"([A-Za-z][\w.-]*)(?:>=([\d.]+))?"', extras)
    assert len(listed) > 15
    for name, bound in listed:
        version = pins[re.sub(r"[_.]", "-", name).lower()]
        assert not bound or numbers(version) >= numbers(bound), (name, version, bound)


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
