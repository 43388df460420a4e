"""`ctkernels models`."""

import json

import pytest

from ctkernels.cli import run
from ctkernels.tuning.hf import served


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CTKERNELS_CACHE", str(tmp_path))
    return tmp_path / "proofs"


def test_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["models", "llama", "Mamba", "falcon"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out and "served" in out
    assert "it has no attention whose keys and values could be a prefix" in out.replace("│", "")
    assert "in part" in out and "rounds its position bias" in out
    assert "Gemma" not in out


def test_json(capsys):
    assert run(["models", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = {row["model_type"]: row for row in answer["models"]}
    assert rows.keys() == served.shipped()["models"].keys()
    assert rows["llama"]["reason"] is None and rows["llama"]["difference"] < 1e-9 < 1e-3 < rows["llama"]["effect"]
    assert rows["mamba"]["reason"].startswith("it has no attention")


def test_what_was_proved_here(capsys, cache):
    import transformers

    cache.mkdir()
    entry = {"class": "mine.Model", "reason": "left padding: results differ", "differences": {}, "effect": 1.0}
    for name, version in (("a", transformers.__version__), ("b", "1.0")):
        (cache / f"{name}.json").write_text(json.dumps({**entry, "class": f"{name}.Model", "transformers": version}))
    (cache / "c.json").write_text("{")
    assert run(["models", "Model", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["class"] for row in rows if row.get("here")] == ["a.Model"]


def test_wrong_usage(capsys):
    assert run(["models", "--all"]) == 2
    assert "unknown option --all" in capsys.readouterr().err
    assert run(["models", "no-such-model"]) == 2
    assert "no model type and no class contains no-such-model" in capsys.readouterr().err
    assert run(["models", "--help"]) == 0
    assert "usage: ctkernels models" in capsys.readouterr().out
