"""One prefix over several tasks: whose rows it is trained on, and what a new task starts from."""

import json

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.data.demonstrations import DataError, Demonstration, load_jsonl
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.methods.meta_prefix import TasksLearner
from tests.tuning.runs import ITEMS, TOKENIZER, run

TASKS = [
    *(Demonstration(f"{word} up", "ok", task="up") for word in ("one", "two", "ten")),
    *(Demonstration(f"{word} down", "no", task="down") for word in ("red", "tan")),
]


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def texts(rows):
    return [TOKENIZER.decode(row.tokens) + TOKENIZER.decode(row.answers[0][-1:]) for row in rows]


def drawn(monkeypatch, model, options, demonstrations=TASKS):
    """The rows of every epoch, as text."""
    seen, rows = [], TasksLearner.rows

    def spy(self, epoch):
        found = rows(self, epoch)
        seen.append(texts(found))
        return found

    monkeypatch.setattr(TasksLearner, "rows", spy)
    result = run("meta-prefix", model, demonstrations, options)
    return seen[1:], result  # the loop looks at the first epoch's before it begins


def test_rows_are_of_one_task_each_and_drawn_anew(monkeypatch, model):
    epochs, _ = drawn(monkeypatch, model, {"shown": 2, "epochs": 4})
    assert len(epochs) == 4 and all(len(rows) == len(TASKS) for rows in epochs)
    ends = [f"{pair.input} {pair.output}" for pair in TASKS]
    for rows in epochs:
        for row, end in zip(rows, ends, strict=True):
            assert row.endswith(end) and row.count(end) == 1  # never shown before itself
            assert ("up" in row) != ("down" in row)
        assert [row.count(" ok") for row in rows[:3]] == [3, 3, 3] and [row.count(" no") for row in rows[3:]] == [2, 2]
    assert len({tuple(rows) for rows in epochs}) > 1
    assert epochs[0][4] == "red down no tan down no"  # no delimiter before the first pair
    fixed, _ = drawn(monkeypatch, model, {"shown": 1, "epochs": 3, "demonstrate": "similar"})
    assert fixed[0] == fixed[1] == fixed[2]


def test_the_loss_is_that_of_the_whole_text(monkeypatch, model):
    epochs, result = drawn(
        monkeypatch, model, {"epochs": 1, "batch_rows": None, "start": "first-ids", "prompt_tokens": 3}
    )
    front, total = [TOKENIZER.bos_token_id, 0, 1, 2], 0.0
    for text, pair in zip(epochs[0], TASKS, strict=True):
        row = TOKENIZER(text, add_special_tokens=False).input_ids
        answer = len(TOKENIZER(pair.output, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = model(torch.tensor([front + row])).logits[0].log_softmax(-1)
        at = len(front) + len(row) - answer
        total -= sum(logits[at + i - 1, row[len(row) - answer + i]] for i in range(answer)).item() / answer
    assert result.history[0].loss == pytest.approx(total / len(TASKS), abs=1e-6)
    assert result.prefix.length == 4 and result.prefix.num_demonstrations == 0


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 2}])
def test_a_new_task_starts_from_it(model, options):
    source = run("meta-prefix", model, TASKS, {"epochs": 3, "shown": 1})
    assert source.history[-1].steps == 2  # 5 rows by 4
    new = DEMONSTRATIONS[:3]
    result = run("ct-kv", model, new, options, start_from=source.adapter)
    own = len(encode_context(TOKENIZER, new).input_ids) - 1  # BOS is the source's
    assert result.prefix.length == source.prefix.length + own and result.prefix.num_demonstrations == 3
    start = zip(result.prefix.parameters(), source.prefix.parameters(), strict=True)
    assert all(torch.equal(a[:, : source.prefix.length], b) for a, b in start) == (options["epochs"] == 0)
    assert result.adapter.evaluate(model, TOKENIZER, ITEMS).items == 2
    tuned = run("prefix-tuning", model, new, {"epochs": 0}, start_from=source.adapter).prefix
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), source.prefix.parameters(), strict=True))


def test_tasks_are_read_from_a_file(tmp_path, model):
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"input": pair.input, "output": pair.output, "task": pair.task}) for pair in TASKS]
    path.write_text("\n".join(lines))
    assert [pair.task for pair in load_jsonl(path)] == [pair.task for pair in TASKS]
    assert load_jsonl(path) == TASKS
    path.write_text('{"input": "a", "output": "b", "task": 3}')
    with pytest.raises(DataError, match=r"many\.jsonl:1: task must be a string, got int 3"):
        load_jsonl(path)


def test_tasks_that_cannot_be_used(model):
    mixed = [*TASKS, Demonstration("a", "b", source="x.jsonl:9")]
    with pytest.raises(DataError, match=r"x\.jsonl:9: the field 'task' is missing, and other"):
        run("meta-prefix", model, mixed)
    with pytest.raises(DataError, match="task 'down' has 1 demonstration, and meta-prefix needs at least 2"):
        run("meta-prefix", model, TASKS[:4])
    with pytest.warns(UserWarning, match="no demonstration names its task: all of them count as one"):
        run("meta-prefix", model, DEMONSTRATIONS, {"epochs": 0})


def test_what_a_later_epoch_could_draw_is_too_long_beforehand(model):
    """Two long pairs before a third one: the first epoch need not draw them."""
    long = [Demonstration("a" * 40 + str(i), "ok", source=f"x.jsonl:{i}", task="long") for i in range(3)]
    short = [Demonstration(f"b{i}", "ok", task="long") for i in range(30)]
    with pytest.raises(DataError, match=r"x\.jsonl:0: a row of \d+ tokens behind a prefix of 6 exceeds the"):
        run("meta-prefix", model, [*long, *short], {"shown": 2, "epochs": 1})
