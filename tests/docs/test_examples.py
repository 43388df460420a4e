"""The example scripts as a user starts them, on a tiny model in the place of the pretrained one."""

import re

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.adapters.prefix import KVPrefix
from examples import compare_methods, many_tasks, train_with_trainer, ttt_then_ct_kv, tune_jsonl


@pytest.fixture
def files(tmp_path):
    """A model, and two tasks in TASKS/."""
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    for name, train in (("warmth", DEMONSTRATIONS), ("taste", DEMONSTRATIONS[::-1][:4])):
        (tmp_path / "tasks" / name).mkdir(parents=True)
        write_jsonl(tmp_path / "tasks" / name / "train.jsonl", train)
        write_jsonl(tmp_path / "tasks" / name / "test.jsonl", DEMONSTRATIONS[:3])
    return tmp_path


def arguments(files, *more) -> list[str]:
    return ["--model", f"{files}/model", *map(str, more)]


def test_tune_jsonl_resumes(files, capsys):
    task = files / "tasks" / "warmth"
    data = ["--train", task / "train.jsonl", "--test", task / "test.jsonl", "--out", files / "out", "--epochs", 3]
    tune_jsonl.main(arguments(files, *data))
    first = capsys.readouterr().out
    assert [int(n) for n in re.findall(r"^epoch (\d):", first, re.MULTILINE)] == [1, 2, 3]
    assert "macro_f1" in first and "'red brick' -> " in first
    assert KVPrefix.from_pretrained(files / "out" / "prefix").metadata.settings["learn_stop"] is True
    tune_jsonl.main(arguments(files, *data))
    again = capsys.readouterr().out
    assert "epoch" not in again and again.splitlines()[0] in first  # the scores, without an epoch run anew


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_train_with_trainer_resumes(files, capsys):
    task = files / "tasks" / "warmth"
    data = ["--train", task / "train.jsonl", "--test", task / "test.jsonl", "--out", files / "out"]
    train_with_trainer.main(arguments(files, *data, "--epochs", 2))
    first = capsys.readouterr().out
    assert "trainable params: " in first and "macro_f1" in first
    assert KVPrefix.from_pretrained(files / "out").metadata.method == "ct-kv"
    train_with_trainer.main(arguments(files, *data, "--epochs", 2))
    assert capsys.readouterr().out.splitlines()[-1] == first.splitlines()[-1]  # the scores, without an epoch run anew
    assert [path.name for path in (files / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_compare_methods(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["zero-shot", "icl", "ct-kv:epochs=2", "prefix-tuning:epochs=2:prompt_tokens=3"]
    compare_methods.main(arguments(files, "--task", files / "tasks" / "warmth", "--limit", 2, "--methods", *words))
    printed = capsys.readouterr().out
    assert all(word in printed for word in words) and printed.count("->") == 2
    with pytest.raises(ValueError, match="did you mean 'ct-kv'"):
        compare_methods.main(["--model", "/no/such", "--methods", "ctkv"])


def test_many_tasks_tunes_each_once(files, capsys):
    more = ["--tasks", files / "tasks", "--out", files / "out", "--epochs", 2]
    many_tasks.main(arguments(files, *more))
    printed = capsys.readouterr().out
    assert printed.count("loss") == 2 and printed.count("on 3 items") == 2
    many_tasks.main(arguments(files, *more))
    again = capsys.readouterr().out
    assert "loss" not in again and again in printed
    (files / "out" / "taste" / "adapter.safetensors").unlink()  # as a run leaves it that is killed before it saves
    many_tasks.main(arguments(files, *more))
    assert capsys.readouterr().out.count("loss") == 1


def test_ttt_then_ct_kv(files, capsys):
    more = ["--task", files / "tasks" / "warmth", "--out", files / "out", "--ttt-epochs", 1, "--epochs", 2]
    ttt_then_ct_kv.main(arguments(files, *more))
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+) +macro_f1", printed, re.MULTILINE) == ["icl", "ttt", "ttt+ct-kv"]
    assert printed.count("starts at a training loss") == 3  # ttt; ttt and ct-kv
    assert f"saved {files}/out" in printed
