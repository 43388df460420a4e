"""`--log-with`: what TensorBoard and Weights & Biases get of a run."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

from ctkernels import cli
from ctkernels.cli import trackers
from tests.cli.test_cli import complaint, tune_arguments


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, of all event files below a folder (records of 8 + 4 bytes, the event, and 4 bytes)."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which keeps what it is told."""
    told = SimpleNamespace(started=[], config={}, logged=[], finished=0)

    class Run:
        def log(self, values, step):
            told.logged.append((step, values))

        def finish(self):
            told.finished += 1

    module = ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.init = lambda **arguments: told.started.append(arguments) or Run()
    module.config = SimpleNamespace(update=lambda values, allow_val_change: told.config.update(values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_tensorboard_has_every_epoch(files, tmp_path):
    out = tmp_path / "run"
    words = ("--epochs", "3", "--holdout", "1", "--log-with", "tensorboard")
    assert cli.run(tune_arguments(files, out, *words)) == 0
    history = json.loads((out / "history.json").read_text())
    found = scalars(out / "tensorboard")
    for name in ("loss", "lr", "grad_norm", "seconds"):
        assert found[name] == pytest.approx({r["epoch"]: r[name] for r in history}, rel=1e-6), name
    held_out = {0: history[0]["held_out_start"], **{r["epoch"]: r["held_out"] for r in history}}
    assert found["held_out"] == pytest.approx(held_out, rel=1e-6)
    (hyperparameters,) = (out / "tensorboard").rglob("hparams.yml")
    assert "drop_p: 0.05" in hyperparameters.read_text()


def test_stages_come_one_after_another(files, tmp_path):
    """In the steps that `history.jsonl` counts."""
    out = tmp_path / "run"
    words = ("--method", "ttt+ct-kv", "--ttt-epochs", "2", "--epochs", "3", "--log-with", "tensorboard")
    assert cli.run(tune_arguments(files, out, *words)) == 0
    found = scalars(out / "tensorboard")
    assert list(found["ttt/loss"]) == [1, 2] and list(found["loss"]) == [3, 4, 5]
    lines = (out / "history.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["loss"] for line in lines[2:]] == pytest.approx(list(found["loss"].values()), rel=1e-6)


def test_wandb(files, tmp_path, wandb):
    out = tmp_path / "run"
    assert cli.run(tune_arguments(files, out, "--epochs", "2", "--log-with", "wandb,tensorboard")) == 0
    history = json.loads((out / "history.json").read_text())
    assert wandb.started == [{"project": "ctkernels", "name": "run"}] and wandb.finished == 1
    expected = [(r["epoch"], {name: r[name] for name in ("loss", "lr", "grad_norm", "seconds")}) for r in history]
    assert wandb.logged == expected
    assert wandb.config["lr"] == 3e-3 and wandb.config["method"] == "ct-kv"
    assert scalars(out / "tensorboard")["loss"].keys() == {1, 2}


def test_a_tracker_that_does_not_start_ends_the_run_before_it_trains(files, tmp_path, capsys, wandb):
    def refuse(**arguments):
        raise RuntimeError("no API key")

    sys.modules["wandb"].init = refuse
    line = complaint(capsys, tune_arguments(files, tmp_path / "run", "--log-with", "wandb"), status=1)
    assert line.endswith("--log-with wandb cannot start: no API key")
    assert not (tmp_path / "run" / "history.jsonl").exists()


@pytest.mark.parametrize("missing", ["accelerate", "tensorboard", "wandb"])
def test_missing_packages_name_the_extra(files, tmp_path, capsys, monkeypatch, missing):
    name = "wandb" if missing == "wandb" else "tensorboard"
    monkeypatch.setattr(trackers, "find_spec", lambda found: None if missing in found.lower() else True)
    line = complaint(capsys, tune_arguments(files, tmp_path / "run", "--log-with", name))
    assert line.endswith(f"--log-with {name} needs packages that are not installed: pip install 'ctkernels[{name}]'")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker(files, tmp_path, capsys):
    line = complaint(capsys, tune_arguments(files, tmp_path / "run", "--log-with", "tensorbord"))
    assert line.endswith("log_with must be tensorboard or wandb, got 'tensorbord'")
