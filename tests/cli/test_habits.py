"""What people expect of any command line: version, help, lists, defaults that are said, pipes, logs of batch jobs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ctkernels
from ctkernels import cli
from ctkernels.cli.progress import EpochLog
from ctkernels.tuning.methods.settings import SETTINGS
from ctkernels.tuning.train.trainer import EpochRecord
from tests.cli.test_cli import complaint, eval_arguments, tune_arguments

ROOT = Path(__file__).parents[2]


def command(*words, **others) -> subprocess.CompletedProcess:
    arguments = {"capture_output": True, "text": True, "cwd": ROOT, **others}
    return subprocess.run([sys.executable, "-m", "ctkernels", *map(str, words)], **arguments)


def test_version_and_help(capsys):
    found = command("--version")
    assert (found.returncode, found.stdout) == (0, f"ctkernels {ctkernels.__version__}\n")
    assert cli.run(["help"]) == 0 and "usage: ctkernels COMMAND" in capsys.readouterr().out
    for words in (["env", "--help"], ["help", "env"]):
        assert cli.run(words) == 0 and "usage: ctkernels env" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.run(["help", "tune"])
    assert left.value.code == 0 and "usage: ctkernels tune" in capsys.readouterr().out


def test_help_says_each_methods_default(capsys):
    for words in (["tune", "--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit):
            cli.run(words)
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "DEFAULT" not in text
        assert all(f"(default: {setting.defaults})" in text for setting in SETTINGS.values())
    assert SETTINGS["epochs"].defaults == "25; 8 (ttt, ttt+ct-kv)" and SETTINGS["lora_targets"].defaults == "none"


def test_lists_and_settings_of_methods(files, tmp_path, capsys):
    out = tmp_path / "scores.json"
    words = ["--methods", "icl,ct-kv:epochs=1", "ct-kv:epochs=2:drop_p=0", "--out", str(out), "--lr", "1e-2"]
    assert cli.run(eval_arguments(files, *words)) == 0
    names = [row["name"] for row in json.loads(out.read_text())["results"]]
    assert names == ["icl", "ct-kv:epochs=1", "ct-kv:epochs=2:drop_p=0.0"]
    capsys.readouterr()
    for word, why in (("ct-kv:noise=0.2", "noise is for the tasks of a suite"), ("ct-kv:lr=x", "lr must be a number")):
        assert why in complaint(capsys, eval_arguments(files, "--methods", word))


def test_tables_are_not_cut_in_a_pipe(files, tmp_path):
    assert cli.run(tune_arguments(files, tmp_path / ("long" * 30), "--epochs", "1")) == 0
    name = str(tmp_path / ("long" * 30) / "prefix")
    shown = command(*eval_arguments(files, "--prefix", name))
    assert shown.returncode == 0 and shown.stdout.count(name) == 2


def test_a_reader_that_ends_early_is_no_error():
    script = f'"{sys.executable}" -m ctkernels models | head -1; echo "${{PIPESTATUS[1]}}"'
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert found.stderr == "" and found.stdout.endswith("0\n")


def test_backslash_n_is_a_line_break(files, tmp_path, capsys):
    words = tune_arguments(files, tmp_path / "run", "--delimiter", r"\n")
    assert r"turns '\n' into" in complaint(capsys, words)  # the tests' tokenizer has no line break


def test_without_a_network_a_hub_id_ends_soon(files, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nothing listens there
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        started = time.monotonic()
        words = ["tune", "--model", "no-such/model", "--train", f"{files}/train.jsonl", "--out", tmp_path / "run"]
        found = command(*words, env=environment)
    assert found.returncode == 2 and "cannot load the model 'no-such/model'" in found.stderr
    assert "cannot be reached" in found.stderr and time.monotonic() - started < 60  # the import alone takes seconds


def test_a_log_shows_progress_and_a_line_is_written_after_each_epoch(files, tmp_path):
    out = tmp_path / "run"
    found = command(*tune_arguments(files, out, "--epochs", "3"))
    assert "tuning epoch 1/3: loss" in found.stderr and "tuning epoch 3/3: loss" in found.stderr
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert lines == json.loads((out / "history.json").read_text())


def test_a_resumed_run_has_each_epoch_once(tmp_path):
    path = tmp_path / "history.jsonl"

    def record(epoch, stage=""):
        return EpochRecord(epoch, 1.0, 0.1, 1.0, 0.5, stage)

    first = EpochLog(path)
    for number, one in enumerate((record(1, "ttt"), record(2, "ttt"), record(1), record(2), record(3)), start=1):
        assert first.add(one) == number
    path.write_text(path.read_text() + '{"epoch": 4, "lo')  # it was killed
    second = EpochLog(path)
    assert (second.add(record(2)), second.add(record(3))) == (4, 5)
    found = [(one["stage"], one["epoch"]) for one in map(json.loads, path.read_text().splitlines())]
    assert found == [("ttt", 1), ("ttt", 2), ("", 1), ("", 2), ("", 3)]
    EpochLog(path).add(record(2, "ttt"))
    assert len(path.read_text().splitlines()) == 2
