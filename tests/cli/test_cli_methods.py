"""`ctkernels tune` and `ctkernels eval` with every method."""

import json

import pytest

from ctkernels import cli
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.data.suites import SUITES
from ctkernels.tuning.methods import METHODS, PRESETS
from ctkernels.tuning.methods.settings import SETTINGS
from ctkernels.tuning.train.options import either
from tests.cli.test_cli import complaint, eval_arguments, tune_arguments


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_the_command_line(files, tmp_path, capsys, method):
    small = {"epochs": "2", "lora_rank": "2", "ttt_epochs": "1", "prompt_tokens": "4", "rounds": "1"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in small.items() if name in METHODS[method].reads]
    assert cli.run(tune_arguments(files, tmp_path / "run", "--method", method, *flags)) == 0
    saved = capsys.readouterr().out
    assert ("LoRA" in saved) == method.startswith("ttt") and ("loss" in saved) == (METHODS[method].trains != "nothing")
    out = tmp_path / "scores.json"
    words = ["--methods", method, *flags, "--prefix", f"{tmp_path}/run/prefix", "--out", str(out)]
    assert cli.run(eval_arguments(files, *words)) == 0
    fresh, loaded = json.loads(out.read_text())["results"]
    assert fresh["gold_loss"] == pytest.approx(loaded["gold_loss"], rel=1e-5)


def test_transfer_and_presets_from_the_command_line(files, tmp_path):
    assert cli.run(tune_arguments(files, tmp_path / "a", "--epochs", "2", "--preset", "arc")) == 0
    first = json.loads((tmp_path / "a" / "history.json").read_text())
    assert first[0]["lr"] == 3e-3 and len(first) == 2
    few = write_jsonl(tmp_path / "few.jsonl", DEMONSTRATIONS[:2])
    start = ["--start-from", f"{tmp_path}/a/prefix", "--epochs", "1", "--train", str(few)]
    assert cli.run(tune_arguments(files, tmp_path / "b", *start)) == 0
    lengths = [KVPrefix.from_pretrained(tmp_path / name / "prefix").length for name in "ab"]
    assert lengths[1] == lengths[0] + len(encode_context(char_tokenizer(), DEMONSTRATIONS[:2]).input_ids)


def test_length_and_text_from_the_command_line(files, tmp_path, capsys):
    text = ["--instruction", "say", "--template", "{input} = {output}"]
    assert cli.run(tune_arguments(files, tmp_path / "a", "--steps", "3", "--batch-rows", "2", *text)) == 0
    history = json.loads((tmp_path / "a" / "history.json").read_text())
    assert sum(record["steps"] for record in history) == 3
    saved = KVPrefix.from_pretrained(tmp_path / "a" / "prefix")
    assert saved.metadata.settings["text_format"]["template"] == "{input} = {output}"
    assert saved.segments[0] == len("say")
    few = write_jsonl(tmp_path / "few.jsonl", DEMONSTRATIONS[:1])
    untrained = ["--start-from", f"{tmp_path}/a/prefix", "--epochs", "0", "--train", str(few)]
    untrained += ["--leave-one-out", "none"]
    assert cli.run(tune_arguments(files, tmp_path / "b", *untrained)) == 0
    assert json.loads((tmp_path / "b" / "history.json").read_text()) == []
    capsys.readouterr()
    assert "epochs and steps exclude each other" in complaint(
        capsys, tune_arguments(files, tmp_path / "c", "--steps", "3", "--epochs", "2")
    )
    assert "template must hold {input} once and end with {output}" in complaint(
        capsys, tune_arguments(files, tmp_path / "d", "--template", "{output}")
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "ttt", "--drop-p", "0.1"], "ttt does not read 'drop_p'; it reads"),
        (["--method", "ctkv"], "method must be one of zero-shot, icl, icl-words,"),
        (["--preset", "nlp"], "preset must be one of nlp-lr, mmlu, bbh, arc, got 'nlp'"),
        (["--start", "vocabulary"], "start of ct-kv must be one of context, separate, permuted, pooled, labels"),
        (["--start-from", "nowhere"], "nowhere: no such file or folder"),
        (["--top-layers", "9"], "top_layers must be at most the model's 3 layers, got 9"),
        (["--method", "ttt", "--lora-targets", "c_attn"], "LlamaForCausalLM has no module named c_attn"),
    ],
)
def test_method_errors_are_one_line(files, tmp_path, capsys, flags, message):
    assert message in complaint(capsys, tune_arguments(files, tmp_path / "run", *flags))


def test_a_setting_that_no_evaluated_method_reads_is_refused(files, capsys):
    arguments = [
        "eval",
        "--model",
        f"{files}/model",
        "--train",
        f"{files}/train.jsonl",
        "--test",
        f"{files}/test.jsonl",
    ]
    line = complaint(capsys, [*arguments, "--methods", "icl", "ttt", "--drop-p", "0.2"])
    assert "none of icl, ttt reads drop_p" in line
    assert cli.run([*arguments, "--methods", "icl", "ct-kv", "--drop-p", "0.2", "--epochs", "1"]) == 0


def test_help_lists_every_method_and_setting(capsys):
    with pytest.raises(SystemExit):
        cli.run(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f" {name}" in text for name in METHODS)
    assert all(f"--{name.replace('_', '-')} " in text for name in SETTINGS)
    assert f"The paper's settings for {either(tuple(PRESETS))};" in text
    assert "Token dropout: probability in [0, 1)" in text and "Rank of the LoRA update" in text
    with pytest.raises(SystemExit):
        cli.run(["eval", "--suite", "any", "--help"])
    assert f"Tasks to evaluate: {either(tuple(SUITES))}." in " ".join(capsys.readouterr().out.replace("│", " ").split())
