"""The reproduction end to end on a tiny model, stopped and continued; its choice of settings and its exponents."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import reproduce, reproduce_scaling
from benchmarks.reproduce_scaling import Point, exponent
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import char_tokenizer
from ctkernels.tuning.evaluation.sweep import run
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec

TINY = replace(
    reproduce.QUICK,
    shots=3,
    limit=4,
    lengths={name: ("ttt_epochs=1:epochs=1" if "+" in name else "epochs=1",) for name in reproduce.QUICK.lengths},
    shot_counts=(2, 4),
)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Of a run on the shipped task."""
    make_model("llama", torch.float32, max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    monkeypatch.setattr(reproduce, "RATES", {name: rates[::2] for name, rates in reproduce.RATES.items()})
    return ["--model", f"{tmp_path}/model", "--out", f"{tmp_path}/out", "--results", f"{tmp_path}/results"]


def numbers(folder) -> dict:
    record = json.loads((folder / "reproduce.json").read_text())
    summaries = record["candidates"] + record["methods"]["summaries"] + record["ablation"]["summaries"]
    for summary in summaries:
        del summary["seconds"], summary["cpu_seconds"]
    return {name: record[name] for name in ("candidates", "methods", "ablation", "tasks")}


def test_a_run_that_was_stopped_ends_with_the_same_numbers(arguments, tmp_path, monkeypatch, capsys):
    tune, calls, sweeps = run.tune, [], []
    run_sweep = reproduce.run_sweep

    def recorded(model, tokenizer, sweep, *args):
        sweeps.append((sweep.split, sweep.seeds, sweep.out.name))
        return run_sweep(model, tokenizer, sweep, *args)

    def stopped(*args):
        calls.append(args[3])
        if len(calls) == 15:
            raise KeyboardInterrupt
        return tune(*args)

    monkeypatch.setattr(run, "tune", stopped)
    monkeypatch.setattr(reproduce, "run_sweep", recorded)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(arguments)
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- reproduce -->\n<!-- /reproduce -->\n")
    reproduce.main([*arguments, "--docs", str(docs)])
    methods = list(TINY.lengths)
    # two candidates each, then the test: all methods and three more variants of ct-kv; only the 15th ran twice
    assert len(calls) == 2 * len(methods) + len(methods) + 2 + 3 + 1
    first = numbers(tmp_path / "results")
    monkeypatch.setattr(run, "tune", tune)
    reproduce.main([*arguments[:2], "--out", f"{tmp_path}/other"])
    assert numbers(tmp_path / "other" / "quick" / "model") == first

    assert [s["method"] for s in first["methods"]["summaries"]] == ["zero-shot", "icl", *methods]
    assert [s["method"] for s in first["ablation"]["summaries"]] == list(reproduce.MASKS)
    assert first["ablation"]["summaries"][0]["score"] == first["methods"]["summaries"][5]["score"]  # both = ct-kv
    for name in methods:
        tried = [c for c in first["candidates"] if c["method"].split(":")[0] == name]
        (chosen,) = [c for c in tried if c["chosen"]]
        assert len(tried) == 2 and chosen["gold_loss"] == min(c["gold_loss"] for c in tried)
    # settings are chosen on other items and demonstrations than those that are tested
    assert set(sweeps) == {("validation", (100,), "tuning"), ("test", (13,), "test")}
    text = (tmp_path / "results" / "reproduce.md").read_text()
    assert text in capsys.readouterr().out
    for title in ("## Methods", "## Ablation of CT-KV", "## Time per epoch", "## How the settings were chosen"):
        assert title in text
    assert docs.read_text().count("| ct-kv |") == 1 and "| token dropout alone |" in docs.read_text()
    for name in ("time", "ablation", "scaling"):
        assert (tmp_path / "results" / f"reproduce_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_gets_the_same_number_of_candidates():
    for plan in (reproduce.QUICK, reproduce.FULL):
        assert len({len(plan.candidates(method)) for method in plan.lengths}) == 1
        assert list(plan.lengths) == list(reproduce.RATES)
    assert reproduce.TUNING_SEED not in reproduce.FULL.seeds


def test_the_tuning_seed_is_not_tested(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--model", "/no/such", "--seeds", "13", "100"])
    assert "the demonstrations of 100 choose the settings and are not tested" in capsys.readouterr().err


def test_the_ablation_has_all_four_masks():
    spec = reproduce.QUICK.candidates("ct-kv")[0]
    masks = {label: reproduce._masked(spec, mask) for label, mask in reproduce.MASKS.items()}
    assert masks["both"] == spec and str(masks["both"]) == str(spec)
    settings = {label: masked.settings() for label, masked in masks.items()}
    assert {label: (s.leave_one_out, s.drop_p > 0) for label, s in settings.items()} == {
        "both": ("self", True),
        "leave-one-out alone": ("self", False),
        "token dropout alone": ("none", True),
        "neither": ("none", False),
    }
    assert {s.lr for s in settings.values()} == {spec.overrides["lr"]}


def test_exponents_and_where_k_stops(monkeypatch, tmp_path):
    quadratic = [Point("ttt", k, 10 * k, 0.5 * k**2) for k in (2, 4, 8, 16)]
    assert exponent(quadratic) == pytest.approx(2)
    assert exponent([Point("ct-kv", 2, 1, 9.0), *(Point("ct-kv", k, 1, 3.0 * k) for k in (8, 16))]) == pytest.approx(1)
    text = reproduce_scaling.markdown([*quadratic, Point("ct-kv", 2, 20, 1.0), Point("ct-kv", 4, 40, 2.0)])
    assert "| 8 | 80 | 32.00 |  |" in text and "ttt 2.0, ct-kv 1.0" in text

    measured = []

    def point(setting, spec, pairs, expected):
        measured.append((len(pairs), expected))
        return Point(spec.name, len(pairs), 0, 1.0 * len(pairs))

    monkeypatch.setattr(reproduce_scaling, "_point", point)
    monkeypatch.setattr(reproduce_scaling, "demonstrations", lambda setting: list(range(100)))
    plan = replace(reproduce.QUICK, shot_counts=(2, 4, 8, 16, 32), most_seconds=20)
    setting = reproduce.Setting(None, None, None, "jsonl", None, ["t"], tmp_path, plan)
    points = reproduce_scaling.measure(setting, {"ttt": MethodSpec("ttt")})
    assert measured == [(2, 0.0), (4, 8.0), (8, 16.0)]  # 16 would be expected to take 32 s
    assert reproduce_scaling.measure(setting, {"ttt": MethodSpec("ttt")}) == points and len(measured) == 3
