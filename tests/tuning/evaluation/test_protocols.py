"""Wrong answers, other orders, ensembles of orders: what methods see, what cells record, what the report says."""

import statistics
from dataclasses import replace

import pytest
import torch

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.perturb import noisy, ordered
from ctkernels.tuning.data.suites import get_suite
from ctkernels.tuning.evaluation.evaluate import EvalResult, ensemble
from ctkernels.tuning.evaluation.sweep.cells import SweepError
from ctkernels.tuning.evaluation.sweep.protocols import OrderSpread, Protocol, noise_scores, order_spreads
from ctkernels.tuning.evaluation.sweep.report import make_report
from ctkernels.tuning.evaluation.sweep.run import Sweep, run_sweep
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.methods.auto import autotune
from ctkernels.tuning.methods.tune import tune
from tests.tuning.evaluation.test_sweep import Quiet

TOKENIZER = char_tokenizer()
OPTIONS = ("warm", "cold", "ok")


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "warmth").mkdir(parents=True)
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / "warmth" / f"{split}.jsonl", DEMONSTRATIONS)
    return tmp_path / "data"


def sweep_of(folder, out, *words, **others) -> Sweep:
    specs = [MethodSpec.parse(word) for word in words]
    return Sweep(suite=get_suite("jsonl"), folder=folder, tasks=["warmth"], specs=specs, seeds=[13], out=out, **others)


def wrong(before, after):
    return {i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a.output != b.output}


def test_noise_changes_that_many_answers_to_other_options():
    pairs = [Demonstration(f"item {i}", OPTIONS[i % 3], OPTIONS) for i in range(20)]
    found = {share: noisy(pairs, share, 3) for share in (0, 0.1, 0.2, 0.4, 1)}
    assert {share: len(wrong(pairs, changed)) for share, changed in found.items()} == {
        0: 0,
        0.1: 2,
        0.2: 4,
        0.4: 8,
        1: 20,
    }
    for few, many in ((0.1, 0.2), (0.2, 0.4), (0.4, 1)):  # the same ones, wrong in the same way
        assert all(found[many][i] == found[few][i] for i in wrong(pairs, found[few]))
    assert [d.input for d in found[1]] == [d.input for d in pairs] and {d.output for d in found[1]} == {*OPTIONS}
    assert noisy(pairs, 0.4, 3) == found[0.4] != noisy(pairs, 0.4, 4)
    with pytest.raises(ValueError, match=r"noise must be in \[0, 1\], got 1.2"):
        noisy(pairs, 1.2, 3)


def test_noise_spares_answers_that_are_right_too_and_needs_others():
    both = [Demonstration(f"item {i}", "warm", OPTIONS, references=("ok",)) for i in range(6)]
    assert {d.output for d in noisy(both, 1.0, 0)} == {"cold"} and noisy(both, 1.0, 0)[0].references == ()
    free = [Demonstration("a", "one"), Demonstration("b", "two")]
    assert [d.output for d in noisy(free, 1.0, 0)] == ["two", "one"]
    with pytest.raises(DataError, match=r"x\.jsonl:1: there is no wrong answer to put in its place"):
        noisy([Demonstration("a", "one", source="x.jsonl:1")], 1.0, 0)


def test_orders_are_fixed_by_their_number_and_the_seed():
    assert ordered(range(9), 0, 1) == tuple(range(9))
    drawn = [ordered(range(9), order, seed) for order in (1, 2, 3) for seed in (1, 2)]
    assert len(set(drawn)) == 6 and all(sorted(d) == list(range(9)) for d in drawn)
    assert ordered(range(9), 2, 1) == drawn[2]


def test_words():
    spec = MethodSpec.parse("ct-kv:lr=0.1:noise=0.2:order=3")
    assert (str(spec), spec.overrides) == ("ct-kv:lr=0.1:noise=0.2:order=3", {"lr": 0.1})
    assert spec.protocol == Protocol(0.2, 3) and MethodSpec.parse(str(spec)) == spec
    assert str(MethodSpec.parse("icl:order=0")) == "icl"
    plain, own = MethodSpec.parse("icl"), MethodSpec.parse("icl:noise=0.5")
    assert [str(v) for v in plain.variants([0.0, 0.2], 2)] == [
        "icl",
        "icl:order=1",
        "icl:noise=0.2",
        "icl:noise=0.2:order=1",
    ]
    assert [str(v) for v in own.variants([0.0, 0.2], 2)] == ["icl:noise=0.5", "icl:noise=0.5:order=1"]
    assert [str(v) for v in MethodSpec.parse("icl:ensemble=3").variants([0.0], 4)] == ["icl:ensemble=3"]
    assert [str(v) for v in MethodSpec.parse("zero-shot").variants([0.0, 0.2], 4)] == ["zero-shot"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("icl:noise=2", r"noise must be in \[0, 1\], got 2.0"),
        ("icl:noise=some", "icl:noise=some: noise must be a number, got 'some'"),
        ("icl:order=-1", "order must be at least 0, got -1"),
        ("icl:ensemble=0", "ensemble must be at least 1, got 0"),
        ("icl:order=1:ensemble=2", "order and ensemble exclude each other: an ensemble takes the orders 0 to 1"),
        ("zero-shot:order=1", "zero-shot:order=1: zero-shot sees no demonstrations, to which order could be done"),
    ],
)
def test_words_that_cannot_be_used(word, message):
    with pytest.raises(ValueError, match=message):
        MethodSpec.parse(word)


def test_cells_see_and_record_what_was_done(model, folder, tmp_path):
    words = ("icl", "icl:noise=0.4", "icl:order=2", "ct-kv:epochs=1:noise=0.4:order=2")
    sweep = sweep_of(folder, tmp_path / "out", *words)
    results = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert [r.error for r in results] == [None] * 4
    worse = noisy(DEMONSTRATIONS, 0.4, 13)
    seen = [DEMONSTRATIONS, worse, ordered(DEMONSTRATIONS, 2, 13), ordered(worse, 2, 13)]
    assert [r.labels for r in results] == [[d.output for d in train] for train in seen]
    assert [{k: r.run[k] for k in ("noise", "order") if k in r.run} for r in results] == [
        {}, {"noise": 0.4}, {"order": 2}, {"noise": 0.4, "order": 2}
    ]  # fmt: skip
    for result, train in zip(results[:3], seen, strict=False):
        by_hand = tune(model, TOKENIZER, train, "icl").adapter.evaluate(model, TOKENIZER, DEMONSTRATIONS)
        assert by_hand.gold_loss == result.gold_loss
    assert len({r.gold_loss for r in results}) == 4
    again = Quiet()
    run_sweep(model, TOKENIZER, sweep, Workers(), again)
    assert again.computed == []


def test_an_ensemble_averages_the_losses_of_its_orders(model, folder, tmp_path):
    sweep = sweep_of(folder, tmp_path / "out", "icl:ensemble=3", calibrate="batch")
    (result,) = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert result.error is None
    orders = [ordered(DEMONSTRATIONS, order, 13) for order in range(3)]
    parts = [
        tune(model, TOKENIZER, train, "icl").adapter.evaluate(model, TOKENIZER, DEMONSTRATIONS, calibrate="batch")
        for train in orders
    ]
    means = [
        {option: statistics.mean(part.losses[i][option] for part in parts) for option in OPTIONS}
        for i in range(len(DEMONSTRATIONS))
    ]
    assert result.predictions == [min(of_item, key=of_item.__getitem__) for of_item in means]
    assert result.gold_loss == pytest.approx(statistics.mean(p.gold_loss for p in parts))
    assert len({p.gold_loss for p in parts}) == 3
    shift = {option: statistics.mean(of_item[option] for of_item in means) for option in OPTIONS}
    assert result.calibrated["offsets"]["values"] == pytest.approx(shift)
    chosen = [min(of_item, key=lambda o: of_item[o] - shift[o]) for of_item in means]
    assert result.calibrated["predictions"] == chosen
    assert ensemble(parts[:1], DEMONSTRATIONS).predictions == parts[0].predictions
    with pytest.raises(
        ValueError, match="an ensemble averages the losses of options, and not all of 1 results have some"
    ):
        ensemble([replace(parts[0], losses=None)], DEMONSTRATIONS)


def test_generated_answers_of_an_ensemble_vote(model, folder, tmp_path, monkeypatch):
    answers = iter([["a", "b"], ["c", "b"], ["c", "d"]])

    def generated(self, model, tokenizer, items, **options):
        found = [*next(answers), *["x"] * (len(items) - 2)]
        return EvalResult("exact_match", 0.0, 0.0, 1.0, len(items), found)

    monkeypatch.setattr(Adapter, "evaluate", generated)
    (result,) = run_sweep(model, TOKENIZER, sweep_of(folder, tmp_path / "out", "icl:ensemble=3"), Workers(), Quiet())
    assert result.predictions[:2] == ["c", "b"] and result.nll is None


def test_transferred_methods_start_from_the_sweeps_adapter(model, folder, tmp_path):
    other = tune(model, TOKENIZER, DEMONSTRATIONS[:2], "ct-kv", MethodSpec.parse("ct-kv:epochs=1").settings()).adapter
    words = ("ct-kv:epochs=0", "ct-kv:epochs=0:transferred=true")
    sweep = sweep_of(folder, tmp_path / "out", *words, start_from=other)
    plain, moved = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert (plain.error, moved.error) == (None, None) and "start_from" not in plain.run
    settings = MethodSpec.parse(words[0]).settings(seed=13)
    by_hand = tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", settings, start_from=other).adapter
    assert moved.gold_loss == by_hand.evaluate(model, TOKENIZER, DEMONSTRATIONS).gold_loss != plain.gold_loss
    third = tune(model, TOKENIZER, DEMONSTRATIONS[2:], "ct-kv", settings).adapter
    with pytest.raises(SweepError, match="belongs to another sweep: start_from was"):
        run_sweep(model, TOKENIZER, replace(sweep, start_from=third), Workers(), Quiet())
    (failed,) = run_sweep(model, TOKENIZER, sweep_of(folder, tmp_path / "b", words[1]), Workers(), Quiet())
    assert "transferred=true needs start_from, another task's adapter, got none" in failed.error
    with pytest.raises(ValueError, match="icl starts from nothing but its own task, so that"):
        MethodSpec.parse("icl:transferred=true")


def test_methods_without_settings_are_searched_for_in_a_sweep(model, folder, tmp_path):
    word = "ct-kv:drop_p=0:epochs=3:auto=true"
    (cell,) = run_sweep(model, TOKENIZER, sweep_of(folder, tmp_path, word), Workers(), Quiet())
    given = {"drop_p": 0.0, "epochs": 3, "seed": 13}
    by_hand = autotune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", given)
    assert cell.error is None and cell.run["auto"] is True and cell.steps == by_hand.epochs
    assert cell.gold_loss == by_hand.adapter.evaluate(model, TOKENIZER, DEMONSTRATIONS).gold_loss
    with pytest.raises(ValueError, match="icl trains nothing, so that there is nothing to search for"):
        MethodSpec.parse("icl:auto=true")


def test_the_tables_of_the_report():
    scores = {
        "icl": {("a", 1): 0.5, ("b", 1): 0.7},
        "icl:noise=0.2": {("a", 1): 0.3, ("b", 1): 0.5},
        "icl:order=1": {("a", 1): 0.7, ("b", 1): 0.7},
        "icl:order=2": {("a", 1): 0.6, ("b", 1): 0.4},
        "ct-kv:lr=1.0": {("a", 1): 0.9, ("b", 1): 0.9},
    }
    assert noise_scores(scores) == {"icl": {0.0: pytest.approx(0.6), 0.2: pytest.approx(0.4)}}
    spread = statistics.mean([statistics.stdev([0.5, 0.7, 0.6]), statistics.stdev([0.7, 0.7, 0.4])])
    (found,) = order_spreads({m: s for m, s in scores.items() if "noise" not in m})
    numbers = (found.mean, found.spread, found.worst, found.best)
    assert (found.method, found.orders) == ("icl", 3) and isinstance(found, OrderSpread)
    assert numbers == pytest.approx((0.6, spread, 0.45, 0.7))


def test_a_sweep_from_the_command_line(model, folder, tmp_path, capsys):
    files = tmp_path / "model"
    model.save_pretrained(files)
    TOKENIZER.save_pretrained(files)
    argv = ["eval", "--model", str(files), "--suite", "jsonl", "--data-dir", str(folder), "--threads", "1"]
    argv += ["--methods", "zero-shot,icl", "--seeds", "13", "--out", str(tmp_path / "out")]
    assert cli.run([*argv, "--noise", "0,0.4", "--orders", "2"]) == 0
    printed = capsys.readouterr().out
    assert "## Noisy answers" in printed and "| method | 0% | 40% |" in printed
    assert "## Order of the demonstrations" in printed and "| icl | 2 |" in printed
    assert "icl:noise=0.4:order=1" in printed and "zero-shot:" not in printed
    for flags, message in (
        (["--noise", "much"], "noise must be numbers, such as 0,0.2,0.4, got 'much'"),
        (["--noise", "2"], "noise must be in [0, 1], got 2.0"),
        (
            ["--start-from", "x"],
            "start_from is for methods with transferred=true, such as",
        ),
        (
            ["--methods", "ct-kv:transferred=true"],
            "ct-kv:transferred=true needs start_from, the folder of",
        ),
        (["--orders", "0"], "orders must be at least 1, got 0"),
    ):
        assert cli.run([*argv, *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_report_without_protocols_has_no_such_tables(model, folder, tmp_path):
    results = run_sweep(model, TOKENIZER, sweep_of(folder, tmp_path / "out", "icl"), Workers(), Quiet())
    report = make_report("x", results, planned=1)
    assert report.noise == {} and report.orders == [] and "Noisy" not in report.markdown()
