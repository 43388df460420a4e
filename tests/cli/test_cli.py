"""The command line: what it writes, and that every user error is one line and a status."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import safetensors.torch
import torch
import yaml

from ctkernels import cli, dispatch
from ctkernels.cli.options import EvalConfig, TrainOptions, TuneConfig
from ctkernels.cli.parse import CommandLine, UsageError, as_yaml
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.methods.settings import TrainSettings


def parse(kind, argv):
    return CommandLine("ctkernels x", argv).parse(kind)


def tune_arguments(files, out, *more):
    return ["tune", "--model", f"{files}/model", "--train", f"{files}/train.jsonl", "--out", str(out), *more]


def eval_arguments(files, *flags):
    data = ["--train", f"{files}/train.jsonl", "--test", f"{files}/test.jsonl"]
    return ["eval", "--model", f"{files}/model", *data, *flags]


BESIDE = ("ctkernels: warning: ", "tuning epoch ")


def complaint(capsys, argv, status=2) -> str:
    """The one line on stderr of a command that fails, but for warnings and progress."""
    capsys.readouterr()
    assert cli.run([str(a) for a in argv]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(BESIDE)]
    assert len(lines) == 1 and lines[0].startswith("ctkernels: error: ")
    return lines[0]


def test_tune_writes_prefix_history_and_configuration(files, tmp_path, capsys):
    assert cli.run(tune_arguments(files, tmp_path / "run", "--epochs", "3", "--lr", "1e-2", "--drop-p", "0.2")) == 0
    prefix = KVPrefix.from_pretrained(tmp_path / "run" / "prefix")
    assert prefix.metadata.settings["drop_p"] == 0.2
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert history[0]["lr"] == 0.01
    assert f"loss {history[0]['loss']:.4f} -> {history[2]['loss']:.4f} in 3 epochs" in capsys.readouterr().out

    again = tmp_path / "again"
    assert cli.run(["tune", "--config", f"{tmp_path}/run/config.yaml", "--out", str(again)]) == 0
    other = KVPrefix.from_pretrained(again / "prefix")
    assert all(torch.equal(a, b) for a, b in zip(prefix.parameters(), other.parameters(), strict=True))


def test_resume(files, tmp_path, capsys):
    arguments = tune_arguments(files, tmp_path / "run", "--epochs", "3")
    assert cli.run(arguments) == 0
    assert "already holds a run (config.yaml, history.json" in complaint(capsys_clear(capsys), arguments)
    (tmp_path / "run" / "history.json").unlink()
    assert cli.run([*arguments, "--resume"]) == 0
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 3
    message = complaint(capsys_clear(capsys), [*arguments, "--resume", "--lr", "0.5"])
    assert "cannot resume from" in message and "lr was 0.003 and is now 0.5" in message
    assert "lr: 0.5" not in (tmp_path / "run" / "config.yaml").read_text()  # what was refused leaves no trace


def capsys_clear(capsys):
    capsys.readouterr()
    return capsys


def test_eval_of_methods_and_saved_prefixes(files, tmp_path, capsys):
    assert cli.run(tune_arguments(files, tmp_path / "run", "--epochs", "2", "--delimiter", "?")) == 0
    capsys.readouterr()
    out = tmp_path / "scores.json"
    common = ["eval", "--model", f"{files}/model", "--train", f"{files}/train.jsonl", "--test", f"{files}/test.jsonl"]
    arguments = [*common, "--epochs", "2", "--delimiter", "?", "--out", str(out)]
    names = ["--methods", "zero-shot", "icl", "ct-kv", "--prefix", f"{tmp_path}/run/prefix"]
    assert cli.run([*arguments, *names]) == 0
    table = capsys.readouterr().out
    results = json.loads(out.read_text())["results"]
    assert [r["name"] for r in results] == ["zero-shot", "icl", "ct-kv", f"{tmp_path}/run/prefix"]
    assert all(r["items"] == len(r["predictions"]) == 5 and r["metric"] == "macro_f1" for r in results)
    assert results[2]["gold_loss"] == results[3]["gold_loss"] != results[1]["gold_loss"]
    assert all(f"{r['gold_loss']:.3f}" in table for r in results)
    # a saved prefix brings its own delimiter
    assert cli.run([*common, "--prefix", f"{tmp_path}/run/prefix", "--out", str(out), "--limit", "5"]) == 0
    assert json.loads(out.read_text())["results"][0]["gold_loss"] == results[3]["gold_loss"]


def test_calibrated_scores_and_offsets_that_are_kept(files, tmp_path, capsys):
    assert cli.run(tune_arguments(files, tmp_path / "run", "--epochs", "1", "--objective", "options")) == 0
    prefix, out = f"{tmp_path}/run", tmp_path / "scores.json"  # the folder of the run
    arguments = ["eval", "--model", f"{files}/model", "--test", f"{files}/test.jsonl", "--out", str(out)]
    dev = ["--calibrate", "dev", "--dev", f"{files}/train.jsonl"]
    found = {}
    for name, more in {
        "none": [],
        "batch": ["--calibrate", "batch"],
        "dev": dev,
        "kept": [*dev, "--keep-offsets"],
    }.items():
        assert cli.run([*arguments, "--prefix", prefix, *more]) == 0
        (found[name],) = json.loads(out.read_text())["results"]
    assert "give either dev (a JSONL file) or metaicl" in complaint(
        capsys_clear(capsys), [*arguments, "--prefix", prefix, *dev[:2]]
    )
    assert found["none"]["calibrated"] is None and found["none"]["majority"]["option"] == "warm"
    assert found["batch"]["calibrated"]["offsets"] != found["dev"]["calibrated"]["offsets"]
    assert found["kept"]["calibrated"] == found["dev"]["calibrated"]
    assert (
        len({json.dumps([r["predictions"], r["nll"], r["gold_loss"]]) for r in found.values()}) == 1
    )  # plain: the same
    capsys.readouterr()
    assert cli.run([*arguments, "--prefix", prefix]) == 0  # what was stored
    assert {path.name for path in (tmp_path / "run").glob("adapter*")} == set()
    (stored,) = json.loads(out.read_text())["results"]
    assert stored["calibrated"] == found["dev"]["calibrated"]
    table = capsys.readouterr().out
    assert f"{stored['nll']:.3f} / {stored['calibrated']['nll']:.3f}" in table and "'warm'" in table
    assert cli.run([*arguments, "--prefix", prefix, "--score", "sum"]) == 0
    (other,) = json.loads(out.read_text())["results"]
    assert other["calibrated"] is None and other["nll"] != stored["nll"] and other["gold_loss"] == stored["gold_loss"]


def test_metaicl_folder(files, tmp_path):
    (tmp_path / "warmth").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "warmth" / f"warmth_5_13_{split}.jsonl", DEMONSTRATIONS)
    task = ["--metaicl", str(tmp_path), "--task", "warmth", "--task-seed", "13", "--shots", "5"]
    out = tmp_path / "scores.json"
    assert cli.run(["eval", "--model", f"{files}/model", *task, "--methods", "icl", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["results"][0]["items"] == 5


def test_env_names_every_backend_and_says_why_not(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "availability", lambda: {"reference": None, "quantum": "no qubits were found"})
    assert cli.run(["env"]) == 0
    text = capsys.readouterr().out
    for expected in ("ctkernels:", torch.__version__, "transformers:", "threads:", "no qubits were found"):
        assert expected in text
    assert "reference:" in text and "available" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tun"], "unknown command 'tun'; the commands are tune, eval, export, serve, import, models, env"),
        (["tune", "--lrr", "1"], "unknown option --lrr; did you mean --lr?"),
        (["tune", "--max-token=3"], "unknown option --max-token; did you mean --max-tokens?"),
        (["tune", "more"], "unexpected argument 'more'"),
        (["tune", "--lr", "fast"], "fast"),
        (["tune", "--layout", "ragged"], "invalid choice 'ragged' for argument '--layout'"),
        (["tune", "--hidden", "8"], "unknown option --hidden; did you mean --mlp-width?"),
        (["tune", "--pool=3"], "unknown option --pool; did you mean --pooled-tokens?"),
        (["export", "--pool=3"], "unknown option --pool"),
        (["tune", "--config"], "--config needs a file"),
        (["tune", "--config", "--lr", "1"], "--config needs a file"),
        (["tune", "--config", "a", "b"], "unexpected argument 'b'"),
        (["tune", "--config", "a", "--config=b"], "--config takes one file, got several"),
        (["env", "--config", "/no/such.yaml"], "env takes no arguments, got '--config'"),
        (["tune", "--config", "/no/such.yaml"], "cannot read /no/such.yaml: No such file"),
        (["tune"], "out is required"),
        (["tune", "--out", "x", "--method", "ctkv"], "did you mean 'ct-kv'?"),
        (["tune", "--out", "x", "--epochs", "-1"], "epochs must be at least 0, got -1"),
        (["tune", "--out", "x"], "give either train (a JSONL file) or metaicl (a folder), and not both"),
        (["tune", "--out", "x", "--metaicl", "."], "metaicl needs task"),
        (["tune", "--out", "x", "--train", "/no/such.jsonl"], "cannot read /no/such.jsonl: No such file"),
        (["eval", "--test", "x"], "give methods (such as zero-shot icl ct-kv) or prefix"),
        (["eval", "--test", "x", "--methods", "icl", "--limit", "-5"], "limit must be at least 1, got -5"),
        (["eval", "--test", "x", "--prefix", "p", "--keep-offsets"], "keep_offsets stores what calibrate finds in"),
        (["env", "--verbose"], "env takes no arguments, got '--verbose'"),
    ],
)
def test_wrong_usage(capsys, argv, message):
    assert message in complaint(capsys, argv)


def test_a_checkpoint_that_is_not_one_of_its_class(capsys, files, tmp_path):
    """Transformers draws weights that are missing at random, and says so in a report alone."""
    shutil.copytree(f"{files}/model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = safetensors.torch.load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    words = ["tune", "--model", tmp_path / "model", "--train", f"{files}/train.jsonl", "--epochs", 1, "--out"]

    def complaint_about(weights: dict[str, torch.Tensor]) -> str:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        return complaint(capsys, [*words, tmp_path / "refused"])

    assert "it has weights that the class does not know (extra.weight); --allow-other-weights" in complaint_about(
        {**whole, "extra.weight": torch.ones(2)}
    )
    assert f"lacks weights, which would be random ({name})" in complaint_about(
        {key: x for key, x in whole.items() if key != name}
    )
    assert cli.run([str(word) for word in (*words, tmp_path / "run", "--allow-other-weights")]) == 0


def test_wrong_model_data_and_prefix(capsys, files, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [DEMONSTRATIONS[0], {"input": "tea", "output": ""}])
    model = ["--model", f"{files}/model"]
    out = ["--out", tmp_path / "run"]
    assert "bad.jsonl:2: output must not be blank" in complaint(capsys, ["tune", *model, *out, "--train", bad])
    one = write_jsonl(tmp_path / "one.jsonl", DEMONSTRATIONS[:1])
    assert "at least two demonstrations" in complaint(capsys, ["tune", *model, *out, "--train", one])
    train = ["--train", f"{files}/train.jsonl"]
    assert "model is required" in complaint(capsys, ["tune", *out, *train])
    assert "cannot load the model" in complaint(capsys, ["tune", "--model", f"{tmp_path}/none", *out, *train])
    for number in ("0", "100000"):
        message = complaint(capsys, ["tune", *model, *out, *train, "--threads", number])
        assert "threads must be at least 1 and at most" in message
    backend = ["--backend", "abacus"]
    assert "backend must be one of auto" in complaint(capsys, ["tune", *model, *out, *train, *backend])
    assert "device must be a torch device" in complaint(capsys, ["tune", *model, *out, *train, "--device", "gpu"])
    elsewhere = complaint(capsys, ["tune", *model, *out, *train, "--device", "cuda:99"])
    assert "device 'cuda:99' cannot be used: " in elsewhere
    scores = ["eval", *model, "--test", f"{files}/test.jsonl", "--prefix", tmp_path / "none"]
    assert str(tmp_path / "none") in complaint(capsys, scores)
    assert not (tmp_path / "run" / "prefix").exists()


def test_a_prefix_of_another_tokenizer_is_refused(capsys, files, tmp_path):
    assert cli.run(tune_arguments(files, tmp_path / "run", "--epochs", "1")) == 0
    capsys.readouterr()
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["!"])
    tokenizer.save_pretrained(tmp_path / "model")
    argv = ["eval", "--model", tmp_path / "model", "--test", f"{files}/test.jsonl", "--prefix", tmp_path / "run/prefix"]
    assert "made with tokenizer" in complaint(capsys, argv)


def test_a_full_disk_while_saving_is_one_line_and_leaves_nothing_half_written(capsys, files, tmp_path, monkeypatch):
    arguments = tune_arguments(files, tmp_path / "run", "--epochs", "1")

    fsync = os.fsync

    def full(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if "/prefix" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in complaint(capsys, arguments, status=1)
    assert list((tmp_path / "run").glob("**/*prefix*.*")) == []
    assert not (tmp_path / "run" / "history.json").exists()
    monkeypatch.undo()
    assert cli.run([*arguments, "--resume"]) == 0  # the checkpoint is whole, so nothing is computed again
    assert (tmp_path / "run" / "history.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "unknown key 'lrr'; did you mean lr?"),
        ("pool: 3", "unknown key 'pool'; did you mean pooled_tokens?"),
        ("hidden: 3", "unknown key 'hidden'; did you mean mlp_width?"),
        ("- lr", "must map names to values, got list"),
        ("lr: {a: 1}", "lr must be a plain value, got a mapping"),
        ("lr: [", "is not YAML"),
        ("epochs: many", "many"),
    ],
)
def test_wrong_yaml(capsys, tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    line = complaint(capsys, ["tune", "--config", path])
    assert message in line


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3e-3\nepochs: 7\nresume: true\nleave_one_out: suffix\nout: runs/x\nseed:\ntask:\n")
    config = parse(TuneConfig, ["--epochs", "3", "--config", str(path), "--no-resume"])
    # 3e-3 is a string to YAML, and a number here; a key without a value is not given
    assert config.given() == {"lr": 0.003, "epochs": 3, "leave_one_out": "suffix"}
    assert (str(config.out), config.task, config.resume) == ("runs/x", "", False)


def test_the_last_of_equal_flags_wins_and_a_list_of_the_file_is_replaced(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("limit: 4\nmethods: [icl, ct-kv]\nprefix: [a, b]\n")
    line = CommandLine("x", ["--methods", "ttt", f"--config={path}", "--limit", "1", "--limit=2"])
    config = line.parse(EvalConfig)
    assert (config.methods, [str(p) for p in config.prefix], config.limit) == (("ttt",), ["a", "b"], 2)
    assert line.has("limit") and line.has("prefix") and not line.has("suite") and not line.has("config")
    for resume in (["--no-resume", "--resume"], ["--resume", "--no-resume", "--resume"]):
        assert parse(TuneConfig, resume).resume
    with pytest.raises(UsageError, match="unexpected argument 'more'"):  # and no method of the file's list
        parse(EvalConfig, ["more", "--config", str(path)])


@pytest.mark.parametrize("spelling", ["None", "none"])
def test_none_is_a_value_of_some_settings(tmp_path, spelling):
    config = parse(TuneConfig, ["--batch-rows", spelling, f"--clip-norm={spelling}", "--leave-one-out", "none"])
    settings = config.settings("ct-prompt")  # whose own batch_rows is 4
    assert (settings.batch_rows, settings.clip_norm, settings.leave_one_out) == (None, None, "none")
    (tmp_path / "c.yaml").write_text(as_yaml(config))
    assert parse(TuneConfig, [f"--config={tmp_path}/c.yaml"]) == config
    assert str(parse(TuneConfig, ["--out", "none"]).out) == "none"  # a folder's name


@pytest.mark.parametrize("kind", [TuneConfig, EvalConfig])
def test_configuration_survives_yaml(tmp_path, kind):
    lists = ["--methods", "icl", "ct-kv", "--prefix", "a b", "c"] if kind is EvalConfig else ["--resume"]
    config = parse(kind, ["--lr", "0.1", "--bos", "True", "--delimiter", "\n", "--train", "a/b.jsonl", *lists])
    path = tmp_path / "c.yaml"
    path.write_text(as_yaml(config))
    assert parse(kind, [f"--config={path}"]) == config
    assert yaml.safe_load(path.read_text())["lr"] == 0.1


def test_every_training_setting_is_an_option():
    assert [f.name for f in fields(TrainOptions)] == ["preset", *(f.name for f in fields(TrainSettings))]
    with pytest.raises(UsageError):
        parse(EvalConfig, ["--checkpoint-every", "3"])  # tune's alone


def test_help(capsys):
    assert cli.run(["--help"]) == 0
    assert "usage: ctkernels COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.run(["tune", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Peak learning rate" in text and 'Orders that a "permuted" start averages over. [ct-kv, ttt+ct-kv]' in text
    assert "probability in [0, 1) that a row does not see a context token in an epoch. [not ttt]" in text
    assert cli.run([]) == 2


def test_importing_the_package_is_light():
    """The op alone needs torch alone; the command line loads transformers only where a model is."""
    heavy = "{'transformers', 'tyro', 'rich', 'matplotlib', 'safetensors', 'yaml'}"
    code = f"import sys, ctkernels, ctkernels.cli; print({heavy} & set(sys.modules) or 'none')"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "none"
