"""The demo end to end on a tiny model, and the task that it ships."""

import json
from collections import Counter

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import load_jsonl
from examples import demo

TASK = demo.ROOT / "examples" / "tasks" / "support-routing"


def test_demo_writes_its_results_and_agrees_with_the_plain_loop(tmp_path, capsys):
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", DEMONSTRATIONS)
    write_jsonl(tmp_path / "dev.jsonl", DEMONSTRATIONS[:3])
    write_jsonl(tmp_path / "test.jsonl", DEMONSTRATIONS[::-1])
    out = tmp_path / "out"
    arguments = ["--model", f"{tmp_path}/model", "--out", str(out), "--task", str(tmp_path)]
    demo.main([*arguments, "--epochs", "7", "--plain-epochs", "2"])

    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["results"]] == ["zero-shot", "icl", "ct-kv", "ct-kv, options"]
    assert [len(row["held_out"]) for row in results["results"]] == [0, 0, 0, 8]
    assert all(row["calibrated"]["accuracy"] >= 0 for row in results["results"])
    assert results["comparison"]["difference"] < 1e-5
    assert len(results["comparison"]["plain"]["losses"]) == 2
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert KVPrefix.from_pretrained(out / "prefix").metadata.method == "ct-kv"
    printed = capsys.readouterr().out
    assert all(f"{row['gold_loss']:.3f}" in printed for row in results["results"])


def test_a_loop_that_disagrees_fails_the_demo(monkeypatch, tmp_path):
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", DEMONSTRATIONS)
    write_jsonl(tmp_path / "dev.jsonl", DEMONSTRATIONS[:3])
    write_jsonl(tmp_path / "test.jsonl", DEMONSTRATIONS)
    plain = demo.plain_ctkv.row_losses
    monkeypatch.setattr(demo.plain_ctkv, "row_losses", lambda *args: 1.01 * plain(*args))
    arguments = ["--model", f"{tmp_path}/model", "--out", f"{tmp_path}/out", "--task", str(tmp_path)]
    with pytest.raises(SystemExit, match="the losses differ from the plain implementation's"):
        demo.main([*arguments, "--epochs", "1", "--plain-epochs", "1"])


def test_the_shipped_task_is_balanced_and_its_test_items_are_unseen():
    train, dev, test = (load_jsonl(TASK / f"{split}.jsonl") for split in ("train", "dev", "test"))
    labels = ("account", "delivery", "payment", "product")
    assert Counter(d.output for d in train) == dict.fromkeys(labels, 4)
    assert Counter(d.output for d in dev) == dict.fromkeys(labels, 4)
    assert Counter(d.output for d in test) == dict.fromkeys(labels, 25)
    assert {d.options for d in train + dev + test} == {labels}
    assert len({d.input for d in train + dev + test}) == 132
