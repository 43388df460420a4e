"""Several processes that share the rows of a run give what one gives. They are really started, by the launchers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ctkernels import cli
from ctkernels.tuning.prefix import KVPrefix
from tests.tuning.ranks import RUNS, tuned
from tests.tuning.runs import tensors
from tests.tuning.torchrun import launch, torchrun

TOLERANCE = {"rtol": 0, "atol": 1e-12}


def done(result) -> None:
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def one_process():
    return {name: tuned(name) for name in RUNS}


@pytest.mark.parametrize("processes", [2, 3])
def test_rows_over_processes(processes, one_process, tmp_path):
    """Would catch: dropout by a row's index in its share, a loss divided by the share's size, a penalty counted once
    per process, a process without rows that stops the others, sums that differ between processes."""
    done(torchrun(processes, "tests.tuning.ranks", "rows", tmp_path))
    for name, expected in one_process.items():
        found = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(processes)]
        for rank in range(1, processes):
            assert all(torch.equal(found[0][key], found[rank][key]) for key in found[0]), name
        history = torch.tensor([(r.loss, r.grad_norm) for r in expected.history], dtype=torch.float64)
        torch.testing.assert_close(found[0].pop("history"), history, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)
        for i, x in enumerate(tensors(expected.adapter)):
            torch.testing.assert_close(found[0][str(i)], x, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)


def test_checkpoints(one_process, tmp_path):
    """The first process alone writes; two of them resume, and so does one."""
    done(torchrun(2, "tests.tuning.ranks", "checkpoints", tmp_path))
    assert [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.safetensors")] == ["rank0"]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "checkpoint.safetensors").write_bytes((tmp_path / "rank0" / "checkpoint.safetensors").read_bytes())
    done(torchrun(2, "tests.tuning.ranks", "resumed", tmp_path))
    results = [load_file(tmp_path / f"resumed-{rank}.safetensors") for rank in range(2)]
    results.append({str(i): x for i, x in enumerate(tensors(tuned("plain", checkpoint_dir=alone, resume=True).adapter))})
    for found in results:
        for i, x in enumerate(tensors(one_process["plain"].adapter)):
            torch.testing.assert_close(found[str(i)], x, **TOLERANCE)


def test_failures_stop_all_processes(tmp_path):
    done(torchrun(2, "tests.tuning.ranks", "failures", tmp_path, timeout=120))
    result = torchrun(2, "tests.tuning.ranks", "killed", tmp_path, timeout=120)
    assert result.returncode != 0 and "Signal 9" in result.stderr


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "-m"]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_command(launcher, files, tmp_path, capsys):
    """`ctkernels tune` under a launcher: one result, written once, that of one process."""
    arguments = ["tune", "--model", f"{files}/model", "--train", f"{files}/train.jsonl", "--epochs", "3", "--lr", "1e-2"]
    assert cli.run([*arguments, "--out", f"{tmp_path}/one"]) == 0
    both = launch(launcher, "ctkernels.cli", *arguments, "--out", f"{tmp_path}/two")
    done(both)
    assert both.stdout.count("saved ") == 1
    one, two = (KVPrefix.from_pretrained(tmp_path / name / "prefix") for name in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    losses = [
        [record["loss"] for record in json.loads((tmp_path / name / "history.json").read_text())]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
