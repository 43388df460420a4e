"""Steps as graphs: the capture's logic against graphs of the CPU that record (ctkernels/testing/recorded.py). What is
replayed has the bits of what is run.

Not shown here: CUDA's own graphs and streams.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from ctkernels.testing.models import full_precision_norm, make_model
from ctkernels.testing.recorded import RecordedGraphs
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.formats import Row
from ctkernels.tuning.methods.many import tune_many
from ctkernels.tuning.train import graphs, loop, trainer
from ctkernels.tuning.train.distributed import Ranks
from ctkernels.tuning.train.graphs import CapturedSteps
from ctkernels.tuning.train.learners import PrefixLearner
from ctkernels.tuning.train.trainer import Interrupted, Training, TrainingError
from tests.tuning.hf import tiny_classes
from tests.tuning.runs import ITEMS, TOKENIZER, assert_same_bits, run, settings, tensors


@pytest.fixture
def recorded(monkeypatch):
    """Steps are captured on the CPU as they are on a GPU. Returns a function that turns captures on or off, and tells
    what was asked of the graphs."""
    monkeypatch.setattr(trainer, "FUSED", ("cpu",))  # the AdamW of a GPU
    asked = RecordedGraphs()

    def switch(captures: bool) -> list[str]:
        asked.did.clear()
        monkeypatch.setattr(loop, "captured_steps", lambda training: CapturedSteps(training, asked, captures))
        return asked.did

    return switch


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


def losses(result):
    return [(r.loss, r.grad_norm, r.lr, r.steps, r.held_out) for r in result.history]


CASES = {
    "every row in each step": ("ct-kv", dict(drop_p=0.3)),
    "a subset of the demonstrations": ("ct-kv", dict(drop_p=0.2, leave_one_out="power")),
    "tokens that are never dropped": ("ct-kv", dict(drop_p=0.4, drop_from=3, ema=0.7, frozen_tokens=1)),
    "steps of some rows": ("ct-kv", dict(drop_p=0.3, batch_rows=4, epochs=6)),
    "several micro-batches": ("ct-kv", dict(drop_p=0.3, max_tokens=40, reduction="tokens", epochs=5)),
    "a pull towards the start": ("ct-kv", dict(pull=0.1, fisher=True)),
    "a network": ("prefix-tuning", dict(mlp_width=8)),
    "a soft prompt": ("ct-prompt", dict(drop_p=0.3, batch_rows=3, epochs=6)),
    "a soft prompt within a ball": ("cpt", dict(batch_rows=None)),
    "a LoRA update, in which rows change": ("ttt", dict(batch_rows=None, epochs=2, lora_targets=("q_proj",))),
}


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_have_the_bits_of_those_that_run(name, model, recorded):
    method, options = CASES[name]
    recorded(False)
    expected = run(method, model, options=options)
    did = recorded(True)
    got = run(method, model, options=options)
    assert "replay" in did
    assert losses(got) == losses(expected)
    assert_same_bits(got.adapter, expected.adapter)


@pytest.mark.parametrize("name", ["several micro-batches", "a soft prompt within a ball"])
def test_steps_of_all_rows_have_the_bits_of_the_plain_loop(name, model, recorded):
    method, options = CASES[name]
    expected = run(method, model, options=options)  # on the CPU "auto" is "off"
    did = recorded(True)
    got = run(method, model, options=options)
    assert did.count("capture") == 1 and "send" not in did
    assert losses(got) == losses(expected)
    assert_same_bits(got.adapter, expected.adapter)


@pytest.mark.parametrize("method, reduction", [("ct-kv", "rows"), ("ct-prompt", "tokens")])
def test_levelled_batches_have_the_gradients_of_their_rows(method, reduction, recorded):
    options = dict(drop_p=0.3, batch_rows=3, epochs=6, reduction=reduction, learn_stop=True)
    with full_precision_norm():
        model = make_model("llama")  # fp64
        expected = run(method, model, options=options)
        did = recorded(True)
        got = run(method, model, options=options)
    assert 1 <= did.count("capture") <= 3 and did.count("replay") >= 6
    for a, b in zip(losses(got), losses(expected), strict=True):
        assert a[:2] == pytest.approx(b[:2], abs=1e-12)
    for x, y in zip(tensors(got.adapter), tensors(expected.adapter), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_the_host_reads_a_step_when_the_next_one_is_launched(model, recorded):
    did = recorded(True)
    run("ct-kv", model, options=dict(epochs=5))
    assert did == [
        *("fetch", "capture", "replay", "fetch", "wait"),  # the first step runs, the second one is captured
        *("replay", "fetch", "wait") * 3,
        "wait",
    ]


def test_who_looks_at_an_epoch_sees_what_it_has_left(model, recorded):
    def watched(captures: bool):
        recorded(captures)
        seen = []

        def on_epoch(record, module):
            seen.append((record.epoch, record.loss, [x.detach().clone() for x in module.parameters()]))
            return record.epoch == 4

        run("ct-kv", model, options=dict(epochs=6), on_epoch=on_epoch)
        return seen

    expected, got = watched(False), watched(True)
    assert len(got) == 4
    for (*a, xs), (*b, ys) in zip(got, expected, strict=True):
        assert a == b and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_held_out_pairs_end_a_run(model, recorded):
    def watched(captures: bool):
        recorded(captures)
        return run("ct-kv", model, options=dict(epochs=12, lr=0.3, ema=0.5), held_out=ITEMS, patience=2)

    expected, got = watched(False), watched(True)
    assert 3 <= len(got.history) < 12
    assert losses(got) == losses(expected)
    assert_same_bits(got.adapter, expected.adapter)


def test_a_resumed_run_ends_with_the_same_bits(model, recorded, tmp_path):
    options = dict(epochs=6, ema=0.5, drop_p=0.3, batch_rows=4)
    recorded(True)
    expected = run("ct-kv", model, options=options)
    kept = dict(checkpoint_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(Interrupted):
        run("ct-kv", model, options=options, ends=lambda: True, **kept)
    got = run("ct-kv", model, options=options, resume=True, **kept)
    assert losses(got) == losses(expected)
    assert_same_bits(got.adapter, expected.adapter)


class Failing(PrefixLearner):
    """Its penalty is not a number from the sixth step on."""

    def penalty(self):
        self.steps = getattr(self, "steps", torch.zeros(1))
        self.steps += 1
        return sum(x.sum() for x in self._tensors()) * torch.where(self.steps > 5, torch.nan, 0.0).sum()


def test_a_loss_that_is_not_finite_changes_nothing(model, recorded):
    """Although the host notices it when the step after it has been launched."""

    def fails() -> tuple[str, list[torch.Tensor]]:
        prefix = KVPrefix.from_tokens(model, torch.arange(9), torch.tensor([0, 4, 9]))
        rows = [Row((1, 2, 3), ((4,),), held_out) for held_out in (0, 1)]
        learner = Failing(model, prefix, rows, settings("ct-kv", epochs=9))
        with pytest.raises(TrainingError) as error:
            loop.train_learner(Training(model, learner, learner.settings))
        return str(error.value), [x.detach().clone() for x in prefix.parameters()]

    message, expected = fails()
    assert message.startswith("epoch 6: the loss is")
    for captures in (False, True):
        did = recorded(captures)
        found, got = fails()
        assert found == message and all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert did.count("fetch") == 7 and did.count("wait") == 6


def test_what_cannot_be_captured_runs_as_it_is(model, recorded, monkeypatch, caplog):
    recorded(False)
    expected = run("ct-kv", model)
    recorded(True)

    def mask(self, batch, seed):
        assert int(batch.row_ids[0]) == 0  # which a GPU would have to be waited for
        return whole(self, batch, seed)

    whole = PrefixLearner.mask
    monkeypatch.setattr(PrefixLearner, "mask", mask)
    got = run("ct-kv", model)
    assert losses(got) == losses(expected)
    assert_same_bits(got.adapter, expected.adapter)
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "a step of LlamaForCausalLM cannot be captured, steps run without graphs"
    ]
    monkeypatch.setattr(graphs, "refusal", lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"graph='on': a step of LlamaForCausalLM cannot be captured \(RuntimeError:"
    ):
        run("ct-kv", model, options=dict(graph="on"))


REFUSED = {
    "they run on cpu": dict(),
    "the objective 'options'": dict(cuda=True, objective="options"),
    "the host reads the padding": dict(cuda=True, layout="padded"),
    "the reference backend": dict(cuda=True, backend="reference"),
    "lora_dropout": dict(cuda=True, method="ttt", lora_dropout=0.1),
    "gradient checkpointing": dict(cuda=True, checkpointing=True),
    "has layers that keep a state": dict(cuda=True, keeps=True),
    "the weights are quantised": dict(cuda=True, quantised=True),
    "several processes": dict(cuda=True, ranks=2),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_known_not_to_be_captured_is_refused_before_anything_runs(words, monkeypatch):
    case = dict(REFUSED[words])
    model = tiny_classes.tiny("falcon_h1") if case.pop("keeps", False) else make_model("llama", torch.float32)
    if case.pop("cuda", False):
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    if case.pop("checkpointing", False):
        model.gradient_checkpointing_enable()
    if case.pop("quantised", False):
        model.is_quantized = True
    ranks = Ranks()
    ranks.size = case.pop("ranks", 1)
    given = settings(case.pop("method", "ct-kv"), **{"graph": "on", **case})
    with pytest.raises(ValueError, match=f"graph='on' captures the steps .* cannot be captured: .*{words}"):
        graphs.require_capture(model, given, ranks)


def test_graphs_are_refused_on_the_cpu_and_for_several_tasks(model):
    with pytest.raises(ValueError, match=r"graph='on' captures the steps of a run, .*they run on cpu"):
        run("ct-kv", model, options=dict(graph="on"))
    result = tune_many(model, TOKENIZER, {"a": DEMONSTRATIONS}, settings=dict(graph="on", epochs=1))
    assert "those of several are taken together" in str(result.errors["a"])


def test_a_captured_step_has_not_run_and_a_value_cannot_be_read():
    x, asked = torch.ones(3), RecordedGraphs()

    def step():
        x.mul_(2)
        return x.sum(), x + 1

    replay, outputs = asked.capture(step)
    assert torch.equal(x, torch.ones(3))
    x.fill_(5)
    replay()
    assert float(outputs[0]) == 30 and torch.equal(outputs[1], torch.full((3,), 11.0))
    with pytest.raises(RuntimeError, match="not permitted"):
        asked.capture(lambda: x[0].item())


def test_what_is_asked_of_cuda(monkeypatch):
    """In order: a stream of its own after what was launched before, graphs of one pool, copies and their event."""
    asked = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    class Event:
        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("synchronize")

    class Graph:
        def replay(self):
            asked.append("replay")

    @contextmanager
    def block(name, *_, **given):
        asked.append((name, *(f"{key}={getattr(x, 'name', x)}" for key, x in sorted(given.items()))))
        yield
        asked.append(f"end of {name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("outside"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("graph", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, partial(block, name))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: asked.append("pin") or x)
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, device, pin_memory: asked.append("pinned") or like(x))
    cuda = graphs.CudaGraphs(torch.device("cuda", 0))
    with cuda.running():
        replay, outputs = cuda.capture(lambda: (torch.ones(()), torch.zeros(())))
        replay()
        wait = cuda.fetch(outputs)
        cuda.send(torch.arange(2), torch.zeros(2))
        assert wait() == outputs
    assert asked == [
        "side waits for outside", ("device",), ("stream",), ("graph", "pool=pool", "stream=side"), "end of graph",
        "replay", "pinned", "pinned", "record", "pin", "synchronize", "end of stream", "end of device",
        "outside waits for side",
    ]  # fmt: skip
