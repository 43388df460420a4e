"""Offsets, forms of the score and what probabilities are worth: by hand, and against the stock model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, SPACE, char_tokenizer, ids
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.file import FILE_NAME, read_file, write_file
from ctkernels.tuning.data import DataError, Demonstration, encode_context
from ctkernels.tuning.data.demonstrations import parse_demonstration
from ctkernels.tuning.data.metrics import score_predictions
from ctkernels.tuning.evaluation.calibration import (
    Offsets,
    choose,
    fitted_offsets,
    mean_offsets,
    probabilities,
    reliability,
    shifted,
)
from ctkernels.tuning.evaluation.evaluate import evaluate_prefix, majority
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune

TOKENIZER = char_tokenizer()
CONTEXT = encode_context(TOKENIZER, DEMONSTRATIONS).input_ids
OPTIONS = ("warm", "cold", "ok")
ITEMS = [
    Demonstration("sleet", "cold", OPTIONS),
    Demonstration("a stove", "warm", OPTIONS),
    Demonstration("tea", "ok", OPTIONS),
    Demonstration("a glacier", "cold", OPTIONS),
]


def choice(*shares: float, output: str = "a") -> tuple[dict[str, float], Demonstration]:
    """Losses whose probabilities are `shares`, of options a, b, ..., and an item."""
    options = "abc"[: len(shares)]
    losses = {option: 7.0 - math.log(share) for option, share in zip(options, shares, strict=True)}
    return losses, Demonstration("x", output, tuple(options))


def test_mean_offsets_by_hand():
    losses = [{"a": 1.0, "b": 2.0}, {"a": 1.5, "b": 1.0}, {"a": 2.0, "b": 4.5}]
    offsets = mean_offsets(losses)
    assert offsets == {"a": 1.5, "b": 2.5}
    assert shifted(losses[2], offsets) == {"a": 0.5, "b": 2.0}
    assert [choose(of_item) for of_item in losses] == ["a", "b", "a"]
    assert [choose(shifted(of_item, offsets)) for of_item in losses] == ["a", "b", "a"]
    assert choose(shifted({"a": 1.0, "b": 1.5}, offsets)) == "b"  # a has the lower loss
    assert choose({"b": 1.0, "a": 1.0}) == "b"  # of equal ones the first


@pytest.mark.parametrize(("right", "count"), [(2, 4), (3, 4), (4, 4), (0, 3)])
def test_fitted_offsets_are_where_the_derivative_vanishes(right, count):
    """All items have the same losses, a is right in `right` of them: with x = b_a - loss_a = loss_b - b_b,

    sum of NLL + prior = -right log s(2x) - (count - right) log s(-2x) + x^2      derivative 0 at
    x = right - count * s(2x), where s is the sigmoid
    """
    items = [choice(0.5, 0.5, output="a" if i < right else "b")[1] for i in range(count)]
    offsets = fitted_offsets([{"a": 1.0, "b": 3.0}] * count, items)
    x = offsets["a"] - 1.0
    assert offsets["b"] == pytest.approx(3.0 - x, abs=1e-9)
    assert x == pytest.approx(right - count / (1 + math.exp(-2 * x)), abs=1e-6)
    assert (x == pytest.approx(0, abs=1e-9)) == (2 * right == count)
    assert abs(x) < 1.2  # four items of one class do not rule the other out


def test_nll_and_calibration_error_by_hand():
    cases = [choice(0.92, 0.08), choice(0.94, 0.06, output="b"), choice(0.64, 0.36, output="b"), choice(0.3, 0.5, 0.2)]
    losses, items = zip(*cases, strict=True)
    worth = reliability(losses, items)
    assert worth.nll == pytest.approx(-(math.log(0.92) + math.log(0.06) + math.log(0.36) + math.log(0.3)) / 4)
    # bins: {0.92 right, 0.94 wrong}, {0.64 wrong}, {0.5 wrong}
    assert worth.ece == pytest.approx((abs(1 - (0.92 + 0.94)) + 0.64 + 0.5) / 4)
    assert probabilities(losses[3]) == pytest.approx({"a": 0.3, "b": 0.5, "c": 0.2})
    sure = reliability([{"a": 0.0, "b": 1e4}], items[:1])
    assert (sure.nll, sure.ece) == (0.0, 0.0)  # a probability of 1 is in the last bin


def test_several_right_options():
    both = Demonstration("x", "a", ("a", "b", "c"), references=[2])
    assert both.references == ("c",) and both.right == {"a", "c"}
    losses = choice(0.3, 0.5, 0.2)[0]
    assert reliability([losses], [both]).nll == pytest.approx(-math.log(0.5))
    other = Demonstration("y", "b", ("a", "b", "c"))
    assert score_predictions("accuracy", ["c", "c"], [both, other]) == 0.5
    # c counts as the label of the first item: F1 of c is 2 * 1 / (2 + 1), of b 0
    assert score_predictions("macro_f1", ["c", "c"], [both, other]) == pytest.approx((2 / 3 + 0) / 2)
    assert majority([both, other, other], "accuracy").option == "b"
    assert majority([both, Demonstration("y", "c", ("a", "b", "c"))], "accuracy").accuracy == 1.0
    assert majority([other, Demonstration("y", "a", ("a", "b"))], "accuracy") is None
    with pytest.raises(ValueError, match="references must be options or indices below 3, got 3"):
        Demonstration("x", "a", ("a", "b", "c"), references=[3])
    with pytest.raises(ValueError, match="references: 'd' is not one of the options"):
        Demonstration("x", "a", ("a", "b", "c"), references=["d"])
    record = {"input": "x", "output": "a", "options": ["a", "a", "b"], "references": [2]}
    assert parse_demonstration(record, "f:1").right == {"a", "b"}  # an index in the list as it is given


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def adapter(model):
    return tune(model, TOKENIZER, DEMONSTRATIONS, "icl").adapter


@torch.no_grad()
def stock_losses(model, text: str, score: str) -> dict[str, float]:
    """The loss of each option behind the demonstrations and an input, each a run of its own."""
    prompt = (*CONTEXT.tolist(), SPACE, *TOKENIZER(text, add_special_tokens=False).input_ids, SPACE)
    losses = {}
    for option in OPTIONS:
        logits = model(torch.tensor([prompt + ids(option)])).logits[0, len(prompt) - 1 : -1]
        tokens = -log_softmax(logits, dim=-1)[range(len(option)), list(ids(option))]
        losses[option] = {"mean": tokens.mean(), "sum": tokens.sum(), "first-token": tokens[0]}[score].item()
    return losses


@pytest.mark.parametrize("score", ["mean", "sum", "first-token"])
@pytest.mark.parametrize("calibrate", ["none", "batch", "dev", "content-free"])
def test_evaluation_is_what_the_stock_model_says(model, adapter, score, calibrate):
    result = adapter.evaluate(
        model, TOKENIZER, ITEMS, score=score, calibrate=calibrate, validation=DEMONSTRATIONS[:3], max_tokens=30
    )
    losses = [stock_losses(model, item.input, score) for item in ITEMS]
    assert result.predictions == [choose(of_item) for of_item in losses]
    assert result.nll == pytest.approx(reliability(losses, ITEMS).nll, abs=1e-6)
    assert result.ece == pytest.approx(reliability(losses, ITEMS).ece, abs=1e-6)
    gold = [stock_losses(model, item.input, "mean")[item.output] for item in ITEMS]
    assert result.gold_loss == pytest.approx(sum(gold) / 4, abs=1e-6)
    assert (result.majority.option, result.majority.accuracy) == ("cold", 0.5)
    assert result.majority.score == pytest.approx((2 / 3 + 0 + 0) / 3)
    if calibrate == "none":
        assert result.calibrated is None
        return
    others = {
        "batch": ITEMS,
        "dev": DEMONSTRATIONS[:3],
        "content-free": [replace(ITEMS[0], input=t) for t in ("N/A", "[MASK]")],
    }
    seen = [stock_losses(model, item.input, score) for item in others[calibrate]]
    if calibrate == "content-free":
        seen.append(stock_losses(model, "", score))
    expected = fitted_offsets(seen, DEMONSTRATIONS[:3]) if calibrate == "dev" else mean_offsets(seen)
    assert result.calibrated.offsets.values == pytest.approx(expected, abs=1e-6)
    calibrated = [shifted(of_item, expected) for of_item in losses]
    assert result.calibrated.predictions == [choose(of_item) for of_item in calibrated]
    assert result.calibrated.nll == pytest.approx(reliability(calibrated, ITEMS).nll, abs=1e-6)
    assert result.calibrated.score == score_predictions("macro_f1", result.calibrated.predictions, ITEMS)


def test_what_cannot_be_calibrated(model, adapter):
    other = Demonstration("tea", "hot", ("hot", "mild"), source="test.jsonl:9")
    with pytest.raises(DataError, match=r"^test.jsonl:9: calibrate='batch' needs items that share their options, got"):
        adapter.evaluate(model, TOKENIZER, [*ITEMS, other], calibrate="batch")
    with pytest.raises(DataError, match="calibrate='dev' needs validation items, got none"):
        adapter.evaluate(model, TOKENIZER, ITEMS, calibrate="dev")
    with pytest.raises(DataError, match=r"^test.jsonl:9: calibrate='dev' needs items that share their options"):
        adapter.evaluate(model, TOKENIZER, ITEMS, calibrate="dev", validation=[other])
    with pytest.raises(DataError, match="calibrate='batch' needs options to choose from, and answers are generated"):
        adapter.evaluate(model, TOKENIZER, ITEMS, by="generation", calibrate="batch")
    with pytest.raises(ValueError, match="calibrate must be one of none, batch, dev, content-free, got 'test'"):
        adapter.evaluate(model, TOKENIZER, ITEMS, calibrate="test")
    with pytest.raises(ValueError, match="score must be one of mean, sum, first-token, got 'max'"):
        adapter.evaluate(model, TOKENIZER, ITEMS, score="max")


def test_the_score_of_the_settings_is_that_of_the_evaluation(model):
    """Training and choosing read the same form."""
    settings = get_method("icl").settings(score="sum")
    adapter = tune(model, TOKENIZER, DEMONSTRATIONS, "icl", settings).adapter
    by_default, asked = (adapter.evaluate(model, TOKENIZER, ITEMS, **how) for how in ({}, {"score": "sum"}))
    assert by_default == asked
    assert by_default.nll != adapter.evaluate(model, TOKENIZER, ITEMS, score="mean").nll


def test_offsets_are_kept_with_the_adapter(model, adapter, tmp_path):
    found = adapter.evaluate(model, TOKENIZER, ITEMS, calibrate="batch").calibrated
    replace(adapter, offsets=found.offsets).save_pretrained(tmp_path)
    loaded = Adapter.from_pretrained(tmp_path, model, TOKENIZER)
    assert loaded.offsets == found.offsets
    assert loaded.evaluate(model, TOKENIZER, ITEMS).calibrated == found
    assert loaded.evaluate(model, TOKENIZER, ITEMS, calibrate="none").calibrated is None
    assert loaded.evaluate(model, TOKENIZER, ITEMS, score="sum").calibrated is None  # they are of another form
    others = [Demonstration("tea", "hot", ("hot", "mild"))]
    assert loaded.evaluate(model, TOKENIZER, others).calibrated is None  # of other options
    inputs = [item.input for item in ITEMS]
    served = loaded.option_probabilities(model, TOKENIZER, inputs, OPTIONS)
    assert [max(shares, key=shares.__getitem__) for shares in served] == found.predictions
    expected = [probabilities(shifted(stock_losses(model, text, "mean"), found.offsets.values)) for text in inputs]
    for shares, wanted in zip(served, expected, strict=True):
        assert shares == pytest.approx(wanted, abs=1e-6)
    plain = adapter.option_probabilities(model, TOKENIZER, inputs, OPTIONS)
    assert plain[0] == pytest.approx(probabilities(stock_losses(model, inputs[0], "mean")), abs=1e-6)
    assert evaluate_prefix(model, TOKENIZER, ITEMS, loaded.prefix).calibrated is None  # a prefix alone has none


def test_damaged_offsets_are_refused(model, adapter, tmp_path):
    replace(adapter, offsets=Offsets("batch", "mean", {"warm": 1.0})).save_pretrained(tmp_path)
    _, description, tensors = read_file(tmp_path, "adapter")
    description = json.loads(json.dumps(description))
    description["offsets"] = {"values": {}}
    write_file(tmp_path / FILE_NAME, "adapter", description, tensors)
    with pytest.raises(ValueError, match="damaged"):
        Adapter.from_pretrained(tmp_path)
