"""Tuning in the background over HTTP: published by name, watched, cancelled, one at a time; bad requests refused."""

import json
import threading
from unittest.mock import Mock

import pytest
import torch

from ctkernels.serving.server import tuner
from ctkernels.serving.server.protocol import Limits
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning import TextFormat, tune
from tests.serving.server.serving import NAME, running, stored, tiny

JSONL = "\n".join(json.dumps({"input": d.input, "output": d.output}) for d in DEMONSTRATIONS)
GOOD = {"name": "new/task", "demonstrations": JSONL, "epochs": 3, "delimiter": " ", "seed": 5}


@pytest.fixture
def server(tmp_path):
    model = tiny()
    limits = Limits(body_bytes=50_000, demonstrations=6, epochs=10)
    with running(model, stored(tmp_path / "store", model), limits=limits) as server:
        yield server


@pytest.fixture
def held(monkeypatch):
    """Tunings that wait, after their start, until the event is set."""
    go = threading.Event()

    def waits(*args, **settings):
        go.wait(30)
        return tune(*args, **settings)

    monkeypatch.setattr(tuner, "tune", waits)
    return go


def test_a_task_is_tuned_while_others_are_served(server):
    """The result is that of `tune`, a request in the meantime has its answer, and the store has no other file."""
    asked = {"model": "long", "prompt": "ice", "max_tokens": 5, "temperature": 0}
    before = server.post("/v1/completions", **asked).json()["choices"]
    events = []
    with server.client.stream("POST", "/v1/prefixes", json={**GOOD, "stream": True}) as response:
        for line in response.iter_lines():
            if line and line != "data: [DONE]":
                events.append(json.loads(line.removeprefix("data: ")))
                if events[-1]["event"] == "epoch":
                    assert server.post("/v1/completions", **asked).json()["choices"] == before
    assert [event["event"] for event in events] == ["started", "epoch", "epoch", "epoch", "published"]
    assert events[0] == {"event": "started", "name": "new/task", "demonstrations": 5, "epochs": 3}
    pairs = [{"input": d.input, "output": d.output} for d in DEMONSTRATIONS]
    wanted = tune(tiny(), char_tokenizer(), pairs, "ct-kv", {"epochs": 3, "seed": 5}, TextFormat(delimiter=" "))
    found = server.service.store.get("new/task")
    assert all(torch.equal(x, y) for x, y in zip(found.parameters(), wanted.prefix.parameters(), strict=True))
    assert [event["loss"] for event in events[1:4]] == [record.loss for record in wanted.history]
    assert events[-1]["tokens"] == found.length

    described = server.client.get("/v1/prefixes/new/task").json()
    assert described == {
        "name": "new/task",
        "model": f"{NAME}:new/task",
        "tokens": found.length,
        "demonstrations": 5,
        "method": "ct-kv",
        "delimiter": " ",
    }
    assert {"name": "new/task"} in server.client.get("/v1/prefixes").json()["data"]
    assert server.post("/v1/completions", **{**asked, "model": "new/task"}).status_code == 200
    assert 'ctkernels_tunings_total{end="published"} 1.0' in server.client.get("/metrics").text
    files = [path.name for path in server.service.store.directory.parent.rglob("*") if path.is_file()]
    of_others = ["team b%3A %C3%84.safetensors", "team-a%2Frouting.safetensors"]
    assert sorted(files) == ["long.safetensors", "new%2Ftask.safetensors", *of_others]


def test_one_at_a_time_and_cancelled(server, held):
    assert server.client.get("/v1/tuning").status_code == 404
    assert server.client.delete("/v1/tuning").status_code == 404
    response = server.post("/v1/prefixes", **GOOD)
    assert response.status_code == 202 and response.json() == {"name": "new/task", "events": "/v1/tuning"}
    second = server.post("/v1/prefixes", **{**GOOD, "name": "other"})
    assert second.status_code == 409 and "another task is being tuned" in second.json()["error"]["message"]
    assert server.client.delete("/v1/tuning").json() == {"name": "new/task", "cancelled": True}
    held.set()
    lines = [line for line in server.client.get("/v1/tuning").text.split("\n\n") if line]
    events = [json.loads(line.removeprefix("data: "))["event"] for line in lines[:-1]]
    assert events == ["started", "epoch", "cancelled"] and lines[-1] == "data: [DONE]"
    assert "new/task" not in server.service.store
    third = server.post("/v1/prefixes", **{**GOOD, "name": "other"})
    assert third.status_code == 202
    assert "published" in server.client.get("/v1/tuning").text and "other" in server.service.store


def test_a_failure_is_told(server, monkeypatch, caplog):
    """One sentence to the client, the rest to the log; then the next task can be tuned."""
    for error, message in ((ArithmeticError("loss is nan"), "loss is nan"), (RuntimeError("/srv/x"), "RuntimeError;")):
        monkeypatch.setattr(tuner, "tune", Mock(side_effect=error))
        events = server.stream("/v1/prefixes", **GOOD)
        assert events[-1]["event"] == "failed" and message in events[-1]["message"]
        assert "/srv/x" not in str(events)
    assert "/srv/x" in caplog.text and "new/task" not in server.service.store


WRONG = [
    ({"name": ""}, 400, "name: String should have at least 1 character"),
    ({"name": "x" * 201}, 400, "name: String should have at most 200 characters"),
    ({"name": "Ä" * 100}, 400, "name must have 1 to 221 bytes when quoted"),
    ({"name": "a\nb"}, 400, "name must be printable"),
    ({"name": "a\0b"}, 400, "name must be printable"),
    ({"name": " a"}, 400, "name must be printable, without spaces around it"),
    ({"name": NAME}, 400, "name must not be that of the model"),
    ({"name": f"{NAME}:x"}, 400, "name must not be that of the model"),
    ({"name": "long"}, 409, "there is a prefix 'long' already; replace=true replaces it"),
    ({"demonstrations": ""}, 400, "the file holds no input/output pair"),
    ({"demonstrations": "{"}, 400, "demonstrations:1: not a JSON object"),
    ({"demonstrations": '{"input": "a"}'}, 400, "demonstrations:1: the field 'output' is missing"),
    ({"demonstrations": '{"input": "a", "output": "b"}'}, 400, "at least"),
    ({"demonstrations": f"{JSONL}\n{JSONL}"}, 400, "demonstrations: at most 6 on this server, got 10"),
    ({"demonstrations": '{"input": "a", "output": "\\ud800"}\n' * 2}, 400, "output must be Unicode text"),
    ({"demonstrations": json.dumps({"input": "a" * 250, "output": "b"}) + "\n" + JSONL}, 400, "tokens"),
    ({"epochs": 11}, 400, "epochs must be at most 10 on this server, got 11"),
    ({"epochs": 0}, 400, "epochs"),
    ({"lr": 0}, 400, "lr"),
    ({"delimiter": "  "}, 400, "delimiter must be exactly one token"),
    ({"out": "/etc/passwd"}, 400, "out is not supported by this server"),
]


def test_bad_tasks_are_refused(server):
    """Before anything is tuned or written."""
    before = sorted(server.service.store.directory.parent.rglob("*"))
    for change, status, message in WRONG:
        response = server.post("/v1/prefixes", **{**GOOD, **change})
        assert response.status_code == status, (change, response.text)
        assert message in response.json()["error"]["message"], response.text
    assert server.service.tuner.last is None and sorted(server.service.store.directory.parent.rglob("*")) == before


def test_names_are_no_paths(server, held):
    """What looks like a path is a name, and its file lies in the store."""
    held.set()
    for name in ("../../outside", "/tmp/outside", "..", "%2e%2e%2foutside"):
        events = server.stream("/v1/prefixes", **{**GOOD, "name": name, "epochs": 1})
        assert events[-1]["event"] == "published"
        assert server.post("/v1/completions", model=name, prompt="a", max_tokens=1).status_code == 200
    folder = server.service.store.directory
    outside = {path for path in folder.parent.rglob("*")} - {folder} - set(folder.iterdir())
    assert not outside and len(list(folder.iterdir())) == 3 + 4
