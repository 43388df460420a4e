"""The benchmark scripts end to end on toy sizes."""

import json
import shutil
import time
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_dropin,
    bench_engines,
    bench_many,
    bench_scaling,
    bench_serving,
    bench_tuning,
    harness,
    profile_attention,
    render,
)
from benchmarks.cases import Case, sweep
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl

TOY = Case("toy", B=4, H=4, Hk=2, S=3, P=40, D=16, segments=4)


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    monkeypatch.setattr(harness.MatrixProduct, "SIZES", (64,))
    monkeypatch.setattr(harness.MatrixProduct, "LAP", 1e-4)


def read(path):
    return json.loads((path / f"{path.name}.json").read_text()), (path / f"{path.name}.md").read_text()


def test_bench_attention(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_attention, "HEADLINE", (TOY,))
    monkeypatch.setattr(bench_attention, "QUICK", (replace(TOY, name="bf16 toy", dtype=torch.bfloat16),))
    out = tmp_path / "bench_attention"
    bench_attention.main(["--seconds", "0", "--out", str(out)])
    record, markdown = read(out)
    assert [case["name"] for case in record["results"]] == ["toy", "bf16 toy"]
    assert {"cpu", "cores", "isa", "torch", "load"} <= record["machine"].keys()
    for case in record["results"]:
        for name in ("ctkernels", "eager", "sdpa"):
            assert case["entries"][name]["times"].keys() == {"forward", "backward", "both"}
    assert markdown.count("| toy (B=4 H=4 Hk=2 P=40 S=3 D=16, 4 segments, float32) |") == 3
    assert markdown in capsys.readouterr().out


def test_a_page_without_markers_raises_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- /a -->\n<!-- a -->\n")
    with pytest.raises(ValueError, match="must hold the markers <!-- a -->"):
        harness.replace_between_markers(page, "a", "x")


def test_the_documents_show_the_committed_results(tmp_path):
    """Every committed table is what its JSON gives, in benchmarks/results and in the documents."""
    for folder in (render.RESULTS, render.RESULTS / "full"):
        for name, record in render.read(folder).items():
            assert (folder / f"{name}.md").read_text() == f"{render.text(name, record)}\n", (folder, name)
    pages = {"README.md", *render.PAGES.values()}
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(render.ROOT / page, tmp_path / page)
    render.write_documents(render.read(render.RESULTS), tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (render.ROOT / page).read_text(), page


def test_render_writes_a_folder_and_leaves_the_documents_alone(tmp_path):
    before = {page: (render.ROOT / page).stat().st_mtime_ns for page in ("README.md", *render.PAGES.values())}
    shutil.copy(render.RESULTS / "bench_tuning.json", tmp_path)
    render.main(["--results", str(tmp_path)])
    assert (tmp_path / "bench_tuning.md").read_text() == (render.RESULTS / "bench_tuning.md").read_text()
    assert before == {page: (render.ROOT / page).stat().st_mtime_ns for page in before}
    with pytest.raises(ValueError, match="missing: bench_attention, bench_dropin, bench_scaling, bench_serving"):
        render.write_documents(render.read(tmp_path))
    with pytest.raises(SystemExit):
        render.main(["--results", str(tmp_path / "none")])


def test_the_summary_is_of_one_machine():
    records = render.read(render.RESULTS)
    machine, results = records["bench_serving"]
    with pytest.raises(ValueError, match=r"reports of one machine, got: .*3 cores"):
        render.summary({**records, "bench_serving": ({**machine, "cores": 3}, results)})


def test_a_phase_that_a_peer_cannot_run_is_reported():
    result = bench_attention.measure(TOY, ["sdpa"], seconds=0)
    result["entries"]["flex"] = {
        "times": {"forward": harness.Spread(2.0, 1.0, 3.0, 1.0, 3)},
        "extra_bytes": 5_000_000,
        "reason_backward": "no backward here",
    }
    text = bench_attention.markdown([result])
    (line,) = [line for line in text.splitlines() if "| flex |" in line]
    assert "2000 (1000-3000)" in line and "no backward here" in line and "5.0" in line
    assert "flex ms" not in text  # no column of its own


def test_bench_scaling(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_scaling, "BASE", replace(TOY, segments=0))
    monkeypatch.setattr(bench_scaling, "MANY_SHOT", replace(TOY, name="many-shot", segments=0))
    monkeypatch.setattr(bench_scaling, "decoding_cases", lambda full: [replace(TOY, S=1, past=2, segments=0, G=2)])
    small = {"prefix length P": (8, 16), "rows B": (1, 2), "demonstrations k": (2, 3)}
    sweeps = [replace(s, values=small.get(s.name, s.values)) for s in bench_scaling.SWEEPS]
    monkeypatch.setattr(bench_scaling, "SWEEPS", sweeps)
    out = tmp_path / "bench_scaling"
    threads = torch.get_num_threads()
    bench_scaling.main(["--seconds", "0", "--out", str(out)])
    record, markdown = read(out)
    results = record["results"]
    assert list(results["sweeps"]) == [*(s.name for s in sweeps), "threads"]
    for name, points in results["sweeps"].items():
        assert len(points) >= 1 and f"| {name} |" in markdown
    # what the mask hides is not counted
    dropout = [point["flops"]["both"] for point in results["sweeps"]["drop_p"]]
    assert dropout == sorted(dropout, reverse=True) and dropout[-1] < dropout[0] / 2
    (decoding,) = results["decoding"]
    assert decoding["bytes"] == 2 * 2 * 16 * (2 * 40 + 4 * 3) * 4
    assert decoding["binds"] in decoding["floors"] and decoding["reached"] > 0
    assert results["many_shot"]["entries"]["ctkernels"]["times"]
    assert (out / "bench_scaling.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads


def tuning_arguments(tmp_path):
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", DEMONSTRATIONS)
    write_jsonl(tmp_path / "test.jsonl", DEMONSTRATIONS[::-1])
    files = ["--model", f"{tmp_path}/model", "--task", str(tmp_path), "--out", f"{tmp_path}/bench_tuning"]
    return [*files, "--lengths", "10", "80", "--rounds", "1", "--items", "2"]


def test_bench_many(tmp_path):
    files = tuning_arguments(tmp_path)[:4]
    out = tmp_path / "bench_many"
    few = ["--counts", "1", "2", "--demonstrations", "3", "--epochs", "2", "--rounds", "1"]
    bench_many.main([*files, *few, "--out", str(out)])
    record, markdown = read(out)
    one, two = record["results"]
    assert (one["G"], two["G"]) == (1, 2) and one["rows"] == 3 and two["rows"] == 6
    assert one["P"] == two["P"][:1] and one["difference"] == 0 and two["difference"] < 1e-4
    assert "| G | P | rows (tokens) of a step | together, ms |" in markdown and markdown.count("x | ") == 2


def test_bench_tuning(tmp_path):
    bench_tuning.main([*tuning_arguments(tmp_path), "--profile"])
    record, markdown = read(tmp_path / "bench_tuning")
    natural, longer = record["results"]["epochs"]
    assert natural["P"] < 80 <= longer["P"] < 110
    for result in (natural, longer):
        assert result["losses"].keys() == result["seconds"].keys() == {"ctkernels", "sdpa", "eager"}
        assert result["difference"] < 1e-4 and result["seconds"]["sdpa"]["count"] == bench_tuning.EPOCHS
    assert natural["losses"]["ctkernels"][0] != longer["losses"]["ctkernels"][0]
    methods = record["results"]["methods"]
    assert [m["method"] for m in methods] == list(bench_tuning.METHODS)
    assert [m["method"] for m in methods if m["epoch"]] == [
        name for name, method in bench_tuning.METHODS.items() if method.trains != "nothing"
    ]
    assert all(f"| {m['method']} |" in markdown for m in methods)
    assert "ctkernels::cpu_backward" in (tmp_path / "bench_tuning" / "profile_ctkernels.txt").read_text()
    assert "ctkernels" not in (tmp_path / "bench_tuning" / "profile_sdpa.txt").read_text()


def small_works(monkeypatch):
    works = [replace(work, B=2, S=8, new=min(work.new, 2)) for work in bench_dropin.WORKS]
    monkeypatch.setattr(bench_dropin, "WORKS", works)
    return works


def test_bench_dropin(monkeypatch, tmp_path):
    works = small_works(monkeypatch)
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    out = tmp_path / "bench_dropin"
    bench_dropin.main(["--model", f"{tmp_path}/model", "--seconds", "0", "--out", str(out)])
    record, markdown = read(out)
    assert [result["work"] for result in record["results"]] == [str(work) for work in works]
    for result in record["results"]:
        assert result["times"].keys() == {"ctkernels", "sdpa"} and 0 <= result["difference"] < 1e-4
        assert f"| {result['work']} |" in markdown


def test_models_that_disagree_are_not_timed(monkeypatch):
    original = bench_dropin.run

    def other(model, work, batch):
        out = original(model, work, batch)
        return out * 1.1 if model.config._attn_implementation == "sdpa" else out

    monkeypatch.setattr(bench_dropin, "run", other)
    with pytest.raises(ArithmeticError, match="results differ by"):
        bench_dropin.compare(make_model("llama", torch.float32), small_works(monkeypatch)[0], seconds=0)


def test_loops_that_disagree_are_not_timed(monkeypatch, tmp_path):
    plain = bench_tuning.plain_ctkv.row_losses
    monkeypatch.setattr(bench_tuning.plain_ctkv, "row_losses", lambda *args: 1.01 * plain(*args))
    with pytest.raises(ArithmeticError, match=r"the losses differ by 9\.9e-03, more than 1e-03"):
        bench_tuning.main(tuning_arguments(tmp_path))


def serving_arguments(tmp_path):
    arguments = tuning_arguments(tmp_path)
    small = ["--length", "20", "--rows", "3", "--new-tokens", "2", "--rounds", "1", "--stored", "6"]
    return [*arguments[: arguments.index("--out")], "--out", f"{tmp_path}/bench_serving", *small]


def test_bench_serving(tmp_path):
    bench_serving.main(serving_arguments(tmp_path))
    record, markdown = read(tmp_path / "bench_serving")
    batches = record["results"]["batches"]
    assert [(batch["rows"], batch["tasks"]) for batch in batches] == [(1, 1), (3, 1), (3, 3)]
    for batch in batches:
        assert batch["difference"] < bench_serving.AGREEMENT
        assert (bench_serving.COPIED in batch["ways"]) == (batch["tasks"] == 1)  # one cache cannot hold several tasks
        for times in batch["ways"].values():
            assert times.keys() == {"first", "answer"} and times["first"]["count"] == 1
    assert markdown.count("encoded anew |") == 3 and "lay 3 prefixes side by side" in markdown
    sizes = record["results"]["store"]["file_bytes"]
    assert 1.5 < sizes["float32"] / sizes["bfloat16"] < 2


def test_ways_of_serving_that_disagree_are_not_timed(monkeypatch, tmp_path):
    def shortened(self, store, count):
        with self.kept.attach(self.owner):
            return self._generate(self.ids[:, 1:], self.mask[:, 1:], count)

    monkeypatch.setattr(bench_serving.Requests, "_attached", shortened)
    with pytest.raises(ArithmeticError, match="the logits of the first token differ by"):
        bench_serving.main(serving_arguments(tmp_path))


def test_the_full_sweep_spans_the_models_and_sizes():
    cases = sweep()
    assert {case.name for case in cases} == {"SmolLM2", "Llama-3.2-1B", "Qwen2.5-1.5B", "Gemma-3-1B"}
    for sizes in ({case.P for case in cases}, {case.S for case in cases}, {case.B for case in cases}):
        assert len(sizes) >= 3
    assert max(case.P for case in cases) == 16384 and max(case.S for case in cases) == 512


def test_profile_shares():
    report = """
    # Overhead  Shared Object  Symbol
    40.00%  _C.so  [.] ctk::cpu::avx512::(anonymous namespace)::rows_panel<float, 3>
    20.00%  _C.so  [.] ctk::cpu::avx512::(anonymous namespace)::cols_tail<float, 3, 7>
    15.00%  libgomp.so.1  [.] 0x1
     5.00%  libc.so.6  [.] __memmove_avx512_unaligned_erms
    """
    shares = profile_attention.shares(report)
    assert shares["matrix products"] == pytest.approx(0.6)
    assert (shares["threads waiting"], shares["copies, clearing"]) == (0.15, 0.05)
    assert sum(shares.values()) == pytest.approx(0.8)


class PretendEngine:
    """An engine that answers at once, and what it was asked."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, python, model, store, log, **options):
        self.known = {f"base:{path.stem}" for path in store.iterdir()} | {"base"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def stream(self, model, prompt, max_tokens, **fields):
        assert model in self.known and fields == {"ignore_eos": True}
        self.asked.append((model, len(prompt)))
        yield from (time.perf_counter() for _ in range(max_tokens))


def test_bench_engines(monkeypatch, tmp_path, capsys):
    """Each way's prompts, and cells that are not measured twice."""
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", DEMONSTRATIONS)
    write_jsonl(tmp_path / "test.jsonl", DEMONSTRATIONS)
    monkeypatch.setattr(bench_engines, "TASK", tmp_path)
    monkeypatch.setattr(bench_engines, "Engine", PretendEngine)
    out = tmp_path / "bench_engines"
    words = ["--python", "python", "--model", str(tmp_path / "model"), "--lengths", "40", "--at-once", "1", "2"]
    words += ["--least", "3", "--rounds", "2", "--new-tokens", "4", "--out", str(out)]
    bench_engines.main(words)
    record, markdown = read(out)
    assert len(record["cells"]) == 8 and markdown.count("| 40 |") == 8 and "| 40 | 2 | connector |" in markdown
    assert record["cells"]["connector | 40 | 2"]["requests"] == 4
    assert set(PretendEngine.asked) == {("base", 40 + bench_engines.ROW), ("base:40", bench_engines.ROW)}
    PretendEngine.asked.clear()
    bench_engines.main(words)
    assert PretendEngine.asked == [] and read(out)[0] == record
    bench_engines.main([*words, "--own-server", "serve {model} {store} {port}"])
    assert len(read(out)[0]["cells"]) == 10
    with pytest.raises(SystemExit, match="holds cells of other settings"):
        bench_engines.main([*words, "--dtype", "float32"])
