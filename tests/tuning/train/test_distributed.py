"""Several processes that share the rows of a run give what one gives. They are really started, by the launchers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.parallel import own_heads
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from tests.tuning.runs import tensors
from tests.tuning.train.ranks import RUNS, tuned
from tests.tuning.train.torchrun import launch, torchrun

TOLERANCE = 2e-12  # of fp64 sums in another order, after the steps of AdamW


def done(result) -> None:
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def one_process():
    return {name: tuned(name) for name in RUNS}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """One start of two processes, which takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("two")
    done(torchrun(2, "tests.tuning.train.ranks", folder, "rows", "checkpoints", "resumed", "failures"))
    return folder


@pytest.fixture(scope="module")
def three_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    done(torchrun(3, "tests.tuning.train.ranks", folder, "rows"))
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_rows_over_processes(processes, one_process, request):
    """Would catch: dropout by a row's index in its share, a loss divided by the share's size, a penalty counted once
    per process, a process without rows that stops the others, sums that differ between processes."""
    folder = request.getfixturevalue({2: "two_processes", 3: "three_processes"}[processes])
    for name, expected in one_process.items():
        found = [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(processes)]
        for rank in range(1, processes):
            assert all(torch.equal(found[0][key], found[rank][key]) for key in found[0]), name
        history = torch.tensor([(r.loss, r.grad_norm) for r in expected.history], dtype=torch.float64)
        assert (found[0].pop("history") - history).abs().max() <= TOLERANCE, name
        for i, x in enumerate(tensors(expected.adapter)):
            assert (found[0][str(i)] - x).abs().max() <= TOLERANCE * max(1.0, float(x.abs().max())), name


def test_checkpoints(one_process, two_processes, tmp_path):
    """The first process alone writes; what it wrote is resumed by both, and by one process of its own."""
    assert [path.parent.name for path in two_processes.rglob("checkpoint.safetensors")] == ["stopped-0"]
    (tmp_path / "checkpoint.safetensors").write_bytes((two_processes / "two-epochs.safetensors").read_bytes())
    alone = tuned("plain", checkpoint_dir=tmp_path, resume=True)
    results = [load_file(two_processes / f"resumed-{rank}.safetensors") for rank in range(2)]
    results.append({str(i): x for i, x in enumerate(tensors(alone.adapter))})
    for found in results:
        for i, x in enumerate(tensors(one_process["plain"].adapter)):
            torch.testing.assert_close(found[str(i)], x, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_process_that_vanishes_does_not_leave_the_others_waiting(tmp_path):
    result = torchrun(2, "tests.tuning.train.ranks", tmp_path, "killed", timeout=120)
    assert result.returncode != 0 and (tmp_path / "noticed").exists(), result.stderr[-4000:]


def test_sharded_models(tmp_path):
    """Would catch: heads of another process read, a gradient of the own heads alone, gradients summed once too often,
    forward passes that not all processes of a sharded model make, weights that are trained behind the user's back."""
    done(torchrun(2, "tests.tuning.train.sharded", tmp_path))


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"the prefix has 3 KV heads and this layer 2$"):
        own_heads(torch.zeros(3, 5, 4), 2, None)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "-m"]


def test_example_of_a_sharded_model(files, tmp_path):
    """As a user starts it: FSDP2, rows over both processes."""
    arguments = ["--model", f"{files}/model", "--train", f"{files}/train.jsonl", "--out", tmp_path, "--epochs", "2"]
    first = launch([*TORCHRUN[:-1], "examples/tune_sharded.py"], *arguments)
    done(first)
    assert [line[:8] for line in first.stdout.splitlines() if "loss" in line] == ["epoch 1:", "epoch 2:"]
    model, tokenizer = make_model("llama", torch.float32), char_tokenizer()
    expected = tune(model, tokenizer, DEMONSTRATIONS, settings=get_method("ct-kv").settings(epochs=2)).prefix
    actual = KVPrefix.from_pretrained(tmp_path / "prefix", model, tokenizer)
    for a, b in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_command(launcher, files, tmp_path, capsys):
    """`ctkernels tune` under a launcher: one result, written once, that of one process."""
    arguments = [
        "tune",
        "--model",
        f"{files}/model",
        "--train",
        f"{files}/train.jsonl",
        "--epochs",
        "3",
        "--lr",
        "1e-2",
    ]
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
