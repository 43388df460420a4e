"""Tuning models some of whose layers keep a state."""

from __future__ import annotations

import pytest
import torch

from ctkernels.testing.classes import PUBLISHED, Case, build
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.data.formats import PairEncoder
from ctkernels.tuning.evaluation.scoring import Scorer
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.tiny import make_tiny, shrink
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.many import tune_many
from ctkernels.tuning.methods.tune import TuneResult, tune
from tests.tuning.objectives.test_continuations import TASK, losses_one_by_one

TOKENIZER = char_tokenizer(adds_bos=True)


@pytest.fixture(params=["Lfm2ForCausalLM", "Qwen3NextForCausalLM"], scope="module")
def model(request):
    settings = PUBLISHED["lfm2", "LFM2"] if request.param.startswith("Lfm2") else {}
    model_class, config = build(Case({"L": "lfm2", "Q": "qwen3_next"}[request.param[0]], "", request.param, settings))
    return make_tiny(model_class, shrink(config))


def tuned(model, method="ct-kv", **options) -> TuneResult:
    settings = get_method(method).settings(**{"epochs": 3, "lr": 1e-2, "leave_one_out": "none", **options})
    return tune(model, TOKENIZER, DEMONSTRATIONS, method, settings)


def moved(result: TuneResult, start: TuneResult) -> dict[str, bool]:
    """Which parts of the prefix are not those of the start."""
    before, after = (dict(r.prefix.named_parameters()) for r in (start, result))
    return {kind: any(not torch.equal(x, after[n]) for n, x in before.items() if n.startswith(kind)) for kind in KINDS}


KINDS = ("keys", "values", "states")


def test_what_is_trained(model):
    start = tune(model, TOKENIZER, DEMONSTRATIONS, "icl")
    assert len(start.prefix.states) > 0
    result = tuned(model)
    assert moved(result, start) == dict.fromkeys(KINDS, True)
    losses = [epoch.loss for epoch in result.history]
    assert losses[-1] < losses[0]
    for options in ({"train_states": False}, {"rank": 2}, {"mlp_width": 8}):
        assert moved(tuned(model, **options), start) == {"keys": True, "values": True, "states": False}
    for options in ({"pull": 1.0, "fisher": True}, {"frozen_tokens": 4}, {"top_layers": 1}, {"batch_rows": 2}):
        assert moved(tuned(model, **options), start)["states"]


def test_averaged_states(model):
    """After n steps: sum of ema^(n - i) * state_i / sum of ema^(n - i), as of keys and values."""
    seen = []

    def on_epoch(record, module):
        seen.append({name: x.detach().clone() for name, x in module.named_parameters()})

    settings = {"epochs": 3, "lr": 1e-2, "leave_one_out": "none"}
    tune(model, TOKENIZER, DEMONSTRATIONS, "ct-kv", get_method("ct-kv").settings(**settings), on_epoch=on_epoch)
    averaged = tuned(model, ema=0.5)
    for name, x in averaged.prefix.named_parameters():
        expected = (seen[0][name] / 4 + seen[1][name] / 2 + seen[2][name]) / 1.75
        torch.testing.assert_close(x.detach(), expected, rtol=1e-9, atol=1e-12)
    still = tuned(model, ema=0.5, train_states=False)
    start = tune(model, TOKENIZER, DEMONSTRATIONS, "icl")
    assert moved(still, start) == {"keys": True, "values": True, "states": False}


def test_a_trained_adapter_is_read_again(model, tmp_path):
    result = tuned(model, epochs=1)
    result.adapter.save_pretrained(tmp_path)
    read = Adapter.from_pretrained(tmp_path, model, TOKENIZER)
    assert all(torch.equal(x, read.prefix.states[name]) for name, x in result.prefix.states.items())


def test_leave_one_out_is_refused(model):
    with pytest.raises(ValueError, match="leave_one_out='self' hides a demonstration from attention alone"):
        tuned(model, leave_one_out="self")


def test_methods_that_put_contexts_together_are_refused(model):
    for method, options in (("ct-kv", {"start": "separate"}), ("ct-kv", {"start": "pooled"})):
        with pytest.raises(ValueError, match="belongs to one context as a whole"):
            tuned(model, method, **options)


def test_tasks_together(model):
    """Every row begins with the states of its own task's prefix, and only those get its gradient."""
    options = {"epochs": 2, "lr": 1e-2, "leave_one_out": "none", "drop_p": 0.3}
    tasks = {"a": DEMONSTRATIONS, "b": DEMONSTRATIONS[1:]}
    with full_precision():
        many = tune_many(model, TOKENIZER, tasks, "ct-kv", options)
        for name, pairs in tasks.items():
            one = tune(model, TOKENIZER, pairs, "ct-kv", options)
            for x, y in zip(many[name].prefix.parameters(), one.prefix.parameters(), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_options_behind_a_state(model):
    """A cache holds the state at the end of a row alone: options run behind their input again, in evaluation and in
    training, where micro-batches do not matter."""
    start = tune(model, TOKENIZER, DEMONSTRATIONS, "icl").prefix
    scorer = Scorer(model, PairEncoder(TOKENIZER), start, 4096)
    found = scorer.option_losses(TASK, "mean")
    for item, losses in zip(TASK, found, strict=True):
        expected = losses_one_by_one(scorer, item, "mean")
        assert [*losses.options.values(), losses.output] == pytest.approx(expected, abs=1e-6)
    whole, split = (
        tune(model, TOKENIZER, TASK, "ct-kv", {"epochs": 2, "lr": 1e-2, "leave_one_out": "none", "max_tokens": most})
        for most in (4096, 20)
    )
    assert [r.loss for r in split.history] == pytest.approx([r.loss for r in whole.history], abs=1e-6)
    assert whole.adapter.prefix.metadata.settings["objective"] == "options"
