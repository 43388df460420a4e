"""Output folders: two runs at once, earlier results, files of the user, signals, full disks."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from ctkernels import cli
from ctkernels.cli.options import EvalConfig, TuneConfig
from ctkernels.cli.parse import CommandLine, UsageError
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.evaluation.sweep.cells import Cell
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from tests.cli.test_cli import BESIDE, complaint


def tune(files, out, *more) -> list[str]:
    return ["tune", "--model", f"{files}/model", "--train", f"{files}/train.jsonl", "--out", str(out), *map(str, more)]


def started(argv, log, prepare=lambda: None) -> int:
    """A process that runs a command; its stderr goes to a file."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            prepare()
            status = cli.run(argv)
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def parameters(folder) -> list[torch.Tensor]:
    return [p.detach() for p in KVPrefix.from_pretrained(folder / "prefix").parameters()]


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parameters(a), parameters(b), strict=True))


def test_two_runs_into_one_folder(files, tmp_path):
    """One of them makes the result; the other says who is at it, or that there is one."""
    out = tmp_path / "run"
    rates = ("0.01", "0.02")
    children = [started(tune(files, out, "--epochs", 8, "--lr", rate), tmp_path / rate) for rate in rates]
    statuses = [ended(child) for child in children]
    assert sorted(statuses) == [0, 2]
    won = statuses.index(0)
    line = (tmp_path / rates[1 - won]).read_text().splitlines()[-1]
    assert re.search(rf"run is in use by process {children[won]} on \S+ \(|run already holds a run \(", line)
    history = json.loads((out / "history.json").read_text())
    prefix = KVPrefix.from_pretrained(out / "prefix")
    assert history[0]["lr"] == prefix.metadata.settings["lr"] == float(rates[won]) and len(history) == 8
    assert f"lr: {rates[won]}" in (out / "config.yaml").read_text()


def test_an_earlier_result_is_replaced_only_if_asked_for(files, tmp_path, capsys):
    """Also that of a method that keeps no checkpoint; what else lies in the folder stays."""
    out = tmp_path / "run"
    assert cli.run(tune(files, out, "--method", "icl")) == 0
    before = parameters(out)
    (out / "notes.txt").write_text("mine")
    again = tune(files, out, "--epochs", 1)
    assert "already holds a run (config.yaml, history.json, prefix/adapter.safetensors); add" in complaint(
        capsys, again
    )
    assert "give one of them" in complaint(capsys, [*again, "--resume", "--overwrite"])
    assert cli.run([*again, "--overwrite"]) == 0
    assert not torch.equal(before[0], parameters(out)[0]) and (out / "notes.txt").read_text() == "mine"
    assert cli.run(tune(files, out, "--epochs", 2, "--lr", "0.5", "--overwrite")) == 0  # over a checkpoint
    assert len(json.loads((out / "history.json").read_text())) == 2
    missing = tune(files, out, "--overwrite")
    missing[missing.index("--model") + 1] = f"{tmp_path}/none"
    kept = parameters(out)
    complaint(capsys, missing)
    assert torch.equal(kept[0], parameters(out)[0])  # nothing is removed for a run that cannot begin


@pytest.mark.parametrize("name", ["config.yaml", "history.json", "prefix/adapter.safetensors"])
def test_files_of_the_user_are_never_replaced(files, tmp_path, capsys, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("lr: 0.1\n")
    for how in ([], ["--resume"], ["--overwrite"]):
        message = complaint(capsys, tune(files, tmp_path / "run", *how))
        assert f"{path} was not written by this command of ctkernels, or is damaged, and is not replaced" in message
    assert path.read_text() == "lr: 0.1\n"


def test_scores_replace_scores_alone(files, tmp_path, capsys):
    out = tmp_path / "scores.json"
    arguments = ["eval", "--model", f"{files}/model", "--test", f"{files}/test.jsonl", "--methods", "zero-shot"]
    arguments += ["--limit", "1", "--out", str(out)]
    assert cli.run(arguments) == 0 and cli.run(arguments) == 0
    out.write_text('{"mine": 1}')
    assert "scores.json was not written by this command" in complaint(capsys, arguments)
    out.unlink()
    os.mkfifo(out)
    assert "scores.json must be a regular file, or not exist yet; it is a FIFO" in complaint(capsys, arguments)


def test_a_run_writes_into_a_folder_alone(files, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        assert f"{name} must be a folder, or not exist yet; it is a" in complaint(capsys, tune(files, tmp_path / name))
    assert "must be a folder, or not exist yet; it is a device" in complaint(capsys, tune(files, "/dev/null"))
    for command in ("export", "import"):
        argv = [command, "--model", f"{files}/model", "--adapter", "x", "--out", str(tmp_path / "link")]
        assert "link must be a folder" in complaint(capsys, argv)
    assert os.listdir(tmp_path / "there") == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_epoch(files, tmp_path, capsys, number, status):
    """The checkpoint is written though none is due, and the run ends with the bits of one that was not stopped."""
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = tune(files, out, "--epochs", 30, "--checkpoint-every", 60, "--drop-p", "0.2")
    child = started(arguments, log)
    wait_for((out / "config.yaml").exists)  # the first epoch is done
    os.kill(child, number)
    assert ended(child) == status
    note, line = [line for line in log.read_text().splitlines() if not line.startswith(BESIDE)][-2:]
    assert note == "ctkernels: ends with this epoch, and keeps a checkpoint; once more ends at once"
    assert line == "ctkernels: error: interrupted; continue with --resume, from the last checkpoint"
    assert (out / "checkpoint" / "checkpoint.safetensors").exists() and not (out / "history.json").exists()
    assert cli.run([*arguments, "--resume"]) == 0
    assert cli.run(tune(files, tmp_path / "whole", "--epochs", 30, "--drop-p", "0.2")) == 0
    assert same_bits(out, tmp_path / "whole")


def test_sigterm_elsewhere_ends_at_once(files, tmp_path):
    """While the task is read from a FIFO that nobody writes to."""
    os.mkfifo(tmp_path / "train.jsonl")
    arguments = ["tune", "--model", "x", "--train", f"{tmp_path}/train.jsonl", "--out", f"{tmp_path}/run"]
    child = started(arguments, tmp_path / "log")
    writer = None
    while writer is None:  # opens when the command reads
        with suppress(OSError):
            writer = os.open(tmp_path / "train.jsonl", os.O_WRONLY | os.O_NONBLOCK)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    assert ended(child) == 143
    os.close(writer)


def test_too_little_memory_is_one_line(files, tmp_path):
    """The address space of the process is limited: an MLP of 4 GB does not fit."""

    def little() -> None:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), -1))

    arguments = tune(files, tmp_path / "run", "--method", "prefix-tuning", "--mlp-width", 10**7)
    status, lines = ended(started(arguments, tmp_path / "log", little)), (tmp_path / "log").read_text().splitlines()
    assert status == 1, lines
    assert lines[-1].startswith("ctkernels: error: out of memory: ") and "Traceback" not in "".join(lines)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, and a function that fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:  # `full_disk` (conftest.py) cuts files off without this right, and runs everywhere
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk) -> None:
    with suppress(OSError), open(disk / "ballast", "ab", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    with suppress(OSError), open(disk / "ballast", "ab", buffering=0) as file:
        while file.write(b"x"):
            pass


def test_a_full_disk(files, small_disk, tmp_path, capsys):
    """The run ends with a sentence and its last checkpoint, from which it goes on when there is room again."""
    out = small_disk / "run"
    arguments = tune(files, out, "--epochs", 40, "--checkpoint-every", 2)
    child = started(arguments, tmp_path / "log")
    wait_for((out / "checkpoint" / "checkpoint.safetensors").exists)
    fill(small_disk)
    assert ended(child) == 1
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.fullmatch(
        r"ctkernels: error: \S+(checkpoint|adapter)\.safetensors: No space left on device; what was saved before is "
        "whole: continue with --resume",
        line,
    )
    assert not list(out.rglob(".*.tmp"))
    assert "No space left on device" in complaint(capsys, [*arguments, "--resume"], status=1)
    (small_disk / "ballast").unlink()
    assert cli.run([*arguments, "--resume"]) == 0
    assert cli.run(tune(files, tmp_path / "whole", "--epochs", 40)) == 0
    assert same_bits(out, tmp_path / "whole")


def test_a_disk_that_cannot_be_written(files, small_disk, capsys):
    """Said before the model is loaded."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    arguments = tune("nowhere", small_disk / "run", "--train", f"{files}/train.jsonl")
    assert "Read-only file system" in complaint(capsys, arguments, status=1)


@pytest.mark.parametrize("spec", ["icl:backend=/../../x", "icl:backend=..", "icl:backend=" + 300 * "a"])
@pytest.mark.parametrize("task", ["../../x", "..", ".", "/etc", "a/b", "a\0b", ""])
def test_names_stay_in_the_folder(tmp_path, task, spec):
    cell = Cell(task, MethodSpec.parse(spec), 13)
    path = cell.path(tmp_path)
    assert path.resolve().relative_to(tmp_path).parts[0] == "cells" and len(path.relative_to(tmp_path).parts) == 4
    Cell(task, MethodSpec.parse(spec), 13).path(tmp_path).parent.mkdir(parents=True)


def test_usual_names_are_as_they_are(tmp_path):
    path = Cell("glue-sst2", MethodSpec.parse("ct-kv:lr=0.001:leave_one_out=none"), 13).path(tmp_path)
    assert path == tmp_path / "cells" / "glue-sst2" / "ct-kv@lr=0.001@leave_one_out=none" / "13.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [icl, --keep-offsets]", "no entry of methods may begin with a dash, got '--keep-offsets'"),
        ("methods: [icl, -h]", "no entry of methods may begin with a dash, got '-h'"),
        ("methods: [icl, [a]]", "methods must be a list of plain values, got a list in it"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmethods: [*b, *b]", "unknown key 'a'"),
        ("limit: 1\nmethods: icl\nlimit: 2\n", r"c.yaml:3: limit is given twice"),
        ("limit: 1\nmethods: [icl\n", r"c.yaml:3 is not YAML: "),
        ("methods: " + "[" * 1000, "c.yaml is nested too deeply for a configuration"),
        ("limit: 2020-13-45", "c.yaml is not YAML: month must be in 1..12"),
        ("methods: icl #" + "x" * (1 << 20), "c.yaml has more than the 1048576 bytes that are read of a configuration"),
    ],
)
def test_configurations_that_are_refused(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        CommandLine("ctkernels eval", [f"--config={path}"]).parse(EvalConfig)


def test_a_value_of_a_configuration_is_never_an_option(tmp_path):
    (tmp_path / "c.yaml").write_text("model: --resume\nout: --overwrite\nseed: -1\n")
    config = CommandLine("ctkernels tune", [f"--config={tmp_path}/c.yaml"]).parse(TuneConfig)
    assert (config.model, str(config.out), config.resume, config.overwrite) == ("--resume", "--overwrite", False, False)


def test_a_configuration_without_end():
    with pytest.raises(UsageError, match="/dev/zero has more than the 1048576 bytes"):
        CommandLine("ctkernels tune", ["--config", "/dev/zero"])
