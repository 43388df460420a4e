"""Sweeps on a tiny model: what is computed, what is kept, what is refused; two processes give what one gives."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.suites import get_suite
from ctkernels.tuning.data.suites.base import Task, View
from ctkernels.tuning.evaluation.evaluate import EvalResult
from ctkernels.tuning.evaluation.sweep import run
from ctkernels.tuning.evaluation.sweep.cells import Cell, SweepError, read_cell
from ctkernels.tuning.evaluation.sweep.report import make_report
from ctkernels.tuning.evaluation.sweep.run import Sweep, run_sweep, vote
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers

ROOT = Path(__file__).parents[3]
TOKENIZER = char_tokenizer()
SPECS = ("icl", "ct-kv:epochs=2:lr=0.05", "prefix-tuning:epochs=2:prompt_tokens=3:lr=0.05")
TIMES = ("seconds", "seconds_eval", "cpu_seconds")


class Quiet:
    """An observer that counts, and that may stop the sweep."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.computed: list[str] = []
        self.stop_after = stop_after

    def started(self, cell: Cell) -> None:
        if len(self.computed) == self.stop_after:
            raise KeyboardInterrupt

    def finished(self, cell: Cell, result) -> None:
        self.computed.append(str(cell))

    def refresh(self) -> None:
        pass


@pytest.fixture(scope="module")
def model():
    return make_model("llama", torch.float32)


@pytest.fixture
def folder(tmp_path):
    """Two tasks with two seeds in the MetaICL layout."""
    options = ("warm", "cold", "ok")
    tests = {"warmth": DEMONSTRATIONS[::-1], "taste": [Demonstration("tea", "ok", options), DEMONSTRATIONS[0]]}
    for name, test in tests.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for seed, train in ((13, DEMONSTRATIONS[:4]), (21, DEMONSTRATIONS[1:])):
            for split, items in (("train", train), ("dev", DEMONSTRATIONS[:1]), ("test", test)):
                write_jsonl(tmp_path / "data" / name / f"{name}_16_{seed}_{split}.jsonl", items)
    return tmp_path / "data"


def sweep_of(folder, out, specs=SPECS, **others) -> Sweep:
    suite = get_suite("nlp_lr")
    asked = {"tasks": ["taste", "warmth"], "seeds": [13, 21], **others}
    return Sweep(suite=suite, folder=folder, specs=[MethodSpec.parse(s) for s in specs], out=out, **asked)


def without_times(results) -> list[dict]:
    return [{name: value for name, value in asdict(r).items() if name not in TIMES} for r in results]


def test_all_cells_are_run_and_reported(model, folder, tmp_path):
    sweep = sweep_of(folder, tmp_path / "out")
    results = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert [(r.seed, r.task, r.method) for r in results] == [
        (seed, task, spec) for seed in (13, 21) for task in ("taste", "warmth") for spec in SPECS
    ]
    assert [(r.error, r.metric) for r in results] == [(None, "macro_f1")] * len(results)
    assert {r.task: r.items for r in results} == {"taste": 2, "warmth": 5}
    assert [len(r.losses) for r in results[:3]] == [r.steps for r in results[:3]] == [0, 2, 2]
    assert results[0].labels == [d.output for d in DEMONSTRATIONS[:4]] and results[-1].labels != results[0].labels
    assert results[1].run["seed"] == 13 and results[7].run["seed"] == 21
    assert results[1].gold_loss != results[7].gold_loss  # other demonstrations
    # the score of a cell is that of the method and its settings, run by hand
    settings = MethodSpec.parse(SPECS[1]).settings(seed=21)
    by_hand = run.tune(model, TOKENIZER, DEMONSTRATIONS[1:], "ct-kv", settings).adapter
    assert by_hand.evaluate(model, TOKENIZER, DEMONSTRATIONS[::-1]).gold_loss == results[10].gold_loss


def test_tasks_may_have_methods_of_their_own(model, folder, tmp_path):
    longer = [MethodSpec.parse(word) for word in ("icl", "ct-kv:steps=2:lr=0.05")]
    specs = {"taste": longer[:1], "warmth": longer}
    sweep = replace(sweep_of(folder, tmp_path / "out", seeds=[13]), specs=specs)
    results = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert [(r.task, r.method, r.steps) for r in results] == [
        ("taste", "icl", 0),
        ("warmth", "icl", 0),
        ("warmth", "ct-kv:steps=2:lr=0.05", 2),
    ]


def test_limit_and_split_choose_the_items(model, folder, tmp_path):
    sweep = sweep_of(folder, tmp_path / "a", ["icl"], limit=3, tasks=["warmth"], seeds=[13])
    (limited,) = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert limited.items == len(limited.predictions) == 3
    sweep = sweep_of(folder, tmp_path / "b", ["icl"], split="validation", tasks=["warmth"], seeds=[13])
    (validated,) = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert validated.items == 1


def test_an_interrupted_sweep_continues_and_computes_no_finished_cell_again(model, folder, tmp_path):
    whole = run_sweep(model, TOKENIZER, sweep_of(folder, tmp_path / "whole"), Workers(), Quiet())
    sweep, first, second = sweep_of(folder, tmp_path / "out"), Quiet(stop_after=5), Quiet()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(model, TOKENIZER, sweep, Workers(), first)
    resumed = run_sweep(model, TOKENIZER, sweep, Workers(), second)
    assert first.computed + second.computed == [str(cell) for cell in sweep.cells()]
    assert len(first.computed) == 5
    assert without_times(resumed) == without_times(whole)
    third = Quiet()
    assert run_sweep(model, TOKENIZER, sweep, Workers(), third) == resumed and third.computed == []


def command(files, folder, out, *more) -> list[str]:
    names = ["--suite", "nlp_lr", "--data-dir", str(folder), "--methods", ",".join(SPECS[:2]), "--seeds", "13,21"]
    return ["eval", "--model", str(files), *names, "--out", str(out), "--threads", "1", *more]


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The model and its tokenizer on disk."""
    path = tmp_path_factory.mktemp("sweep") / "model"
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def comparable(out: Path) -> dict:
    """The report without its times."""
    report = json.loads((out / "report.json").read_text())
    for summary in report["summaries"]:
        del summary["seconds"], summary["cpu_seconds"]
    return report


KILLED = """
import os, signal, sys
from ctkernels.cli.main import main
from ctkernels.tuning.evaluation.sweep import run
tune, calls = run.tune, []
def killed(*args, **kwargs):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return tune(*args, **kwargs)
run.tune = killed
main(sys.argv[1:])
"""


def test_a_killed_sweep_gives_the_same_report_when_it_is_run_again(files, folder, tmp_path, capsys):
    assert cli.run(command(files, folder, tmp_path / "whole")) == 0
    argv = [sys.executable, "-c", KILLED, *command(files, folder, tmp_path / "out")]
    killed = subprocess.run(argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = list((tmp_path / "out" / "cells").glob("*/*/*.json"))
    assert len(finished) == 3
    leftover = finished[0].with_name(".13.json.0123456789abcdef.tmp")  # as if it had been killed while it wrote
    leftover.write_text("{")
    capsys.readouterr()
    assert cli.run(command(files, folder, tmp_path / "out")) == 0
    assert "3 of 8 cells are there already" in capsys.readouterr().err
    assert not leftover.exists()
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")


def test_two_processes_give_what_one_gives(files, folder, tmp_path, capsys):
    assert cli.run(command(files, folder, tmp_path / "one")) == 0
    printed = capsys.readouterr().out
    assert "| ct-kv:epochs=2:lr=0.05 |" in printed and "## Paired differences" in printed
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    argv = [*torchrun, "ctkernels.cli", *command(files, folder, tmp_path / "two")]
    both = subprocess.run(
        argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert both.returncode == 0, both.stderr
    assert comparable(tmp_path / "two") == comparable(tmp_path / "one")
    lines = [line for line in both.stderr.splitlines() if "gold loss" in line]
    assert len(lines) == len(set(lines)) == 8  # every cell once, by one of the two
    assert both.stdout.count("## Paired differences") == 1
    for name in ("report.md", "config.yaml", "score_against_seconds.png"):
        assert (tmp_path / "two" / name).stat().st_size > 100
    # the settings that were written run the same sweep
    assert cli.run(["eval", "--config", f"{tmp_path}/two/config.yaml", "--out", f"{tmp_path}/two"]) == 0


def test_bad_tasks_are_named_and_lose_nothing(files, folder, tmp_path, capsys):
    taste = folder / "taste"
    broken = taste / "taste_16_21_test.jsonl"
    good = broken.read_text()
    broken.write_text(good + '{"input": "tea"}\n')
    (taste / "taste_16_13_dev.jsonl").unlink()
    long = [replace(d, input=d.input * 40) for d in DEMONSTRATIONS]
    (folder / "long").mkdir()
    for split in ("train", "dev", "test"):
        write_jsonl(folder / "long" / f"long_16_13_{split}.jsonl", long)
        write_jsonl(folder / "long" / f"long_16_21_{split}.jsonl", long)
    assert cli.run(command(files, folder, tmp_path / "out")) == 1
    captured = capsys.readouterr()
    assert "ctkernels: error: 8 of 12 cells have no result; the others are kept" in captured.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tasks"] == ["warmth"] and report["left_out"] == ["long", "taste"]
    assert [s["finished"] for s in report["summaries"]] == [2, 2] and report["planned"] == 6
    failures = "\n".join(report["failures"])
    assert "taste_16_21_test.jsonl:3: the field 'output' is missing" in failures
    assert "has no file taste_16_13_dev.jsonl" in failures
    assert (
        "icl on long, seed 13: DataError: the demonstrations have" in failures
        and "the model's context of 128" in failures
    )
    assert failures in captured.out.replace("- ", "")

    broken.write_text(good)
    assert cli.run(command(files, folder, tmp_path / "out", "--tasks", "taste,warmth")) == 1
    captured = capsys.readouterr()
    assert captured.err.count("gold loss") == 2  # taste with seed 21 alone
    assert "Left out, since a method lacks a result: taste." in captured.out


def test_finished_cells_of_another_sweep_are_refused(model, folder, tmp_path):
    sweep = sweep_of(folder, tmp_path / "out", ["icl"])
    run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    files = sorted((tmp_path / "out").glob("cells/*/*/*.json"))
    before = [path.read_bytes() for path in files]
    with pytest.raises(SweepError, match=r"taste/icl/13\.json belongs to another sweep: data was '\w+' and is now"):
        run_sweep(model, TOKENIZER, replace(sweep, limit=1), Workers(), Quiet())
    other = make_model("gpt2", torch.float32)
    with pytest.raises(SweepError, match=r"model was .* choose another --out, or remove the file"):
        run_sweep(other, TOKENIZER, sweep, Workers(), Quiet())
    accepted = []
    with pytest.raises(SweepError, match="model was"):
        run_sweep(other, TOKENIZER, sweep, Workers(), Quiet(), lambda: accepted.append(1))
    assert [path.read_bytes() for path in files] == before and not accepted
    whole = json.loads(before[1])
    files[1].write_text(json.dumps(whole | {"score": whole["score"] + 0.25}))
    with pytest.raises(SweepError, match=r"taste/icl/21\.json is not the result of a cell \(.* another checksum\)"):
        run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    files[1].write_text(json.dumps({name: value for name, value in whole.items() if name != "checksum"}, indent=4))
    run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())  # cells of earlier versions have none
    files[1].write_text("{}")
    with pytest.raises(SweepError, match=r"taste/icl/21\.json is not the result of a cell .* remove it"):
        run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    files[1].unlink()
    for make in (Path.mkdir, os.mkfifo, lambda path: path.write_text("[" * 100_000)):
        make(files[1])
        with pytest.raises(
            SweepError, match=r"icl/21\.json (cannot be read: Is a directory|is not the result of a cell)"
        ):
            run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
        files[1].rmdir() if files[1].is_dir() else files[1].unlink()
    # other settings of a method are another method, so that both may lie in one folder
    assert Cell("t", MethodSpec.parse("icl:seed=3"), 1).path(tmp_path) != Cell("t", MethodSpec("icl"), 1).path(tmp_path)


def test_finished_cells_of_methods_that_train_nothing_do_not_depend_on_training(model, folder, tmp_path):
    sweep = sweep_of(folder, tmp_path / "out", ["icl", "deep-thinking:rounds=1"], tasks=["taste"], seeds=[13])
    results = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert [set(r.run) & {"seed", "eta", "epochs"} for r in results] == [{"seed"}, {"seed", "eta"}]
    old = replace(results[0], run=results[0].run | {"epochs": 25, "pull": 0.5})  # as earlier versions wrote it
    old.write(sweep.cells()[0].path(sweep.out))
    again = Quiet()
    run_sweep(model, TOKENIZER, replace(sweep, common={"epochs": 9}), Workers(), again)
    assert again.computed == []
    with pytest.raises(SweepError, match=r"icl/13\.json belongs to another sweep: seed was 14 and is now 13"):
        replace(old, run=old.run | {"seed": 14}).write(sweep.cells()[0].path(sweep.out))
        run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())


def test_finished_cells_keep_their_results_when_a_setting_gets_another_name(model, folder, tmp_path):
    sweep = sweep_of(folder, tmp_path / "out", ["ct-kv:epochs=1"], tasks=["taste"], seeds=[13])
    (result,) = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    run_of_it = {name: value for name, value in result.run.items() if name not in ("pooled_tokens", "mlp_width")}
    path = sweep.cells()[0].path(sweep.out)
    replace(result, run=run_of_it | {"pool": 4, "hidden": None}).write(path)  # as earlier versions wrote it
    again = Quiet()
    run_sweep(model, TOKENIZER, sweep, Workers(), again)
    assert again.computed == []
    replace(result, run=run_of_it | {"pool": 5, "hidden": None}).write(path)
    with pytest.raises(SweepError, match="pooled_tokens was 5 and is now 4"):
        run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())


def test_calibrated_sweeps_and_cells_of_an_earlier_version(model, folder, tmp_path):
    """Old cells are read where nothing is calibrated, and refused by the name of what differs elsewhere."""
    specs = ["icl", "ct-kv:epochs=1:objective=options"]
    plain = sweep_of(folder, tmp_path / "out", specs, tasks=["warmth"], seeds=[13])
    results = run_sweep(model, TOKENIZER, plain, Workers(), Quiet())
    assert all(r.calibrated is None and r.nll > 0 and r.majority["option"] == "warm" for r in results)
    assert [r.run["score"] for r in results] == ["mean", "mean"] and results[1].run["objective"] == "options"
    path = plain.cells()[0].path(plain.out)
    cell = json.loads(path.read_text())
    for name in ("nll", "ece", "calibrated", "majority", "checksum"):
        del cell[name]
    for name in ("score", "calibrate"):
        del cell["run"][name]
    path.write_text(json.dumps(cell))
    again = Quiet()
    old = run_sweep(model, TOKENIZER, plain, Workers(), again)[0]
    assert again.computed == [] and old.nll is None and old.score == results[0].score
    report = make_report("x", [old, results[1]], planned=1)
    assert report.summaries[0].nll is None and report.summaries[1].nll == results[1].nll
    with pytest.raises(
        SweepError, match=r"icl/13\.json belongs to another sweep: calibrate was 'none' and is now 'batch'"
    ):
        run_sweep(model, TOKENIZER, replace(plain, calibrate="batch"), Workers(), Quiet())
    with pytest.raises(SweepError, match="score was 'mean' and is now 'sum'"):
        run_sweep(model, TOKENIZER, replace(plain, common={"score": "sum"}), Workers(), Quiet())


@pytest.mark.parametrize("calibrate", ["batch", "dev", "content-free"])
def test_cells_have_what_the_evaluation_finds(model, folder, tmp_path, calibrate):
    write_jsonl(
        folder / "taste/taste_16_13_test.jsonl", [DEMONSTRATIONS[0], Demonstration("tea", "hot", ("hot", "mild"))]
    )
    sweep = sweep_of(folder, tmp_path / "out", ["icl"], seeds=[13], calibrate=calibrate)
    taste, warmth = run_sweep(model, TOKENIZER, sweep, Workers(), Quiet())
    assert taste.error is None and taste.calibrated is None and taste.run["calibrate"] == "none"
    adapter = run.tune(model, TOKENIZER, DEMONSTRATIONS[:4], "icl").adapter
    expected = adapter.evaluate(
        model, TOKENIZER, DEMONSTRATIONS[::-1], calibrate=calibrate, validation=DEMONSTRATIONS[:1]
    )
    assert warmth.calibrated == asdict(expected.calibrated)
    report = make_report("x", [taste, warmth], planned=2)
    assert (report.calibrate, report.uncalibrated) == (calibrate, ["taste"])


def test_a_model_that_no_cell_could_use_is_refused_beforehand(folder, tmp_path):
    other = GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=50, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(TypeError, match="model class GPTBigCodeForCausalLM is not supported"):
        run_sweep(other, TOKENIZER, sweep_of(folder, tmp_path / "out"), Workers(), Quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("3 GiB"), RuntimeError("DefaultCPUAllocator"), ModuleNotFoundError("no peft")]
)
def test_an_error_fails_the_cell_alone(model, folder, tmp_path, monkeypatch, error):
    tune = run.tune

    def full(model, tokenizer, train, name, *args):
        if name == "ct-kv":
            raise error
        return tune(model, tokenizer, train, name, *args)

    monkeypatch.setattr(run, "tune", full)
    results = run_sweep(model, TOKENIZER, sweep_of(folder, tmp_path / "out"), Workers(), Quiet())
    expected = f"{type(error).__name__}: {error}"
    assert {r.method: r.error for r in results} == {SPECS[0]: None, SPECS[1]: expected, SPECS[2]: None}
    report = make_report("x", results, planned=4)
    assert [s.method for s in report.summaries] == [SPECS[0], SPECS[2]]  # compared on all tasks nevertheless
    assert report.tasks == ["taste", "warmth"]
    saved = read_cell(tmp_path / "out" / "cells" / "taste" / SPECS[1].replace(":", "@") / "13.json")
    assert saved is not None and saved.run["lr"] == 0.05


def test_votes():
    assert vote([["a", "b", "c"], ["b", "c", "b"], ["b", "a", None]]) == ["b", "b", "c"]
    assert vote([[None], [None]]) == [""]
    assert vote([["a"], [None], ["b"], ["b"]]) == ["b"]


@pytest.mark.parametrize(("undo", "second"), [(None, "zz"), ({"no": "no", "zz": None}.get, "cd")])
def test_views_are_tuned_turned_back_and_counted(monkeypatch, tmp_path, undo, second):
    """Three views, the second in capitals, the third unreadable at its second item."""
    pairs = [Demonstration("x", "ab"), Demonstration("y", "cd")]
    capitals = tuple(replace(d, output=d.output.upper()) for d in pairs)
    views = (
        View(capitals, (), capitals, str.lower),
        View(tuple(pairs), (), tuple(pairs), lambda text: None if text == "??" else text),
    )
    task = Task("t", tuple(pairs), (), tuple(pairs), by="generation", views=views, undo=undo)
    answers = [["no", "zz"], ["AB", "CD"], ["ab", "??"]]
    seen = []

    def fake_tune(model, tokenizer, train, name, settings, text_format):
        predictions = answers[len(seen)]
        seen.append((train, settings.learn_stop))
        scores = EvalResult("exact_match", 0.0, 0.0, 1.5 + len(seen), 2, predictions)
        return SimpleNamespace(adapter=SimpleNamespace(evaluate=lambda *args, **kwargs: scores), history=[])

    monkeypatch.setattr(run, "tune", fake_tune)
    monkeypatch.setattr(Sweep, "load", lambda self, name, seed: task)
    sweep = sweep_of(None, tmp_path, ["ct-kv"])
    result = run.run_cell(None, None, sweep, sweep.cells()[0], {})
    assert [train for train, _ in seen] == [tuple(pairs), capitals, tuple(pairs)]
    assert all(learn_stop for _, learn_stop in seen)  # answers are generated
    # two votes to one, once turned back; one to one, and the first view wins if it can be read
    assert result.predictions == ["ab", second]
    assert (result.score, result.gold_loss, result.run["views"]) == (0.5 if second == "zz" else 1.0, 2.5, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "nlplr"], "suite must be one of nlp_lr, bbh, mmlu, arc, generation, jsonl, got 'nlplr'; did you"),
        (["--methods", "icl,ctkv"], "did you mean 'ct-kv'?"),
        (["--methods", "ct-kv:lrr=1"], "ct-kv:lrr=1: there is no setting 'lrr'"),
        (["--methods", ","], "give methods, such as icl,prefix-tuning,ct-kv"),
        (["--seeds", "13,x"], "seeds must be whole numbers, such as 13,21, got 'x'"),
        (["--seeds", ","], "seeds must name at least one seed"),
        (["--tasks", "warm"], "the suite nlp_lr has no task warm; it has taste, warmth"),
        (["--data-dir", "/no/such"], "data_dir must be a folder, got /no/such"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--shots", "0"], "shots must be at least 1, got 0"),
        (["--views", "2"], "views are for grids, the suite arc; got 2 with nlp_lr"),
        (["--split", "train"], "invalid choice 'train' for argument '--split'"),
        (["--preset", "mmlu2"], "preset must be one of nlp-lr"),
        (["--epochs", "-1"], "epochs must be at least 0, got -1"),
        (["--calibrate", "dev", "--split", "validation"], "calibrate=dev fits offsets to the validation items, and"),
        (["--score", "max"], "invalid choice 'max' for argument '--score'"),
        (["--lr", "1"], "unknown option --lr"),
    ],
)
def test_wrong_usage_is_refused_before_the_model_is_loaded(folder, tmp_path, capsys, more, message):
    assert cli.run(command("/no/such/model", folder, tmp_path / "out", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ctkernels: error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_the_suite_may_come_from_the_configuration_file(tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text("suite: nlp_lr\n")
    assert cli.run(["eval", "--config", f"{tmp_path}/sweep.yaml"]) == 2
    assert "out is required: the folder of the results" in capsys.readouterr().err
    (tmp_path / "one.yaml").write_text("limit: 3\n")
    assert cli.run(["eval", "--config", f"{tmp_path}/one.yaml"]) == 2
    assert "give methods (such as zero-shot icl ct-kv) or prefix" in capsys.readouterr().err
