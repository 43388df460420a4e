"""Options behind an input that is run once: the same scores as run one by one, and no token more than needed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ctkernels.testing.models import MODELS, make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data import DataError, Demonstration, encode_rows
from ctkernels.tuning.data.batches import make_batch
from ctkernels.tuning.data.formats import PairEncoder, Row
from ctkernels.tuning.evaluation.scoring import Scorer
from ctkernels.tuning.hf.continuations import score_options
from ctkernels.tuning.objectives import OBJECTIVES, Forward, Weights
from ctkernels.tuning.train import trainer
from tests.tuning.runs import TOKENIZER, TRAINING, assert_same_bits, run, settings

TASK = [
    Demonstration("red brick", "warm", ("warm", "ward", "cold", "w")),
    Demonstration("snow", "cold", ("it is warm", "cold", "hot")),
    Demonstration("a fire", "c", ("a", "b", "c")),
]


def losses_one_by_one(scorer: Scorer, item: Demonstration, score: str) -> list[float]:
    """The loss of each option, then of the output, in nats: every answer in a row of its own."""
    output = scorer.encoder.answer(item, item.output)
    prompt = scorer._prompt(item, scorer.encoder.longest(item, output, "required"))
    answers = [*scorer.encoder.options(item, score).values(), output]
    sizes = [len(answer) if score == "sum" else 1 for answer in answers[:-1]] + [1]
    losses = scorer._losses([Row(prompt + answer[:-1], (answer,)) for answer in answers])
    return [size * loss for size, loss in zip(sizes, losses, strict=True)]


@pytest.mark.parametrize(
    ("name", "score"), [*((name, "mean") for name in MODELS), ("llama", "sum"), ("gpt2", "first-token")]
)
def test_scores_are_those_of_rows_of_their_own(name, score):
    """For every family: what a window, ALiBi, learned positions and shared heads make of a continued row, in training
    and in evaluation, in one batch and in several."""
    task = TASK if score != "first-token" else [*DEMONSTRATIONS[:2], TASK[2]]
    model = make_model(name)
    prefix = KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)
    scorer = Scorer(model, PairEncoder(TOKENIZER), prefix, 4096)
    expected = [losses_one_by_one(scorer, item, score) for item in task]
    rows = encode_rows(TOKENIZER, task, choices="required", score=score)
    with prefix.attach(model) as attachment:
        scored = score_options(Forward(model, attachment, make_batch(rows, range(3), "padded")), score)
    assert scored.choices_of_rows == [1, 1, 1]
    for scores, losses in zip(scored.scores, expected, strict=True):
        assert (-scores[scores.isfinite()]).tolist() == pytest.approx(losses[:-1], abs=1e-6)
    # one row holds all options; they begin with the same token
    alone = [Demonstration("rain", "wet", ("wet", "web"))] if score != "first-token" else []
    items = [*task[::-1], *alone, *task]  # not in the order of their lengths
    expected = [*expected[::-1], *(losses_one_by_one(scorer, item, score) for item in alone), *expected]
    for max_tokens in (4096, 16):
        found = replace(scorer, max_tokens=max_tokens).option_losses(items, score)
        for item, losses in zip(found, expected, strict=True):
            assert [*item.options.values(), item.output] == pytest.approx(losses, abs=1e-6)


def count_passes(model, work) -> tuple[list[int], list[int]]:
    """Of each pass of the model while `work()` runs: its tokens without padding, and all its positions."""
    counts, positions = [], []

    def count(module, args, given):
        own = given["input_ids"].shape[1]
        counts.append(int(given["attention_mask"][:, -own:].sum()))
        positions.append(given["input_ids"].numel())

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        work()
    finally:
        handle.remove()
    return counts, positions


def test_an_input_is_run_once():
    """Tokens of the passes: the inputs and outputs, then the other options without their last tokens. The output head
    runs on the columns that hold outputs."""
    model = make_model("llama")
    long = ("a" * 30, "b" * 20 + "x", "c" * 18)
    task = [Demonstration("z" * 40, long[0], long), Demonstration("y" * 40, "k", ("k", "m"))]
    rows = encode_rows(TOKENIZER, task, choices="required")
    prefix = KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)
    with prefix.attach(model) as attachment:
        forward = Forward(model, attachment, make_batch(rows, range(2), "padded"))
        columns = []
        handle = model.lm_head.register_forward_hook(lambda module, args, out: columns.append(out.shape[:2].numel()))
        tokens, positions = count_passes(model, lambda: score_options(forward, "mean"))
        handle.remove()
    inputs = 42  # with both delimiters
    assert tokens[0] == inputs + 29 + inputs
    assert positions == [2 * (inputs + 29), 2 * 20]  # the branches have 20 and 17 tokens
    assert columns == [2 * 30, 2 * 20]
    assert sum(tokens) < 0.6 * sum(inputs + len(option) - 1 for d in task for option in d.options)


def test_checkpointed_layers_keep_the_gradient():
    """A checkpointed layer gets no cache, without a word: branches would not see their inputs."""
    model = make_model("llama")
    expected = run("ct-kv", model, TASK, {"objective": "options"})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = run("ct-kv", model, TASK, {"objective": "options"})
    assert_same_bits(actual.adapter, expected.adapter)
    assert model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize("name", TRAINING)
def test_every_method_learns_to_choose(name):
    """And micro-batches do not matter."""
    model = make_model("llama", num_hidden_layers=2)
    options = {"objective": "options", "epochs": 3, "lr": 3e-2 if name != "cpt" else 1e-2}
    if name == "cpt":
        options["radius"] = 100.0
    whole = run(name, model, TASK, options)
    losses = [record.loss for record in whole.history if not record.stage]
    assert losses[-1] < losses[0]
    split = run(name, model, TASK, {**options, "max_tokens": 20})
    assert [r.loss for r in split.history] == pytest.approx([r.loss for r in whole.history], abs=1e-6)


def test_an_objective_that_reads_options_needs_some():
    model = make_model("llama")
    free = [*TASK, Demonstration("dusk", "it is late", source="train.jsonl:4")]
    for name in ("ct-kv", "ttt", "ipt"):
        with pytest.raises(DataError, match=r"^train.jsonl:4: this objective needs options to choose from, and"):
            run(name, model, free, {"objective": "options"})
    with pytest.raises(DataError, match=r"the objective options needs rows with options to choose from"):
        rows = encode_rows(TOKENIZER, free, choices="optional")
        with KVPrefix.from_demonstrations(model, TOKENIZER, TASK).attach(model) as attachment:
            forward = Forward(model, attachment, make_batch(rows, range(4), "padded"))
            OBJECTIVES["options"].losses(forward, Weights("mean", 0.5, torch.ones(4)))
    words = [Demonstration(d.input, d.output) for d in DEMONSTRATIONS]  # all of them without options
    answers, mixed = (
        run("ct-kv", model, words, {"objective": name, "layout": "padded"}) for name in ("answers", "mixed")
    )
    assert [r.loss for r in mixed.history] == pytest.approx([r.loss for r in answers.history], abs=1e-6)


def test_processes_that_share_weights_and_rows_are_refused(monkeypatch):
    """They meet in every pass of the model, and would wait for one another where their options need other passes."""
    monkeypatch.setattr(trainer, "is_sharded", lambda model: True)
    learner = SimpleNamespace(parameters=lambda: {"x": torch.nn.Parameter(torch.ones(1))})
    for size in (1, 2):
        ranks = SimpleNamespace(size=size)
        trainer._Loop(None, learner, settings("ct-kv"), ranks, 5)
        if size == 1:
            trainer._Loop(None, learner, settings("ct-kv", objective="mixed"), ranks, 5)
    with pytest.raises(ValueError, match=r"^objective='options' runs a model as often as its options need, and"):
        trainer._Loop(None, learner, settings("ct-kv", objective="options"), ranks, 5)


def test_options_that_the_first_token_does_not_tell_apart():
    with pytest.raises(DataError, match="the options 'warm' and 'ward' begin with the same token under this tokenizer"):
        run("ct-kv", make_model("llama"), TASK, {"objective": "options", "score": "first-token"})


def test_packed_rows_cannot_be_continued():
    model = make_model("llama")
    rows = encode_rows(TOKENIZER, TASK, choices="required")
    prefix = KVPrefix.from_demonstrations(model, TOKENIZER, TASK)
    with (
        prefix.attach(model) as attachment,
        pytest.raises(ValueError, match="options continue the rows of a padded batch, got a packed one"),
    ):
        score_options(Forward(model, attachment, make_batch(rows, range(3), "packed")), "mean")


def test_an_option_that_is_too_long_for_the_model():
    """The row fits, a branch does not: an error before anything runs."""
    model = make_model("llama", max_position_embeddings=64)
    task = [Demonstration("snow", "cold", ("cold", "a" * 50), source="train.jsonl:1"), *DEMONSTRATIONS[:2]]
    with pytest.raises(DataError, match=r"^train.jsonl:1: a row of \d+ tokens behind a prefix of \d+ exceeds"):
        run("ct-kv", model, task, {"objective": "options"})


def test_the_reduction_is_over_rows_or_over_all_tokens_of_a_step():
    """Hand-computed from the losses of single rows."""
    model = make_model("llama")
    still = {"epochs": 1, "drop_p": 0.0, "leave_one_out": "none", "start": "separate"}
    task = [Demonstration("snow", "cold"), Demonstration("a fire", "c")]
    rows = run("ct-kv", model, task, still).history[0].loss
    tokens = run("ct-kv", model, task, {**still, "reduction": "tokens"}).history[0].loss
    prefix = run("ct-kv", model, task, {**still, "lr": 1e-30}).prefix
    first, second = Scorer(model, PairEncoder(TOKENIZER), prefix, 4096).output_losses(task)
    assert rows == pytest.approx((first + second) / 2, abs=1e-6)
    assert tokens == pytest.approx((4 * first + second) / 5, abs=1e-6)
    assert abs(rows - tokens) > 1e-3
