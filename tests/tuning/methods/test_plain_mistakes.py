"""What people hand to the Python API: accepted where the meaning is clear, else one sentence."""

import json

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, write_jsonl
from ctkernels.tuning.data.demonstrations import DataError, Demonstration, as_demonstrations
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.auto import autotune
from ctkernels.tuning.methods.tune import tune
from tests.tuning.runs import ITEMS, TOKENIZER, assert_same_bits

DICTS = [{"input": d.input, "output": d.output, "options": list(d.options), "label": 3} for d in DEMONSTRATIONS]
SHORT = {"epochs": 1, "lr": 1e-2}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


def test_pairs_as_people_have_them(model, tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", DEMONSTRATIONS)
    expected = tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", get_method("ct-kv").settings(**SHORT)).adapter
    for pairs in (DICTS, tuple(DICTS), iter(DICTS), file, str(file), [*DEMONSTRATIONS[:2], *DICTS[2:]]):
        assert_same_bits(tune(model, TOKENIZER, pairs, "ct-kv", SHORT).adapter, expected)
    items = [{"input": d.input, "output": d.output, "options": d.options} for d in ITEMS]
    assert expected.evaluate(model, TOKENIZER, items).nll == expected.evaluate(model, TOKENIZER, ITEMS).nll


def test_rows_of_a_dataset(model):
    datasets = pytest.importorskip("datasets")  # comes with lm_eval
    whole = datasets.Dataset.from_list(DICTS)
    assert as_demonstrations(whole, "demonstrations") == tuple(DEMONSTRATIONS)
    with pytest.raises(TypeError, match="demonstrations must be a list of pairs, got a mapping with train, test; give"):
        as_demonstrations(datasets.DatasetDict({"train": whole, "test": whole}), "demonstrations")


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        (DEMONSTRATIONS[0], "demonstrations must be a list of pairs, got Demonstration"),
        (DICTS[0], "demonstrations must be a list of pairs, got dict"),
        (7, "demonstrations must be a list of pairs, got int 7"),
        ([("a", "b")], r"demonstrations\[0\]: expected an object with input and output, got tuple"),
        ([DICTS[0], {"text": "a"}], r"demonstrations\[1\]: the field 'input' is missing; the fields are \['text'\]"),
        ("no/such.jsonl", "cannot read no/such.jsonl"),
    ],
)
def test_no_pairs(model, pairs, why):
    for call in (tune, autotune):
        with pytest.raises((TypeError, DataError), match=why):
            call(model, TOKENIZER, pairs, "ct-kv")


def test_names_instead_of_a_model_or_tokenizer(model, tmp_path):
    for call in (tune, autotune):
        with pytest.raises(TypeError, match=r"load it with AutoModelForCausalLM.from_pretrained\('some/model'\)"):
            call("some/model", TOKENIZER, DEMONSTRATIONS)
        with pytest.raises(TypeError, match=r"tokenizer must be loaded, got its name .*; load it with AutoTokenizer"):
            call(model, tmp_path, DEMONSTRATIONS)


def test_settings_as_a_mapping(model):
    with pytest.raises(ValueError, match="ct-kv does not read 'epoch'"):
        tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", {"epoch": 3})
    with pytest.raises(TypeError, match="settings must be CtKvOptions or TrainSettings, got list"):
        tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", [3])


def test_outputs_with_the_delimiter_are_reported_before_tuning(model):
    pairs = [Demonstration("ice", "very cold"), Demonstration("fire", "hot"), Demonstration("sun", "hot")]
    with pytest.warns(UserWarning, match="1 of 3 outputs contain the delimiter ' '.*the first is 'very cold'"):
        tune(model, TOKENIZER, pairs, "ct-kv", SHORT)


def test_what_is_written_is_what_was_meant(model, tmp_path):
    adapter = tune(model, TOKENIZER, DICTS, "ct-kv", SHORT).adapter
    adapter.save_pretrained(tmp_path)
    assert json.dumps(adapter.prefix.metadata.settings)  # plain values
