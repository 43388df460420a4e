"""Held-out demonstrations choose the epoch; the search chooses learning rate and epochs by them."""

import json
import math
from collections import Counter

import pytest
import torch

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.auto import Trial, autotune, make_plan
from ctkernels.tuning.methods.held_out import folds
from ctkernels.tuning.train.trainer import TrainingError
from tests.cli.test_cli import complaint, tune_arguments
from tests.tuning.runs import ITEMS, TOKENIZER, TRAINING, assert_same_bits, run

EPOCHS = 5
FREE = [Demonstration("red", "warm"), Demonstration("sea ice", "cold")]  # without options


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float64)


def loss_of(adapter, model) -> float:
    return adapter.evaluate(model, TOKENIZER, ITEMS, by="options").nll


@pytest.mark.parametrize("name", TRAINING)
def test_the_epoch_with_the_lowest_held_out_loss_is_the_result(name, model):
    """At a rate so high that later epochs are worse than earlier ones; each loss is that of the adapter itself."""
    options = {"lr": 0.3, "epochs": EPOCHS, **({"ttt_epochs": 1} if name == "ttt+ct-kv" else {})}
    found = run(name, model, options=options, held_out=ITEMS)
    curve = found.held_out
    assert len(curve) == EPOCHS + 1 and all(map(math.isfinite, curve))
    assert loss_of(found.adapter, model) == pytest.approx(min(curve), rel=1e-9)
    best = curve.index(min(curve))
    if name == "ttt+ct-kv":
        return  # its first loop, too, returns its best epoch
    cut = run(name, model, options=options, on_epoch=lambda record, module: record.epoch == best)
    if best:
        assert_same_bits(found.adapter, cut.adapter)
    else:
        assert_same_bits(found.adapter, run(name, model, options={**options, "epochs": 0}).adapter)


def test_some_run_keeps_an_epoch_that_is_not_the_last(model):
    """Else the test above would not see a result of the wrong epoch."""
    curves = [run("ct-kv", model, options={"lr": lr, "epochs": EPOCHS}, held_out=ITEMS).held_out for lr in (0.3, 1e-2)]
    assert any(0 < curve.index(min(curve)) < EPOCHS for curve in curves)


@pytest.mark.parametrize("options", [{"ema": 0.5}, {"rank": 2}, {"mlp_width": 4}, {"trained": "keys"}])
def test_looking_at_held_out_pairs_changes_no_step(model, options):
    plain = run("ct-kv", model, options=options)
    watched = run("ct-kv", model, options=options, held_out=ITEMS)
    assert [r.loss for r in plain.history] == [r.loss for r in watched.history]
    last = watched.held_out[-1]
    assert last == pytest.approx(loss_of(plain.adapter, model), rel=1e-9)


def test_without_options_the_loss_is_that_of_the_answers(model):
    found = run("ct-kv", model, held_out=FREE)
    gold = found.adapter.evaluate(model, TOKENIZER, FREE, by="generation", max_new_tokens=1).gold_loss
    assert gold == pytest.approx(min(found.held_out), rel=1e-9)


def test_patience_ends_the_run(model):
    options = {"lr": 3.0, "epochs": 30}
    found = run("ct-kv", model, options=options, held_out=ITEMS, patience=2)
    curve = found.held_out
    assert len(curve) - 1 - curve.index(min(curve)) == 2 and len(curve) < 31
    assert found.history[-1].stopped


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_resumed_run_keeps_the_same_epoch(tmp_path, model, epoch):
    options = {"lr": 0.3, "epochs": EPOCHS}
    whole = run("ct-kv", model, options=options, held_out=ITEMS)

    class Stopped(Exception):
        pass

    def stop(record, module):
        if record.epoch == epoch:
            raise Stopped

    common = {"held_out": ITEMS, "checkpoint_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Stopped):
        run("ct-kv", model, options=options, on_epoch=stop, **common)
    resumed = run("ct-kv", model, options=options, resume=True, **common)
    assert_same_bits(resumed.adapter, whole.adapter)
    assert resumed.held_out == whole.held_out
    with pytest.raises(ValueError, match="held_out was"):
        run("ct-kv", model, options=options, resume=True, **{**common, "held_out": ITEMS[:1]})


def test_what_cannot_be_held_out(model):
    with pytest.raises(ValueError, match="icl trains nothing"):
        run("icl", model, held_out=ITEMS)
    with pytest.raises(ValueError, match="held_out is empty"):
        run("ct-kv", model, patience=2)
    with pytest.raises(ValueError, match="patience must be at least 1"):
        run("ct-kv", model, held_out=ITEMS, patience=0)
    with pytest.raises(DataError, match="at least 3 demonstrations"):
        folds(DEMONSTRATIONS[:2], "auto", 0)
    with pytest.raises(DataError, match="from 1 to 3"):
        folds(DEMONSTRATIONS, 4, 0)


@pytest.mark.parametrize(
    ("count", "holdout"), [(5, "auto"), (16, "auto"), (32, "auto"), (33, "auto"), (400, "auto"), (16, 4)]
)
def test_folds(count, holdout):
    pairs = [Demonstration(f"text {i}", "ab"[i % 4 == 0], ("a", "b")) for i in range(count)]
    split = folds(pairs, holdout, seed=3)
    assert split == folds(pairs, holdout, seed=3) and (count < 16 or split != folds(pairs, holdout, seed=4))
    for train, held_out in split:
        assert len(train) + len(held_out) == count and not {*train} & {*held_out}
        assert [*train] == [pair for pair in pairs if pair in train]  # in their order
    if holdout == "auto" and count <= 32:
        assert len(split) == 3 and Counter(pair for _, out in split for pair in out) == Counter(pairs)
    else:
        assert len(split) == 1 and len(split[0][1]) == (4 if holdout == 4 else min(64, count // 4))
    for _, held_out in split if count >= 16 else ():  # one in four is of the rarer class
        assert abs(sum(pair.output == "b" for pair in held_out) - len(held_out) / 4) <= 1


def test_the_plan_keeps_to_its_budget():
    method = get_method("ct-kv")
    split = folds(DEMONSTRATIONS, "auto", 0)
    own = method.settings()
    for budget in (300, 1000, 2500):
        plan = make_plan(method, own, {}, split, budget)
        assert plan.forwards <= budget and 1 <= plan.rungs[-1] <= own.epochs
        longer = make_plan(method, own, {"epochs": 0}, split, 10**6)
        assert len(plan.candidates) == 4 and longer.rungs == (7, 13, 25)
    assert make_plan(method, own, {"lr": 3e-3}, split, 1000).candidates == ({"lr": 3e-3},)
    with pytest.raises(ValueError, match=r"budget must be at least .* for 1 epoch of 4 learning rates, got 10"):
        make_plan(method, own, {}, split, 10)
    with pytest.raises(ValueError, match="for 25 epochs"):
        make_plan(method, own, {"epochs": 25}, split, 500)


def test_a_jagged_curve_does_not_win_by_its_lowest_point():
    """Losses of Qwen2.5-Coder-0.5B on the shipped task with rates of 3e-2 and 1e-2."""
    jagged = Trial({"lr": 3e-2}, 5, (1.665, 1.041, 2.529, 1.694, 1.811, 1.769), 0)
    steady = Trial({"lr": 1e-2}, 5, (1.665, 1.439, 1.266, 1.124, 1.285, 1.193), 0)
    assert min(jagged.curve) < min(steady.curve) and steady.loss < jagged.loss
    assert steady.best_epoch == 4 and steady.loss == pytest.approx((1.124 + 1.285 + 1.193) / 3)
    assert Trial({}, 2, (0.5, 0.7, 0.6), 0).best_epoch == 0  # the start is not averaged


@pytest.mark.parametrize("name", ["ct-kv", "ct-prompt", "ttt", "ttt+ct-kv"])
def test_the_search_spends_what_it_says_and_keeps_the_best(name, model):
    small = {"lora_rank": 2, "ttt_epochs": 1}
    given = {key: value for key, value in small.items() if key in get_method(name).reads}
    seen = {}
    found = autotune(model, TOKENIZER, DEMONSTRATIONS, name, given, budget=500, on_trial=seen.__setitem__)
    assert tuple(seen.values()) == found.trials and found.forwards <= 500
    assert found.settings.objective == "options"  # all demonstrations have some
    longest = [trial for trial in found.trials if trial.epochs == found.trials[-1].epochs]
    best = min(longest, key=lambda trial: trial.loss)
    assert {key: getattr(found.settings, key) for key in best.rates} == best.rates
    assert found.epochs == best.best_epoch == len([record for record in found.history if not record.stage])
    again = autotune(model, TOKENIZER, DEMONSTRATIONS, name, given, budget=500, known=seen, on_trial=pytest.fail)
    assert_same_bits(again.adapter, found.adapter)


def test_a_rate_that_fails_is_not_chosen_and_all_of_them_are_an_error(model):
    found = autotune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", {"objective": "answers"}, budget=500)
    assert found.settings.objective == "answers"
    broken = make_model("llama", torch.float64)
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    with pytest.raises(TrainingError, match="every learning rate"):
        autotune(broken, TOKENIZER, DEMONSTRATIONS, "ct-kv", {"objective": "answers"}, budget=500)
    with pytest.raises(ValueError, match="trains nothing"):
        autotune(model, TOKENIZER, DEMONSTRATIONS, "icl")
    with pytest.raises(ValueError, match="steps must be None"):
        autotune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", {"steps": 3})


def test_from_the_command_line(files, tmp_path, capsys):
    assert cli.run(tune_arguments(files, tmp_path / "a", "--holdout", "2", "--epochs", "4", "--patience", "9")) == 0
    assert "held-out loss" in capsys.readouterr().out
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    assert len(history) == 4 and history[0]["held_out_start"] and all(record["held_out"] for record in history)
    search = ["--holdout", "auto", "--budget", "400"]
    assert cli.run(tune_arguments(files, tmp_path / "b", *search)) == 0
    shown = capsys.readouterr().err
    trials = json.loads((tmp_path / "b" / "search.json").read_text())
    assert len(trials) >= 4 and len(trials) == shown.count("held-out loss")
    resumed = tune_arguments(files, tmp_path / "b", *search, "--resume")
    (tmp_path / "b" / "prefix" / "prefix.safetensors").unlink(missing_ok=True)
    assert cli.run(resumed) == 0 and "held-out loss" not in capsys.readouterr().err  # no trial was run again
    for wrong, why in (
        (["--budget", "400"], "add --holdout"),
        (["--holdout", "auto", "--patience", "3"], "patience is for a run"),
        (["--holdout", "auto", "--budget", "4"], "budget must be at least"),
        (["--holdout", "9"], "from 1 to"),
    ):
        assert why in complaint(capsys, tune_arguments(files, tmp_path / "c", *wrong))
