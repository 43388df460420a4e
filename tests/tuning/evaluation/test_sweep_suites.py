"""Every suite through the command line on a tiny model, from its files to its report; what a sweep shows meanwhile."""

import io
import json

import pytest
import torch
from rich.console import Console

from ctkernels import cli
from ctkernels.cli.view import SweepView
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.data.suites import get_suite
from ctkernels.tuning.evaluation.sweep.cells import Cell, CellResult, read_cell
from ctkernels.tuning.evaluation.sweep.run import Sweep
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.train.distributed import local_device


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model whose tokenizer also knows the end of a line."""
    path = tmp_path_factory.mktemp("suites") / "model"
    make_model("llama", torch.float32, max_position_embeddings=1024).save_pretrained(path)
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["\n", "A", "B", "C", "D", ":"])
    tokenizer.save_pretrained(path)
    return path


def evaluate(files, out, *arguments) -> list[CellResult]:
    """The cells of a sweep that has to succeed, by method."""
    assert cli.run(["eval", "--model", str(files), "--out", str(out), *map(str, arguments)]) == 0
    cells = sorted(out.glob("cells/*/*/*.json"))
    return [read_cell(path) for path in cells]


def test_bbh(files, tmp_path):
    examples = [{"input": f"which {i}?\nOptions:\n- warm\n- cold", "target": "warm"} for i in range(36)]
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "warmth.json").write_text(json.dumps({"examples": examples}))
    asked = ["--suite", "bbh", "--data-dir", tmp_path, "--methods", "icl,ct-kv:epochs=1", "--limit", 2, "--shots", 3]
    results = evaluate(files, tmp_path / "out", *asked)
    assert [(r.metric, r.items) for r in results] == [("accuracy", 2)] * 2
    assert {p for r in results for p in r.predictions} <= {"warm", "cold"}


def test_mmlu(files, tmp_path):
    for split, count in (("dev", 5), ("test", 40)):
        (tmp_path / split).mkdir()
        lines = [f"item {i},a,b,c,d,{i % 4}" for i in range(count)]
        (tmp_path / split / f"tea_{split}.csv").write_text("\n".join(lines))
    asked = ["--suite", "mmlu", "--data-dir", tmp_path, "--methods", "icl", "--shots", 4, "--split", "validation"]
    (result,) = evaluate(files, tmp_path / "out", *asked)
    assert (result.metric, result.items) == ("accuracy", 20)
    assert set(result.predictions) <= set("ABCD")


def test_generation_with_retrieved_demonstrations(files, tmp_path):
    pairs = [{"input": f"say {word}", "output": f"it is {word} now ok"} for word in ("tea", "ice", "sun", "rain")]
    (tmp_path / "speech").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "speech" / f"{split}.jsonl", map(json.dumps, pairs))
    methods = "ipt:epochs=1:prompt_tokens=3:shown=2,icl"
    asked = ["--suite", "generation", "--data-dir", tmp_path, "--methods", methods, "--limit", 2]
    icl, ipt = evaluate(files, tmp_path / "out", *asked)
    assert (icl.method, icl.metric, icl.items) == ("icl", "bleu", 2)
    assert ipt.run["learn_stop"] and "learn_stop" not in icl.run  # what is trained learns where to stop
    assert icl.run["text_format"]["delimiter"] == "\n"
    assert all("\n" not in text and len(text) <= 64 for r in (icl, ipt) for text in r.predictions)


def test_arc_with_votes(files, tmp_path):
    pair = {"input": [[1, 2], [3, 4]], "output": [[1, 1], [1, 1]]}
    (tmp_path / "ab12.json").write_text(json.dumps({"train": [pair] * 3, "test": [pair]}))
    # tuned so hard that every view answers with the one output it knows
    method = "ct-kv:epochs=60:lr=0.1:drop_p=0:leave_one_out=none"
    asked = ["--suite", "arc", "--data-dir", tmp_path, "--methods", method, "--views", 2]
    (result,) = evaluate(files, tmp_path / "out", *asked)
    assert (result.predictions, result.score, result.run["views"]) == (["11\n11"], 1.0, 2)


def test_jsonl_by_its_own_options(files, tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", DEMONSTRATIONS)
    asked = ["--suite", "jsonl", "--data-dir", tmp_path, "--methods", "icl", "--shots", 3, "--seeds", "13,21"]
    results = evaluate(files, tmp_path / "out", *asked)
    assert [(r.metric, r.items, r.seed) for r in results] == [("macro_f1", 5, 13), ("macro_f1", 5, 21)]
    assert results[0].gold_loss != results[1].gold_loss  # other draws
    other = evaluate(files, tmp_path / "other", *asked, "--delimiter", "?", "--bos", "True")
    assert {(r.run["text_format"]["delimiter"], r.run["text_format"]["bos"]) for r in other} == {("?", True)}
    assert other[0].gold_loss != results[0].gold_loss


def test_the_live_table(tmp_path, monkeypatch):
    specs = [MethodSpec("icl"), MethodSpec("ct-kv")]
    sweep = Sweep(get_suite("jsonl"), tmp_path, ["t"], specs, [1, 2], tmp_path)
    Cell("t", specs[0], 1).path(tmp_path).parent.mkdir(parents=True)
    numbers = {"score": 0.5, "gold_loss": 1.25, "seconds": 3.0}
    CellResult("t", "icl", 1, {}, **numbers).write(Cell("t", specs[0], 1).path(tmp_path))
    CellResult("t", "icl", 2, {}, error="no").write(Cell("t", specs[0], 2).path(tmp_path))  # of an earlier attempt
    monkeypatch.setattr("sys.stderr", io.StringIO())
    view = SweepView(sweep, Workers())
    with view:
        view.started(Cell("t", specs[1], 1))
        view.finished(Cell("t", specs[1], 2), CellResult("t", "ct-kv", 2, {}, error="no memory"))
    shown = Console(file=io.StringIO(), width=100)
    shown.print(view.table())
    text = shown.file.getvalue()
    cells = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in text.splitlines()[3:5]}
    assert cells == {"icl": ["1/2", "", "50.0", "1.250", "3.0"], "ct-kv": ["0/2", "1", "", "", ""]}
    assert "2 of 4 cells; now ct-kv on t, seed 1" in text


def test_processes_of_a_gpu_machine_take_their_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    workers = Workers()
    assert [local_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    numbers = workers.numbers()
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    assert next(workers.numbers()) == 0  # a second sweep begins anew
