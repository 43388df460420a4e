"""The length of a training by optimiser steps, and LoRA's own dropout."""

import math
from dataclasses import asdict

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.methods import PRESETS, get_method
from ctkernels.tuning.train.learners import LoraLearner
from ctkernels.tuning.train.options import layered
from tests.tuning.runs import ITEMS, TOKENIZER, assert_same_bits, run


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


class Stopped(Exception):
    pass


def taken(monkeypatch) -> list[float]:
    """The learning rate of every step that AdamW takes."""
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return rates


@pytest.mark.parametrize("method", ["ct-kv", "ct-prompt", "ttt"])
def test_steps_are_counted_and_follow_one_cosine(monkeypatch, model, method):
    """5 rows by 2 are 3 steps an epoch: 7 steps end within the third epoch."""
    rates = taken(monkeypatch)
    history = run(method, model, options={"steps": 7, "batch_rows": 2, "lr": 1e-2}).history
    assert rates == pytest.approx([5e-3 * (1 + math.cos(math.pi * n / 7)) for n in range(7)])
    assert [r.steps for r in history] == [3, 3, 1]


def test_steps_of_whole_epochs_are_those_epochs(model):
    by_steps = run("ct-kv", model, options={"steps": 6, "batch_rows": 2})
    by_epochs = run("ct-kv", model, options={"epochs": 2, "batch_rows": 2})
    assert_same_bits(by_steps.adapter, by_epochs.adapter)
    assert [r.loss for r in by_steps.history] == [r.loss for r in by_epochs.history]


def test_the_loss_of_an_epoch_that_ends_early_is_that_of_the_rows_it_saw(monkeypatch, model):
    seen = []
    monkeypatch.setattr("ctkernels.tuning.train.trainer.torch.optim.AdamW.step", lambda *a, **k: None)
    whole = run("ct-kv", model, options={"epochs": 1, "batch_rows": 1, "drop_p": 0.0}, on_epoch=lambda r, m: None)
    for count in range(1, 6):
        options = {"steps": count, "batch_rows": 1, "drop_p": 0.0}
        seen.append(count * run("ct-kv", model, options=options).history[0].loss)
    assert seen == sorted(seen) and seen[-1] / 5 == pytest.approx(whole.history[0].loss)


@pytest.mark.parametrize("method", ["ct-prompt", "ttt"])
def test_a_stopped_run_of_steps_resumes_to_the_same_bits(tmp_path, model, method):
    options = {"steps": 7, "batch_rows": 2} | ({"lora_dropout": 0.3} if method == "ttt" else {})
    whole = run(method, model, options=options)

    def stop(record, module):
        if record.epoch == 2:
            raise Stopped

    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 1, "resume": True}
    with pytest.raises(Stopped):
        run(method, model, options=options, on_epoch=stop, **kept)
    resumed = run(method, model, options=options, **kept)
    assert_same_bits(resumed.adapter, whole.adapter)
    strip = [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in resumed.history]
    assert strip == [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in whole.history]


def test_no_epochs_leave_the_start(model):
    """The demonstrations' cache, a prompt of their embeddings, an update of nothing: what untrained methods give."""
    icl = run("icl", model).adapter
    for method in ("ct-kv", "ct-prompt", "ttt", "ttt+ct-kv"):
        length = {"epochs": 0} | ({"ttt_epochs": 0} if method == "ttt+ct-kv" else {})
        result = run(method, model, options=length)
        assert result.history == []
        for a, b in zip(result.prefix.parameters(), icl.prefix.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_presets_count_what_the_authors_count():
    for preset, steps in (("nlp-lr", (250, 250)), ("mmlu", (20, 20)), ("bbh", (12, 8)), ("arc", (150, 200))):
        chosen = [get_method(name).settings(preset) for name in ("ct-prompt", "ttt")]
        assert tuple(s.steps for s in chosen) == steps and {s.batch_rows for s in chosen} == {4}
        both = get_method("ttt+ct-kv").settings(preset)
        assert (both.ttt_steps, both.steps) == (steps[1], None)
        assert both.lora_dropout == chosen[1].lora_dropout == 0.05
        assert get_method("ct-kv").settings(preset).steps is None  # a step takes all rows, as an epoch does
    assert get_method("ttt").settings().lora_dropout == 0.0 and get_method("ttt").settings().steps is None
    assert set(PRESETS) == {"nlp-lr", "mmlu", "bbh", "arc"}


def test_the_preset_runs_as_many_steps(monkeypatch, model):
    rates = taken(monkeypatch)
    small = {"lora_rank": 2, "lora_targets": ("q_proj",)}
    run_of = get_method("ttt").settings("bbh", **small)
    assert run_of.steps == 8
    run("ttt", model, options={"steps": run_of.steps, "batch_rows": run_of.batch_rows, "lora_dropout": 0.05})
    assert len(rates) == 8


def test_what_is_given_of_a_length_replaces_what_is_below_it():
    ttt = get_method("ttt")
    given = ttt.settings("nlp-lr", epochs=3)
    assert (given.epochs, given.steps) == (3, None)
    assert ttt.settings("nlp-lr", steps=9).steps == 9
    assert get_method("ttt+ct-kv").settings("nlp-lr", ttt_epochs=2).ttt_steps is None
    assert MethodSpec.parse("ttt:steps=9").settings(None, epochs=3).steps == 9
    assert MethodSpec.parse("ttt").settings("nlp-lr", epochs=3).steps is None
    with pytest.raises(ValueError, match="epochs and steps exclude each other: both say how long training is"):
        ttt.settings(epochs=3, steps=4)
    with pytest.raises(ValueError, match="steps must be at least 1, or None, got 0"):
        ttt.settings(steps=0)
    assert layered({"steps": 4}, {"epochs": 2}, {"lr": 1.0}) == {"epochs": 2, "lr": 1.0}
    assert layered({"epochs": 4}, {"steps": None}) == {"epochs": 4, "steps": None}


def test_dropout_of_lora_is_drawn_by_the_seed_and_leaves_no_trace(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dropped = run("ttt", model, options={"lora_dropout": 0.4})
    assert torch.equal(torch.rand(3), expected)  # what others draw is not touched
    assert_same_bits(run("ttt", model, options={"lora_dropout": 0.4}).adapter, dropped.adapter)
    plain = run("ttt", model)
    # the first epoch begins with B = 0, which hides what A reads: losses differ from the second step on
    assert dropped.history[0].loss != plain.history[0].loss or dropped.history[1].loss != plain.history[1].loss
    assert run("ttt", model, options={"lora_dropout": 0.4, "seed": 9}).history[-1].loss != dropped.history[-1].loss
    first, second = (dropped.adapter.evaluate(model, TOKENIZER, ITEMS) for _ in range(2))
    assert first == second  # nothing is dropped at evaluation
    with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\), got 1.0"):
        get_method("ttt").settings(lora_dropout=1.0)


def test_dropout_of_lora_drops_that_share_of_its_inputs(monkeypatch, model):
    shares, forward = [], LoraLearner.forward

    def spy(self, batch, seed):
        def look(module, inputs, output):
            shares.append(((output == 0).float().mean().item(), (inputs[0] == 0).float().mean().item()))

        for name, module in self.module.named_modules():
            if name.endswith(".lora_dropout.default") and not module._forward_hooks:
                module.register_forward_hook(look)
        return forward(self, batch, seed)

    monkeypatch.setattr(LoraLearner, "forward", spy)
    run("ttt", model, options={"lora_dropout": 0.25, "epochs": 2})
    assert len(shares) > 20
    assert sum(a for a, _ in shares) / len(shares) == pytest.approx(0.25, abs=0.03)
    assert sum(b for _, b in shares) / len(shares) < 0.01
