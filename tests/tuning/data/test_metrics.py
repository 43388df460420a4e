"""Scores against their definitions."""

import sys

import pytest

from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.metrics import accuracy, default_metric, macro_f1, score_predictions


def test_macro_f1_is_the_mean_over_the_labels_that_occur():
    outputs = ["a", "a", "a", "b"]
    # a: precision 2/2, recall 2/3, F1 0.8; b: precision 1/2, recall 1/1, F1 2/3
    assert macro_f1(["a", "a", "b", "b"], outputs) == pytest.approx((0.8 + 2 / 3) / 2)
    # c is predicted, but never right: it costs recall, and is no class of its own. a: 1/1, 1/3 -> 0.5; b: 0
    assert macro_f1(["a", "c", "c", "c"], outputs) == pytest.approx((0.5 + 0) / 2)
    # b is never predicted: F1 0. a: precision 3/4, recall 1
    assert macro_f1(["a", "a", "a", "a"], outputs) == pytest.approx((6 / 7) / 2)
    assert accuracy(["a", "c", "b", "b"], outputs) == 0.5


def test_bleu_takes_the_best_of_any_number_of_references():
    text = "the cat sat on the mat"
    items = [Demonstration("x", text), Demonstration("y", "a dog ran off", references=("one dog ran far off today",))]
    assert score_predictions("bleu", [text, "one dog ran far off today"], items) == pytest.approx(1)
    assert score_predictions("bleu", [text, "a dog ran off"], items) == pytest.approx(1)
    # every n-gram is there, four words of six: the brevity penalty exp(1 - 6 / 4) alone
    assert score_predictions("bleu", ["the cat sat on"], items[:1]) == pytest.approx(2.718281828 ** (1 - 6 / 4))
    assert score_predictions("bleu", ["zebra quilt"], items[:1]) == 0
    with pytest.raises(TypeError, match="references must be a list of strings, got str"):
        Demonstration("x", text, references="the cat")


def test_bleu_without_sacrebleu_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"needs the package sacrebleu \(pip install 'ctkernels\[suites\]'\)"):
        score_predictions("bleu", ["a"], [Demonstration("x", "a")])


def test_the_metric_follows_the_items():
    same = [Demonstration("x", "a", ("a", "b")), Demonstration("y", "b", ("b", "a"))]
    assert default_metric(same, "options") == "macro_f1"
    assert default_metric([*same, Demonstration("z", "c", ("a", "b", "c"))], "options") == "accuracy"
    assert default_metric(same, "generation") == "exact_match"
    with pytest.raises(ValueError, match="metric must be one of macro_f1, accuracy, exact_match, bleu, got 'f1'"):
        score_predictions("f1", ["a"], same[:1])
    assert score_predictions("exact_match", [" a "], same[:1]) == 1.0
