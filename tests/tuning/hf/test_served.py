"""The shipped table of model classes: complete, and true for every class that it says is served.

`make test-models` writes it anew; this is its fast half.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from ctkernels.testing.classes import Case, build, cases, model_types
from ctkernels.tuning.hf import prove
from ctkernels.tuning.hf.discover import find_layout
from ctkernels.tuning.hf.kinds import class_name
from ctkernels.tuning.hf.served import kind_digest, shipped, table
from ctkernels.tuning.hf.tiny import shrink
from tools.models.page import PAGE, RESULTS, page

AGAIN = "run `make test-models`, look at what has changed, and commit it"
CHECKS = ("rows behind contexts of several lengths", "left padding", "generation", "the prefix's gradient")
TABLE = shipped()
# one default configuration of each class; several model types may have the same
_SERVED = ((name, entry) for name, entry in TABLE["models"].items() if entry["configurations"][0]["reason"] is None)
SERVED = {entry["class"]: name for name, entry in _SERVED}
DEFAULTS = {case.model_type: case for case in cases() if case.name == "default"}


def test_every_class_has_a_verdict():
    """A transformers release with new classes must not go by unnoticed."""
    assert TABLE["transformers"] == transformers.__version__, AGAIN
    assert model_types().keys() == TABLE["models"].keys(), AGAIN
    for name, entry in TABLE["models"].items():
        assert entry["class"].endswith(f".{model_types()[name]}"), AGAIN
        for row in entry["configurations"]:
            assert row["reason"] is None or len(row["reason"]) > 20


def test_no_verdict_is_in_doubt():
    """What is served is equal to rounding, and would be far from it with another context."""
    rows = [row for entry in TABLE["models"].values() for row in entry["configurations"] if row["reason"] is None]
    assert all(row["difference"] < 1e-12 and row["effect"] > 1e-2 for row in rows)
    assert len(SERVED) >= 75


def case_of(model_type: str):
    model_class, config = build(DEFAULTS[model_type])
    with torch.device("meta"):
        layout = find_layout(model_class._from_config(shrink(config)))
    return model_class, config, layout


@pytest.mark.parametrize("model_type", SERVED.values())
def test_served(model_type):
    model_class, config, layout = case_of(model_type)
    row = TABLE["models"][model_type]["configurations"][0]
    assert kind_digest(model_class, config, layout) == row["kind"], AGAIN
    assert table()[row["kind"]].reason is None
    verdict = prove(model_class, config, layout, CHECKS)
    assert verdict.reason is None and verdict.difference < 1e-12


def test_a_class_that_is_named_twice():
    """Model types that share a class."""
    for name, entry in TABLE["models"].items():
        assert class_name(build(DEFAULTS[name])[0]) == entry["class"]


def test_cases_say_what_they_are():
    """Names are unique within a model type, so that the table can be read."""
    names = [(case.model_type, case.name) for case in cases()]
    assert len(set(names)) == len(names)
    assert Case("llama", "default", "LlamaForCausalLM") in cases()


def test_the_page_shows_the_tables():
    results = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("drop_in", "overhead"))
    assert PAGE.read_text() == page(TABLE, *results), "run `python -m tools.models.page`"
