"""The reproduction: its pool, rule, lengths and tables, and all of it on a tiny model, stopped and continued."""

import csv
import json
import string
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce import lengths, plan, pool, report, screen, shots, stages
from benchmarks.reproduce.lengths import Timing
from benchmarks.reproduce.plan import Plan
from benchmarks.reproduce.screen import Screened
from benchmarks.reproduce.shots import Point
from ctkernels.testing.models import make_model
from ctkernels.tuning.data.demonstrations import DataError, Demonstration, load_jsonl
from ctkernels.tuning.evaluation.sweep import run
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec

TINY = Plan(
    shots=3,
    screen_shots=4,
    limit=4,
    margin=-1.0,
    budget=1e-9,
    least_steps=1,
    shot_counts=(2, 4, 1000),
    shot_seeds=1,
    shot_tasks=1,
    shot_epochs=(("ct-kv", 1), ("ct-prompt", 1), ("ttt", 1)),
)


def tokenizer_of_characters():
    """One token for each printable character, the end of the line too."""
    tokenizer = Tokenizer(models.WordLevel({c: n for n, c in enumerate(string.printable)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1")


@pytest.fixture
def data(tmp_path):
    """A task of each suite, in the suites' own layouts."""
    folder = tmp_path / "data"
    pairs = [(f"is {n} even", "yes" if n % 2 == 0 else "no") for n in range(40)]
    (folder / "nlp_lr" / "even").mkdir(parents=True)
    for seed, part in ((13, pairs[:30]), (21, pairs[10:])):
        for split, some in (("train", part[:8]), ("dev", part[8:16]), ("test", part[16:])):
            lines = [json.dumps({"input": x, "output": y, "options": ["yes", "no"]}) + "\n" for x, y in some]
            (folder / "nlp_lr" / "even" / f"even_16_{seed}_{split}.jsonl").write_text("".join(lines))
    (folder / "bbh").mkdir()
    choices = [
        {"input": f"pick {n}\nOptions:\n(A) a\n(B) b", "target": "(AB)"[n % 2 + 1].join("()")} for n in range(30)
    ]
    (folder / "bbh" / "letters.json").write_text(json.dumps({"examples": choices}))
    (folder / "bbh" / "sums.json").write_text(
        json.dumps({"examples": [{"input": f"{n} + 1", "target": str(n + 1)} for n in range(30)]})
    )
    (folder / "mmlu" / "test").mkdir(parents=True)
    with (folder / "mmlu" / "test" / "maths_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([f"{n} mod 4", "0", "1", "2", "3", n % 4] for n in range(30))
    return folder


def items_of(folder):
    return [load_jsonl(folder / f"{split}.jsonl") for split in pool.SPLITS]


def test_the_pool_has_every_item_once(data, tmp_path):
    names = pool.make_pool(data, reproduce.ROOT / "examples" / "tasks", tmp_path / "tasks")
    # sums has no options; letters are answered without brackets
    assert names == ["nlp_lr.even", "bbh.letters", "mmlu.maths", "jsonl.support-routing"]
    for name, count in zip(names, (40, 30, 30, 132), strict=True):
        train, validation, test = items_of(tmp_path / "tasks" / name)
        inputs = [item.input for part in (train, validation, test) for item in part]
        assert len(inputs) == len(set(inputs)) == count
        assert (len(validation), len(test)) == (int(0.2 * count), int(0.45 * count))
    train, *_ = items_of(tmp_path / "tasks" / "bbh.letters")
    assert {item.output for item in train} == {"A", "B"} and train[0].options == ("A", "B")
    before = {path: path.read_bytes() for path in (tmp_path / "tasks").rglob("*.jsonl")}
    pool.make_pool(data, reproduce.ROOT / "examples" / "tasks", tmp_path / "tasks")
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(DataError, match=r"nlp_lr, bbh and mmlu, got .* without nlp_lr"):
        pool.make_pool(tmp_path / "tasks", data, tmp_path / "other")


def test_splits_are_disjoint_and_bounded():
    items = [Demonstration(f"x{n}", "a", ("a", "b")) for n in range(1000)]
    train, validation, test = pool.split_items(items)
    assert (len(validation), len(test)) == (64, 200)
    assert sorted(item.input for item in (*train, *validation, *test)) == sorted(item.input for item in items)
    assert [item.input for item in train] != sorted((item.input for item in train), key=lambda x: int(x[1:]))
    twice = [Demonstration("a  b", "a", ("a", "b")), Demonstration("a b ", "b", ("a", "b")), Demonstration("c", "d")]
    assert pool.distinct(twice) == twice[:1]


def test_tasks_are_taken_by_name_and_the_shipped_one_always():
    passed = [Screened(f"nlp_lr.{n:02}", 10, 0.9, 0.5, True, "") for n in range(10)]
    failed = Screened("mmlu.x", 10, 0.5, 0.5, False, "below the margin")
    shipped = Screened("jsonl.routing", 10, 0.2, 0.25, False, "below the margin")
    found = screen.limited([*passed, failed, shipped])
    assert [one.taken for one in found] == [True] * 8 + [False] * 3 + [True]
    assert "8 of the suite come before it" in found[9].reason
    assert screen.unfit(Plan(), 15, 10) and screen.unfit(Plan(), 16, 1001) and not screen.unfit(Plan(), 16, 1000)


def test_what_a_budget_buys():
    assert Timing(2, 0.5).steps(20, 2, Plan()) == 36  # 2 + 36 * 0.5 = 20
    assert Timing(2, 9).steps(20, 2, Plan()) == 4  # at least 4, although they take 38 s
    assert Timing(0, 0.01).steps(20, 2, Plan()) == 120  # 60 epochs of two steps
    found = {("t", name, "options"): Timing(1, 0.5) for name in ("ttt", "ct-kv")}
    both = lengths.with_length("ttt+ct-kv:ttt_lr=1e-3:objective=options", "t", found, Plan())
    assert (both.settings().ttt_steps, both.settings().steps) == (18, 18)  # ten seconds each
    half = lengths.with_length("ct-kv:objective=options", "t", found, Plan(), 10)
    assert half.settings().steps == 18


def test_every_method_gets_the_same_number_of_candidates():
    assert {len(Plan.candidates(method)) for method in plan.RATES} == {8}
    for method in plan.RATES:
        objectives = [MethodSpec.parse(word).settings().objective for word in Plan.candidates(method)]
        assert objectives == ["answers"] * 4 + ["options"] * 4


def test_wrong_usage_is_refused_before_anything_runs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- reproduce other -->")
    for words, message in (
        (["--seeds", "13", "101"], "choose tasks and settings and are not tested"),
        (["--budget", "0"], "--budget must be above 0, got 0"),
        (["--docs", str(page)], "must hold the markers <!-- reproduce such-shipped -->"),
    ):
        with pytest.raises(SystemExit):
            reproduce.main(["--model", "/no/such", *words])
        assert message in capsys.readouterr().err


def test_the_ablation_has_all_four_masks():
    spec = MethodSpec.parse(f"{Plan.candidates('ct-kv')[0]}:steps=7")
    masks = {label: stages.masked(spec, mask) for label, mask in plan.MASKS.items()}
    assert masks["both"] == spec and str(masks["both"]) == str(spec)
    settings = {label: masked.settings() for label, masked in masks.items()}
    assert {label: (s.leave_one_out, s.drop_p > 0) for label, s in settings.items()} == {
        "both": ("self", True),
        "leave-one-out alone": ("self", False),
        "token dropout alone": ("none", True),
        "neither": ("none", False),
    }
    assert {(s.lr, s.steps) for s in settings.values()} == {(spec.overrides["lr"], 7)}


def cell(method, task, seed, accuracy, calibrated=None, error=None):
    shifted = None if calibrated is None else {"accuracy": calibrated, "nll": 0.5, "ece": 0.1}
    return CellResult(
        task, method, seed, {}, error, "accuracy", accuracy, accuracy, cpu_seconds=2.0, nll=1.0, ece=0.2,
        calibrated=shifted,
    )  # fmt: skip


def test_tables_compare_what_all_methods_finished():
    results = [
        *(cell("ct-kv", task, seed, 0.6, 0.8) for task in "ab" for seed in (1, 2)),
        *(cell("ttt", "a", seed, 0.5, 0.8) for seed in (1, 2)),
        cell("ttt", "b", 1, 0.7, 0.6),
        cell("ttt", "b", 2, 0.0, error="no memory"),
    ]
    assert report.compared(results)[1] == [("a", 1), ("a", 2), ("b", 1)]
    ours, ttt = report.compare(results)
    assert ours.gap is None and ttt.accuracy.mean == pytest.approx(0.6)  # of 0.5 on a and 0.7 on b
    assert ttt.gap.difference.mean == pytest.approx(0.0) and (ttt.gap.wins, ttt.gap.ties, ttt.gap.losses) == (1, 0, 1)
    gap = ttt.calibrated_gap
    assert gap.difference.mean == pytest.approx(0.1) and (gap.wins, gap.ties, gap.losses) == (1, 1, 0)
    assert (ttt.nll, ttt.calibrated_nll, ttt.calibrated_ece) == (1.0, 0.5, 0.1)
    assert report.compare(results[:4] + results[-1:]) == []


def test_exponents_and_where_k_stops():
    quadratic = [Point("t", "ttt", k, 1, 0.5, None, 0.5 * k**2) for k in (2, 4, 8, 16)]
    assert shots.exponent(quadratic) == pytest.approx(2)
    text = shots.markdown([*quadratic, *(Point("t", "ct-kv", k, 1, 0.5, 0.6, 1.0 * k) for k in (2, 4))])
    assert "| 4 | 50, 8.00 s | 50 (60), 4.00 s |" in text and "ttt 2.0, ct-kv 1.0" in text
    assert shots.expected([], "t", "ttt", 2) == 0
    assert shots.expected(quadratic, "t", "ttt", 32) == 4 * 128
    later = [*quadratic, Point("t", "ct-kv", 32, 1, 0.5, None, 1.0)]
    assert shots.expected(later, "t", "ttt", 64) == float("inf")  # it was left out at 32
    assert shots.expected(later, "t", "icl", 64) == 0


@pytest.fixture
def arguments(data, tmp_path, monkeypatch):
    """Of a run on four tiny tasks."""
    make_model("llama", torch.float32, max_position_embeddings=4096, vocab_size=100).save_pretrained(tmp_path / "model")
    tokenizer_of_characters().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(reproduce, "Plan", lambda: TINY)
    monkeypatch.setattr(plan, "RATES", {name: rates[::2] for name, rates in plan.RATES.items()})
    wanted = ["--model", f"{tmp_path}/model", "--data", str(data), "--dtype", "float32", "--budget", "1e-9"]
    return [*wanted, "--out", f"{tmp_path}/out", "--results", f"{tmp_path}/results"]


def numbers(folder) -> dict:
    """What does not depend on the time it took."""
    record = json.loads((folder / "reproduce_model.json").read_text())
    for one in (*record["tried"], *record["lines"], *record["ablation_lines"], *record["test"], *record["ablation"]):
        for name in ("cpu_seconds", "slowest", "seconds", "seconds_eval"):
            one.pop(name, None)
    return {
        name: record[name] for name in ("screened", "chosen", "tried", "test", "lines", "ablation", "ablation_lines")
    }


def test_a_run_that_was_stopped_ends_with_the_same_numbers(arguments, tmp_path, monkeypatch, capsys):
    tune, calls, sweeps = run.tune, [], set()
    run_sweep = plan.run_sweep

    def recorded(model, tokenizer, sweep, *args):
        sweeps.add((sweep.split, tuple(sweep.seeds), sweep.out.name))
        return run_sweep(model, tokenizer, sweep, *args)

    def stopped(*args):
        calls.append(args[3])
        if len(calls) == 60:
            raise KeyboardInterrupt
        return tune(*args)

    monkeypatch.setattr(run, "tune", stopped)
    monkeypatch.setattr(plan, "run_sweep", recorded)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(arguments)
    reproduce.main([*arguments, "--report"])  # what is there, although the test has not begun
    assert len(calls) == 60 and "How the settings were chosen" not in capsys.readouterr().out
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- reproduce model -->\n<!-- /reproduce model -->\n")
    reproduce.main([*arguments, "--docs", str(docs)])
    first = numbers(tmp_path / "results")
    text = (tmp_path / "results" / "reproduce_model.md").read_text()
    assert text in capsys.readouterr().out
    done = len(calls)
    reproduce.main(arguments)
    assert len(calls) == done  # everything was there
    monkeypatch.setattr(run, "tune", tune)
    reproduce.main([*arguments[:-4], "--out", f"{tmp_path}/other"])
    assert numbers(tmp_path / "other" / "model") == first

    methods = ["zero-shot", "icl", *plan.RATES, stages.ANSWERS, stages.HALF]
    assert [line["method"] for line in first["lines"]] == methods
    assert [line["method"] for line in first["ablation_lines"]] == list(plan.MASKS)
    ours = first["lines"][methods.index("ct-kv")]
    assert first["ablation_lines"][0]["accuracy"] == ours["accuracy"]
    for name in plan.RATES:
        tried = [one for one in first["tried"] if one["word"].split(":")[0] == name]
        assert len(tried) == 4
        assert first["chosen"][name] == min(tried, key=lambda one: one["nll"])["word"]
    assert "objective=answers" in first["chosen"][stages.ANSWERS]
    # tasks and settings are chosen on other items and demonstrations than those that are tested
    chose = {(split, seeds) for split, seeds, out in sweeps if out in ("screen", "choose")}
    assert chose == {("validation", (100, 101, 102)), ("validation", (100,))}
    assert {(split, seeds) for split, seeds, out in sweeps if out not in ("screen", "choose")} == {("test", (13,))}
    kept = json.loads((tmp_path / "out" / "model" / "chosen.json").read_text())
    assert set(kept["chosen"]) == {*plan.RATES, stages.ANSWERS} and kept["chosen"]["ct-kv"]["lr"] > 0
    for title in ("## By task", "## How the settings were chosen", "## Which tasks were taken"):
        assert title in text
    assert "token dropout alone" in docs.read_text() and "| 2 |" in docs.read_text()
    for name in ("reproduce_model", "reproduce_model_shots"):
        assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_rule(data, tmp_path):
    """Of a task, from given cells: the calibrated accuracy less the majority class of the validation items."""
    pool.make_pool(data, reproduce.ROOT / "examples" / "tasks", tmp_path / "tasks")
    names = ["mmlu.maths", "nlp_lr.even"]
    setting = plan.Setting(
        None, None, tokenizer_of_characters(), tmp_path / "tasks", tmp_path, replace(TINY, margin=0.05), True
    )
    base = {name: screen.baseline(screen.load_whole(setting, name)) for name in names}
    validation = items_of(tmp_path / "tasks" / "nlp_lr.even")[1]
    evens = sum(item.output == "yes" for item in validation)
    assert base["nlp_lr.even"] == max(evens, 8 - evens) / 8
    for name, above in zip(names, (0.04, 0.06), strict=True):
        sweep = setting.sweep("screen", [name], [MethodSpec("icl")], 4, seeds=plan.DRAWS)
        for one in sweep.cells():
            cell("icl", name, one.seed, 0.0, base[name] + above).write(one.path(sweep.out))
    found = screen.screen(setting, names)
    assert [one.taken for one in found] == [False, True]
    assert found[1].accuracy - found[1].baseline == pytest.approx(0.06)
    own = [Demonstration("x", "a", ("a", "b")), Demonstration("y", "a", ("a", "b", "c", "d"))]
    task = replace(screen.load_whole(setting, names[0]), validation=tuple(own))
    assert screen.baseline(task) == (1 / 2 + 1 / 4) / 2
