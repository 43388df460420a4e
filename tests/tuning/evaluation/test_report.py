"""Tables, significance and figures against cases worked out by hand."""

import pytest
import torch

from ctkernels.tuning.evaluation.sweep import significance
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.figures import write_figures
from ctkernels.tuning.evaluation.sweep.report import make_report
from ctkernels.tuning.evaluation.sweep.significance import hierarchical_bootstrap, holm, sign_flip_test
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec, split_words


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3], 2 / 8),  # of the sums 6 4 2 0 0 -2 -4 -6, two are as far from 0 as 6
        ([3, 1, -1], 6 / 8),  # 5 3 3 1 -1 -3 -3 -5: six as far as 3
        ([1, -1], 1.0),
        ([0.5, 0, 0, 0.5], 2 / 4),  # zeros say nothing
        ([0, 0], 1.0),
        ([0.1] * 5 + [-0.1], 14 / 64),  # at least five of six signs alike: 2 * (1 + 6)
        ([-0.1] * 8, 2 / 256),
    ],
)
def test_sign_flip_test(differences, p):
    assert sign_flip_test(differences) == pytest.approx(p)
    assert sign_flip_test([-d for d in differences]) == pytest.approx(p)  # two-sided


def test_many_differences_are_sampled_and_agree_with_enumeration(monkeypatch):
    differences = [(-1) ** i * 0.01 * i + 0.02 for i in range(1, 15)]
    exact = sign_flip_test(differences)
    assert 0.2 < exact < 0.8
    monkeypatch.setattr(significance, "MOST_ENUMERATED", 3)
    sampled = sign_flip_test(differences)
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=4 * (0.25 / significance.DRAWS) ** 0.5)
    assert sign_flip_test(differences) == sampled  # the seed is fixed
    assert sign_flip_test([1.0] * 60) == 1 / (significance.DRAWS + 1)  # never 0


def test_bad_differences():
    with pytest.raises(ValueError, match="at least one number"):
        sign_flip_test([])
    with pytest.raises(ValueError, match="must be finite"):
        sign_flip_test([1.0, float("nan")])


def test_bootstrap_by_hand():
    """Two tasks with two seeds: 2.5% of the draws lie below b, b with the seeds 0.2 and 0.3 (1/64 of them have 0.2
    twice in both)."""
    found = hierarchical_bootstrap({"a": [0.5, 0.6], "b": [0.3, 0.2]})
    assert (found.mean, found.low, found.high) == (pytest.approx(0.4), pytest.approx(0.225), pytest.approx(0.575))
    assert hierarchical_bootstrap({"a": [0.5, 0.6], "b": [0.3, 0.2]}) == found  # the seed is fixed
    one = hierarchical_bootstrap({"a": [0.5], "b": [0.5]})
    assert (one.mean, one.low, one.high) == (0.5, 0.5, 0.5)
    uneven = hierarchical_bootstrap({"a": [0.0] * 5, "b": [1.0]})  # tasks count alike
    assert (uneven.mean, uneven.low, uneven.high) == (0.5, 0.0, 1.0)
    for bad in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one number of each task"):
            hierarchical_bootstrap(bad)


def test_the_width_of_the_bootstrap_is_that_of_both_variances():
    """Many tasks: nearly normal, with the variance over tasks plus the mean variance over seeds / number of seeds."""
    draw = torch.Generator().manual_seed(5)
    level = torch.randn(60, 1, generator=draw, dtype=torch.float64)
    table = level + 2 * torch.randn(60, 4, generator=draw, dtype=torch.float64)
    found = hierarchical_bootstrap({str(n): row.tolist() for n, row in enumerate(table)})
    variance = table.mean(dim=1).var(correction=0) + table.var(dim=1, correction=0).mean() / 4
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(variance / 60) ** 0.5, rel=0.03)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def cell(method, task, seed, score, error=None, **more) -> CellResult:
    return CellResult(task, method, seed, {}, error=error, metric="accuracy", score=score, accuracy=score, **more)


def results() -> list[CellResult]:
    """Three tasks and two seeds; the second method lacks one cell of the third task."""
    scores = {
        "icl": {("a", 1): 0.50, ("a", 2): 0.60, ("b", 1): 0.30, ("b", 2): 0.20, ("c", 1): 0.9, ("c", 2): 0.9},
        "ct-kv": {("a", 1): 0.80, ("a", 2): 0.60, ("b", 1): 0.50, ("b", 2): 0.30, ("c", 1): 0.1},
    }
    found = [
        cell(method, task, seed, score, gold_loss=score + 1, seconds=10 * seed, cpu_seconds=8 * seed)
        for method, by in scores.items()
        for (task, seed), score in by.items()
    ]
    return [*found, cell("ct-kv", "c", 2, 0.0, error="c.jsonl:3: no")]


def test_report_by_hand():
    report = make_report("a sweep", results(), planned=6)
    assert (report.tasks, report.left_out, report.seeds) == (["a", "b"], ["c"], [1, 2])
    assert report.failures == ["ct-kv on c, seed 2: c.jsonl:3: no"]
    icl, ct_kv = report.summaries
    assert (icl.method, ct_kv.method) == ("icl", "ct-kv")
    assert (icl.score, ct_kv.score) == (pytest.approx(0.40), pytest.approx(0.55))
    assert icl.spread == pytest.approx(0.0)  # 0.4 with either seed
    assert ct_kv.spread == pytest.approx(0.2 / 2**0.5)  # 0.65 and 0.45
    assert (icl.gold_loss, icl.seconds) == (pytest.approx(1.4), pytest.approx(15))
    assert (icl.finished, ct_kv.finished) == (6, 5)
    (pair,) = report.comparisons
    assert (pair.a, pair.b, pair.pairs, pair.better, pair.worse) == ("icl", "ct-kv", 4, 0, 3)
    assert pair.difference == pytest.approx(-0.15)
    assert pair.p == pytest.approx(2 / 8) and pair.p_holm == pair.p  # three differences, all of one sign
    assert pair.p_tasks == pytest.approx(2 / 4)
    text = report.markdown()
    assert "| icl | 40.0 ± 0.0 | 22.5 to 57.5 | - | 40.0 | - | - | - | - | 1.400 | 15.0 | 12.0 | 6/6 |" in text
    assert "| ct-kv | 55.0 ± 14.1 | 35.0 to 75.0 | - | 55.0 | - | - | - | - | 1.550 | 15.0 | 12.0 | 5/6 |" in text
    assert "majority class |" not in text and "Calibrated" not in text
    assert "| icl | ct-kv | -15.0 | -25.0 to -5.0 | 0 / 3 of 4 | 0.2500 | 0.2500 | 0.5000 |" in text
    assert "Left out, since a method lacks a result: c." in text
    assert "| c | 90.0 | 10.0 |" in text  # the table by task has what there is
    assert "- ct-kv on c, seed 2: c.jsonl:3: no" in text


def test_plain_and_calibrated_side_by_side():
    """Task b has no calibration, since its items do not share their options: its plain numbers count."""
    offsets = {"offsets": {"calibrate": "batch"}, "score": 0.9, "accuracy": 0.8, "nll": 0.5, "ece": 0.1}
    worth = {"nll": 1.5, "ece": 0.3}
    always = {"option": "x", "score": 0.2, "accuracy": 0.4}
    a = [cell("icl", "a", s, 0.5, calibrated=offsets, majority={**always, "score": 0.1 * s}, **worth) for s in (1, 2)]
    b = [cell("icl", "b", s, 0.3, **worth) for s in (1, 2)]
    report = make_report("x", [*a, *b], planned=4)
    (icl,) = report.summaries
    assert (icl.score, icl.calibrated) == (pytest.approx(0.4), pytest.approx((0.9 + 0.3) / 2))
    assert (icl.calibrated_nll, icl.calibrated_ece) == (pytest.approx((0.5 + 1.5) / 2), pytest.approx((0.1 + 0.3) / 2))
    assert (report.calibrate, report.uncalibrated, report.majority) == ("batch", ["b"], None)
    text = report.markdown()
    assert "| icl | 40.0 ± 0.0 | 30.0 to 50.0 | 60.0 | 40.0 | 1.500 | 1.000 | 30.0 | 20.0 |" in text
    assert "Calibrated (batch): an offset is subtracted from the loss of each option. Not calibrated: b." in text
    assert "| task | icl | majority class |" in text and "| a | 50.0 | 15.0 |" in text and "| b | 30.0 |  |" in text
    whole = make_report("x", a, planned=2)
    assert (whole.majority.score, whole.majority.accuracy) == (pytest.approx(0.15), pytest.approx(0.4))
    assert "| majority class | 15.0 | - | - | 40.0 | - |" in whole.markdown()


def test_report_of_one_seed_and_of_nothing():
    one = make_report("x", [cell("icl", "a", 1, 0.5)], planned=1)
    assert one.summaries[0].spread is None and "| icl | 50.0 | 50.0 to 50.0 | - | 50.0 |" in one.markdown()
    assert "Paired" not in one.markdown()
    none = make_report("x", [cell("icl", "a", 1, 0.0, error="no")], planned=1)
    assert (none.summaries, none.comparisons, none.left_out) == ([], [], ["a"])
    assert "- icl on a, seed 1: no" in none.markdown()


def test_figures(tmp_path):
    report = make_report("x", results(), planned=6)
    assert [path.name for path in write_figures(report, tmp_path)] == ["score_against_seconds.png"]
    variants = [cell(m, "a", s, 0.5) for m in ("ct-kv", "icl", "ct-kv:drop_p=0") for s in (1, 2)]
    written = write_figures(make_report("x", variants, planned=2), tmp_path)
    assert [path.name for path in written] == ["score_against_seconds.png", "ablation.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert write_figures(make_report("x", [], planned=0), tmp_path) == []


def test_a_method_with_settings_is_one_word():
    spec = MethodSpec.parse("ct-kv:lr=1e-3:leave_one_out=none:rank=none:pull=0.5:fisher=true")
    assert spec.overrides == {"lr": 1e-3, "leave_one_out": "none", "rank": None, "pull": 0.5, "fisher": True}
    settings = spec.settings(seed=5, lr=0.5)
    assert (settings.lr, settings.seed, settings.leave_one_out) == (1e-3, 5, "none")
    assert MethodSpec.parse(str(spec)) == spec
    assert MethodSpec.parse("ttt:lora_targets=q_proj+v_proj").settings().lora_targets == ("q_proj", "v_proj")
    assert MethodSpec("ct-kv").settings("nlp-lr").epochs == 250
    assert MethodSpec.parse("ct-kv:epochs=3").settings("nlp-lr").epochs == 3
    assert MethodSpec("icl").settings(epochs=3, seed=2) == MethodSpec("icl").settings(seed=2)  # what it does not read
    with pytest.raises(ValueError, match="there is no setting 'epoch'; there are seed,"):
        MethodSpec("icl").settings(epoch=3)
    with pytest.raises(ValueError, match="epochs must be at least 0, got -1"):
        MethodSpec("icl").settings(epochs=-1)
    assert split_words(("icl,ct-kv", "ttt, icl")) == ["icl", "ct-kv", "ttt"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ctkv:lr=1", "did you mean 'ct-kv'"),
        ("ct-kv:lr", "written ct-kv:setting=value, got 'ct-kv:lr'"),
        ("ct-kv:lr=fast", "ct-kv:lr=fast: lr must be a number, got 'fast'"),
        ("ct-kv:epochs=1.5", "epochs must be a whole number, got '1.5'"),
        ("ct-kv:fisher=yes", "fisher must be true or false, got 'yes'"),
        ("ct-kv:leave_one_out=me", "leave_one_out must be one of none, self, suffix, power, got 'me'"),
        ("ct-kv:drop_p=1", "drop_p must be in"),
        ("icl:drop_p=0.1", "icl does not read 'drop_p'"),
    ],
)
def test_wrong_words_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        MethodSpec.parse(word)
