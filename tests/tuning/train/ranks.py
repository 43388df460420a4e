"""What the processes of `test_distributed.py` run: `torchrun -m tests.tuning.train.ranks FOLDER SCENARIO...`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from ctkernels.testing.models import full_precision_norm, make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.methods.tune import tune
from ctkernels.tuning.train.checkpoint import FILE_NAME
from ctkernels.tuning.train.distributed import PeerError
from ctkernels.tuning.train.trainer import TrainingError
from tests.tuning.runs import TOKENIZER, run, tensors

# name -> (method, settings, number of demonstrations); five rows are no multiple of two or three processes
RUNS = {
    "plain": ("ct-kv", {"drop_p": 0.3}, 5),
    "steps of two rows": ("ct-kv", {"drop_p": 0.3, "batch_rows": 2, "max_tokens": 12, "layout": "padded"}, 5),
    "fewer rows than processes": ("ct-kv", {"drop_p": 0.3}, 2),
    "pull": ("ct-kv", {"pull": 0.5, "fisher": True, "drop_p": 0.3, "frozen_tokens": 3}, 5),
    "subsets": ("ct-kv", {"leave_one_out": "power", "rank": 2}, 5),
    "weights, too": ("ttt+ct-kv", {}, 5),
    "soft prompt": ("cpt", {"drop_p": 0.3}, 5),
}


def tuned(name: str, **arguments):
    method, options, count = RUNS[name]
    with full_precision_norm():
        return run(method, make_model("llama"), DEMONSTRATIONS[:count], options, **arguments)


def rows(folder: Path) -> None:
    """Every run of the table; each process leaves what it got."""
    for name in RUNS:
        result = tuned(name, group=dist.group.WORLD)
        history = torch.tensor([(r.loss, r.grad_norm) for r in result.history], dtype=torch.float64)
        found = {str(i): x.contiguous() for i, x in enumerate(tensors(result.adapter))}
        save_file({"history": history, **found}, folder / f"{name}-{dist.get_rank()}.safetensors")


def checkpoints(folder: Path) -> None:
    """A run that stops after two of three epochs; each process has a folder of its own, to show who writes."""

    def stop(record, module):
        if record.epoch == 3:
            raise InterruptedError("stopped")

    mine = folder / f"stopped-{dist.get_rank()}"
    with pytest.raises(InterruptedError):
        tuned("plain", group=dist.group.WORLD, checkpoint_dir=mine, checkpoint_every=1, on_epoch=stop)
    if dist.get_rank() == 0:
        shutil.copy(mine / FILE_NAME, folder / "two-epochs.safetensors")
    told = tuned("plain", group=dist.group.WORLD, on_epoch=lambda record, _: dist.get_rank() == 1 and record.epoch == 2)
    assert [r.stopped for r in told.history] == [False, True]  # one of them is enough


def resumed(folder: Path) -> None:
    """The same run, resumed from what the first process wrote; then with a folder that only the first one sees."""
    epochs = []
    arguments = {"group": dist.group.WORLD, "checkpoint_dir": folder / "stopped-0", "resume": True}
    result = tuned("plain", **arguments, on_epoch=lambda record, module: epochs.append(record.epoch))
    assert epochs == [3]
    found = {str(i): x.contiguous() for i, x in enumerate(tensors(result.adapter))}
    save_file(found, folder / f"resumed-{dist.get_rank()}.safetensors")
    if dist.get_rank() == 1:
        arguments["checkpoint_dir"] = folder / "elsewhere"
    with pytest.raises(ValueError, match=r"same checkpoint, got .'checkpoint after 3 epochs', 'checkpoint after 0"):
        tuned("plain", **arguments)


def failures(folder: Path) -> None:
    """Whatever goes wrong in one process stops all of them, with a reason, and leaves the group usable."""
    rank = dist.get_rank()

    def fail(record, module):
        if rank == 1 and record.epoch == 2:
            raise MemoryError("no space left")

    with pytest.raises(MemoryError if rank == 1 else PeerError, match="no space left") as caught:
        tuned("plain", group=dist.group.WORLD, on_epoch=fail)
    assert rank == 1 or str(caught.value) == "another process failed, rank 1: MemoryError: no space left"

    method = "ct-kv" if rank else "no such method"
    with pytest.raises(PeerError if rank else ValueError, match="no such method"):
        tune(make_model("llama"), TOKENIZER, DEMONSTRATIONS, method, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"same drop_p, got \[0.1, 0.05\]"):
        run("ct-kv", make_model("llama"), options={"drop_p": 0.1 / (rank + 1)}, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="same demonstrations"):
        run("ct-kv", make_model("llama"), DEMONSTRATIONS[rank:], group=dist.group.WORLD)
    with pytest.raises(ValueError, match="same model"):
        run("ct-kv", make_model("llama", seed=rank), group=dist.group.WORLD)

    def poison(record, module):
        if rank == 1:
            with torch.no_grad():
                module.keys[0].fill_(torch.inf)

    with pytest.raises(TrainingError, match="epoch 2: the loss is nan"):  # of the sum: nobody goes on alone
        tuned("plain", group=dist.group.WORLD, on_epoch=poison)
    alone = dist.new_group([0])
    if rank == 0:
        tuned("plain", group=alone)
    else:
        with pytest.raises(TypeError, match="group must be a process group"):
            tuned("plain", group=alone)
    tuned("plain", group=dist.group.WORLD)


def killed(folder: Path) -> None:
    """A process that vanishes; torchrun then asks the others to end, which is not what is tested here."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def vanish(record, module):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PeerError, match="lost contact with the other processes"):
        tuned("plain", group=dist.group.WORLD, on_epoch=vanish)
    (folder / "noticed").touch()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for scenario in sys.argv[2:]:
        globals()[scenario](Path(sys.argv[1]))
    dist.destroy_process_group()
