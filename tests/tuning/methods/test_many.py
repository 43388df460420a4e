"""Several tasks tuned at once: each adapter is the one that its task gets alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest
import torch

from ctkernels.testing.models import full_precision_norm, make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning import DataError, PrefixSet, TrainingError, TuneTask, tune_many
from ctkernels.tuning.methods.many import ManyResult
from ctkernels.tuning.methods.tune import TuneResult
from ctkernels.tuning.storage import file_name
from ctkernels.tuning.train import together
from ctkernels.tuning.train.learners import PrefixLearners
from ctkernels.tuning.train.options import layered
from ctkernels.tuning.train.trainer import Interrupted
from tests.tuning.runs import ITEMS, TOKENIZER, assert_same_bits, run, settings, tensors

EPOCHS = 3  # of `settings`
BASE = {"drop_p": 0.3}
pytestmark = pytest.mark.filterwarnings("error:.*could not run in one pass:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def precise():
    with full_precision_norm():
        yield


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def together_(model, tasks, method="ct-kv", base=None, **arguments) -> ManyResult:
    return tune_many(model, TOKENIZER, tasks, method, settings(method, **(BASE if base is None else base)), **arguments)


def alone(model, task: TuneTask, method="ct-kv", base=None, **arguments) -> TuneResult:
    options = layered(BASE if base is None else base, task.settings or {})
    own = {"start_from": task.start_from, "held_out": task.held_out, "patience": task.patience}
    return run(method, model, task.demonstrations, options, **own, **arguments)


def stripped(result: TuneResult) -> list[dict]:
    return [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in result.history]


def assert_equal(result: TuneResult, expected: TuneResult, tolerance: float = 1e-12) -> None:
    pairs = zip(tensors(result.adapter), tensors(expected.adapter), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= tolerance
    assert result.adapter.prefix.metadata == expected.adapter.prefix.metadata
    for a, b in zip(stripped(result), stripped(expected), strict=True):
        assert a == {k: pytest.approx(v, rel=0, abs=tolerance) if isinstance(v, float) else v for k, v in b.items()}


def passes_of(monkeypatch) -> list[Counter[int]]:
    """The rows of each learner in every pass of several."""
    seen, forward = [], PrefixLearners.forward

    def spy(self, batch, owners, seeds):
        seen.append(Counter(owners))
        return forward(self, batch, owners, seeds)

    monkeypatch.setattr(PrefixLearners, "forward", spy)
    return seen


DIFFERENT = {  # in number and length of demonstrations, length of training, and in what is drawn
    "plain": TuneTask(DEMONSTRATIONS),
    "longer": TuneTask(DEMONSTRATIONS[:3], {"epochs": 5, "seed": 9}),
    "steps": TuneTask(DEMONSTRATIONS[1:], {"batch_rows": 2, "steps": 4, "drop_from": 2}),
    "power": TuneTask(DEMONSTRATIONS[:2], {"leave_one_out": "power", "drop_p": 0.5}),
    "untrained": TuneTask(DEMONSTRATIONS[:2], {"epochs": 0}),
}


@pytest.mark.parametrize("name, dtype, tolerance", [("bloom", torch.float64, 1e-12), ("llama", torch.float32, 1e-4)])
def test_every_prefix_is_the_one_tuned_alone(monkeypatch, name, dtype, tolerance):
    model, seen = make_model(name, dtype), passes_of(monkeypatch)
    result = together_(model, DIFFERENT)
    assert not result.errors and list(result.results) == list(DIFFERENT)
    # the first step of all of them was one pass, and as many passes as steps of the longest run but the last, alone
    assert seen == [Counter({0: 5, 1: 3, 2: 2, 3: 2})] * 3 + [Counter({0: 3, 1: 2})]
    for task in DIFFERENT:
        assert_equal(result[task], alone(model, DIFFERENT[task]), tolerance)


def test_tasks_of_one_seed_draw_in_the_kernel(model, monkeypatch):
    """As in a sweep over tasks: no mask of tokens is made, and the same tokens are dropped."""
    masks, attend = [], together.PrefixLearners.forward

    def spy(self, *arguments, **named):
        forward = attend(self, *arguments, **named)
        masks.append(forward.attachment.mask)
        return forward

    monkeypatch.setattr(PrefixLearners, "forward", spy)
    tasks = {"a": TuneTask(DEMONSTRATIONS), "b": TuneTask(DEMONSTRATIONS[2:]), "c": TuneTask(DEMONSTRATIONS[:2])}
    result = together_(model, tasks)
    assert len(masks) == EPOCHS and all(mask.keep is None and mask.drop_p == 0.3 for mask in masks)
    for name, task in tasks.items():
        assert_equal(result[name], alone(model, task))


def test_variants_of_training_and_objectives_side_by_side(model):
    """Whatever is trained of a prefix; objectives that read options run in passes of their own."""
    variants = [
        {"trained": "keys", "top_layers": 2, "frozen_tokens": 3},
        {"rank": 2},
        {"mlp_width": 3, "pull": 0.1},
        {"pull": 0.1, "fisher": True},
        {"ema": 0.5, "front_tokens": 2},
        {"start": "pooled", "leave_one_out": "suffix"},
        {"reduction": "tokens"},
        {"reduction": "tokens", "seed": 4},
        {"layout": "padded"},
        {"layout": "padded", "batch_rows": 2},
        {"max_tokens": 30},
        {"max_tokens": 30, "seed": 4},
        {"objective": "options"},
        {"objective": "options", "seed": 4},
        {"objective": "mixed", "score": "sum"},
        {"objective": "mixed", "score": "sum", "mixed": 0.2},
    ]
    tasks = {str(own): TuneTask(DEMONSTRATIONS[number % 3 :], own) for number, own in enumerate(variants)}
    base = {**BASE, "epochs": 2}
    result = together_(model, tasks, base=base)
    assert not result.errors
    for name, task in tasks.items():
        assert_equal(result[name], alone(model, task, base=base))


@pytest.mark.parametrize("method", ["prefix-tuning", "meta-prefix", "ct-prompt", "icl"])
def test_other_methods(model, method):
    """Those that train a prefix run together, others one after the other."""
    tasks = {"a": TuneTask(DEMONSTRATIONS), "b": TuneTask(DEMONSTRATIONS[1:], {"seed": 7})}
    result = together_(model, tasks, method, {})
    assert not result.errors
    for name, task in tasks.items():
        assert_equal(result[name], alone(model, task, method, {}))


def test_a_task_that_fails_fails_alone(model, monkeypatch):
    seen = passes_of(monkeypatch)
    tasks = {
        "good": TuneTask(DEMONSTRATIONS),
        "single": TuneTask(DEMONSTRATIONS[:1]),
        "diverges": TuneTask(DEMONSTRATIONS, {"lr": 1e300}),
        "unknown": TuneTask(DEMONSTRATIONS, {"lr_": 1.0}),
        "long": TuneTask(DEMONSTRATIONS * 9),
        "file": TuneTask("nowhere.jsonl"),
        "other": TuneTask(DEMONSTRATIONS[1:], {"seed": 3}),
    }
    result = together_(model, tasks)
    assert list(result.results) == ["good", "other"]
    for name in result.results:
        assert_equal(result[name], alone(model, tasks[name]))
    assert seen[0].keys() == {0, 1, 2} and seen[-1].keys() == {0, 1}  # the one that diverges has left
    for name, error in result.errors.items():
        with pytest.raises(type(error)) as expected:
            alone(model, tasks[name])
        assert str(expected.value) == str(error)
        with pytest.raises(type(error)):
            result[name]
    assert [type(x) for x in result.errors.values()][:3] == [DataError, TrainingError, ValueError]


def test_what_is_not_finite_reaches_no_other_task(monkeypatch):
    """On a backend that lets it through (NaN times the zero weight of a hidden key), only its own task fails."""
    model, losses = make_model("llama"), together.add_gradients

    def leaky(steps, *arguments):
        found = losses(steps, *arguments)
        return found * torch.nan if len(steps) > 1 and len(seen) == 1 else found

    seen = passes_of(monkeypatch)
    monkeypatch.setattr(together, "add_gradients", leaky)
    tasks = {"a": TuneTask(DEMONSTRATIONS), "b": TuneTask(DEMONSTRATIONS[1:])}
    result = together_(model, tasks)
    for name, task in tasks.items():
        assert_equal(result[name], alone(model, task))


def test_tasks_wait_until_others_have_left(model, monkeypatch):
    tasks = {
        "a": TuneTask(DEMONSTRATIONS),
        "b": TuneTask(DEMONSTRATIONS, {"epochs": 4}),
        "c": TuneTask(DEMONSTRATIONS),
        "d": TuneTask(DEMONSTRATIONS, {"epochs": 1}),
    }
    seen, measured, bound = passes_of(monkeypatch), [], together.memory

    def memory(trainings):
        measured.append((len(trainings), bound(trainings)))
        return measured[-1][1]

    monkeypatch.setattr(together, "memory", memory)
    together_(model, tasks)
    limit = max(size for count, size in measured if count == 3) - 1
    assert max(size for count, size in measured if count == 2) < limit
    seen.clear()
    result = together_(model, tasks, memory_bytes=limit)
    # a and b for 3 epochs, then b's last one and c's first, then c and d
    assert seen == [Counter({0: 5, 1: 5})] * 5
    for name, task in tasks.items():
        assert_equal(result[name], alone(model, task))
    seen.clear()
    assert_same_bits(together_(model, {"d": tasks["d"]}, memory_bytes=0)["d"].adapter, alone(model, tasks["d"]).adapter)
    assert not seen


def test_epochs_are_chosen_and_ended_for_each_task(model):
    tasks = {
        "chosen": TuneTask(DEMONSTRATIONS, {"epochs": 4}, held_out=ITEMS),
        "patient": TuneTask(DEMONSTRATIONS[1:], {"epochs": 8, "lr": 0.3}, held_out=ITEMS[:1], patience=1),
        "asked": TuneTask(DEMONSTRATIONS[:3]),
    }
    told: list[tuple[str, int]] = []

    def on_epoch(name, record, module):
        told.append((name, record.epoch))
        return name == "asked" and record.epoch == 2

    result = together_(model, tasks, on_epoch=on_epoch)
    assert told[:4] == [("chosen", 1), ("patient", 1), ("asked", 1), ("chosen", 2)]
    assert len(result["patient"].history) < 8 and result["patient"].history[-1].stopped
    assert [r.stopped for r in result["asked"].history] == [False, True]
    assert_equal(result["asked"], alone(model, tasks["asked"], on_epoch=lambda r, m: r.epoch == 2))
    for name in ("chosen", "patient"):
        assert_equal(result[name], alone(model, tasks[name]))
        assert len(result[name].held_out) == len(result[name].history) + 1


def test_an_ended_run_goes_on(model, tmp_path):
    tasks = {
        "a/b": TuneTask(DEMONSTRATIONS, held_out=ITEMS),
        "steps": TuneTask(DEMONSTRATIONS, {"batch_rows": 2, "steps": 8}),
        "short": TuneTask(DEMONSTRATIONS[1:], {"epochs": 1}),
    }
    whole = together_(model, tasks)
    asked = iter([False, True])  # the second epoch that ends; no more is asked after a yes
    with pytest.raises(Interrupted):
        together_(model, tasks, checkpoint_dir=tmp_path, checkpoint_every=9, ends=lambda: next(asked))
    with pytest.raises(ValueError, match=r"checkpoint_dir already holds .*; resume from it"):
        together_(model, tasks, checkpoint_dir=tmp_path)
    epochs = []
    kept = {"checkpoint_dir": tmp_path, "resume": True}
    resumed = together_(model, tasks, on_epoch=lambda name, r, m: epochs.append((name, r.epoch)), **kept)
    assert min(epoch for name, epoch in epochs if name == "a/b") == 3
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["a%2Fb", "short", "steps"]
    for name, task in tasks.items():
        assert_equal(resumed[name], whole[name])
        # `tune` reads a task's checkpoint as its own
        again = alone(model, task, checkpoint_dir=tmp_path / file_name(name), resume=True)
        assert_same_bits(again.adapter, resumed[name].adapter)
    changed = together_(model, {**tasks, "short": TuneTask(DEMONSTRATIONS)}, **kept)
    assert list(changed.errors) == ["short"] and "demonstrations was" in str(changed.errors["short"])


def test_a_pass_that_is_too_large_runs_in_halves(model, monkeypatch):
    forward = PrefixLearners.forward

    def small(self, *arguments, **named):
        if len(self.learners) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, *arguments, **named)

    monkeypatch.setattr(PrefixLearners, "forward", small)
    tasks = {str(n): TuneTask(DEMONSTRATIONS[n:]) for n in range(3)}
    with pytest.warns(UserWarning, match="3 prefixes could not run in one pass and ran in halves"):
        result = together_(model, tasks)
    for name, task in tasks.items():
        assert_equal(result[name], alone(model, task))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_reentrant_checkpoints_pass_the_gradients_on():
    """Such a checkpoint records a gradient only if its input requires one, for the sake of any of the prefixes."""
    model, tasks = make_model("llama"), {"a": TuneTask(DEMONSTRATIONS), "b": TuneTask(DEMONSTRATIONS[1:])}
    plain = together_(model, tasks)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # which newer versions of transformers switch on
    result = together_(model.train(), tasks)
    for name in tasks:
        assert_equal(result[name], plain[name])


def test_a_set_passes_gradients_on_if_asked_to(model):
    prefixes = [alone(model, TuneTask(DEMONSTRATIONS[n:])).prefix for n in (0, 2)]
    index, ids = torch.tensor([1, 0, 1]), torch.arange(12).view(3, 4) + 5
    with PrefixSet(prefixes).attach(model, index):
        fixed = model(ids).logits
    assert not fixed.requires_grad
    tasks = PrefixSet(prefixes, trainable=True)
    with tasks.attach(model, index):
        logits = model(ids).logits
        assert torch.equal(logits, fixed)
        (logits * torch.tensor([1.0, 1.0, 0.0])[:, None, None]).square().sum().backward()
        with torch.no_grad():
            prefixes[0].values[0].mul_(2)
            assert not torch.equal(model(ids).logits[1], fixed[1])  # what the prefixes are now
            prefixes[0].values[0].div_(2)
    found = [[p.grad for p in prefix.parameters()] for prefix in prefixes]
    for row, number in ((1, 0), (0, 1)):
        prefixes[number].zero_grad()
        with prefixes[number].attach(model):
            model(ids[row : row + 1]).logits.square().sum().backward()
        for a, p in zip(found[number], prefixes[number].parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=0, atol=1e-12)


def test_arguments(model):
    with pytest.raises(TypeError, match="tasks must be a mapping of names to demonstrations, got list"):
        tune_many(model, TOKENIZER, [DEMONSTRATIONS])
    with pytest.raises(ValueError, match="tasks must hold at least one task, got none"):
        tune_many(model, TOKENIZER, {})
    with pytest.raises(ValueError, match="memory_bytes must be at least 0, got -1"):
        tune_many(model, TOKENIZER, {"a": DEMONSTRATIONS}, memory_bytes=-1)
    with pytest.raises(ValueError, match=r"does not read 'lr_'"):
        tune_many(model, TOKENIZER, {"a": DEMONSTRATIONS}, settings={"lr_": 1})
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        tune_many(model, TOKENIZER, {"a": DEMONSTRATIONS}, checkpoint_every=0)
    with pytest.raises(TypeError, match="Linear"):
        tune_many(torch.nn.Linear(2, 2), TOKENIZER, {"a": DEMONSTRATIONS})
    with pytest.raises(ValueError, match="name must have 1 to"):
        tune_many(model, TOKENIZER, {"": DEMONSTRATIONS}, checkpoint_dir="runs")
    with pytest.raises(TypeError, match="model must be loaded"):
        tune_many("model", TOKENIZER, {"a": DEMONSTRATIONS})
