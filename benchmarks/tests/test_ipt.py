"""Instruction prompt tuning's tables: the public formats are read, and the tables hold what the cells say."""

import json

import pytest
import torch

from benchmarks import bench_ipt
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import IDS, char_tokenizer

E2E = 'mr,ref\n"name[ink], food[tea]","ink has tea."\n"name[ink], food[tea]","tea at ink"\n"name[sun]","a sun"\n'
GEO = "parse([what,is,the,capital,of,utah,?], answer(A,(capital(A)))).\nparse(['how','big'], answer(B,size(B))).\nx\n"


def test_the_public_formats(tmp_path):
    (tmp_path / "e2e.csv").write_text(E2E)
    (tmp_path / "geo.txt").write_text(GEO * 2)
    pool, test = bench_ipt.read_e2e(tmp_path / "e2e.csv", tmp_path / "e2e.csv")
    assert [(p.input, p.output) for p in pool] == [("name[ink], food[tea]", "ink has tea."), ("name[sun]", "a sun")]
    assert test[0].references == ("tea at ink",)
    pool, test = bench_ipt.read_geoquery(tmp_path / "geo.txt")
    assert sorted(p.input for p in (*pool, *test)) == ["how big", "what is the capital of utah ?"]
    assert sorted(p.output for p in (*pool, *test)) == ["answer(A,(capital(A)))", "answer(B,size(B))"]


def test_overlap():
    assert bench_ipt.overlap("a b c", "B, c d") == 0.5 and bench_ipt.overlap("a", "b") == 0


def test_tables_from_cells(tmp_path, monkeypatch):
    monkeypatch.setitem(IDS, "\n", len(IDS))  # the suite's answers end with their line
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    rows = [f'"item {i} of {n}","answer {i % 3}"' for i in range(8) for n in ("tea", "ink")]
    (tmp_path / "e2e.csv").write_text("mr,ref\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out"
    small = ["--lengths", "2", "--seeds", "13", "21", "--shots", "3", "--epochs", "1", "--limit", "4"]
    files = ["--e2e", str(tmp_path / "e2e.csv"), str(tmp_path / "e2e.csv")]
    bench_ipt.main(["--model", f"{tmp_path}/model", "--dtype", "float32", "--out", str(out), *small, *files])
    record = json.loads((out / "ipt.json").read_text())
    assert len(record["cells"]) == 6 and not any(cell["error"] for cell in record["cells"])
    assert record["similarity"]["e2e"]["pairs"] == 8  # four items with two seeds
    text = (out / "ipt.md").read_text()
    scores = [100 * cell["score"] for cell in record["cells"] if cell["method"].startswith("ipt")]
    assert f"| e2e | ipt | {bench_ipt.spread(scores)} |" in text
    with pytest.raises(SystemExit):
        bench_ipt.main(["--model", "x"])
