"""Checkpoints: a run that was stopped anywhere and resumed ends with the bits of one that was not."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.adapters.file import read_file, write_file
from ctkernels.tuning.evaluation.evaluate import evaluate_prefix
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import TuneResult, tune
from ctkernels.tuning.storage import LOCK
from ctkernels.tuning.train.checkpoint import FILE_NAME, Checkpoint, CheckpointError

REPOSITORY = Path(__file__).parents[3]
EPOCHS = 7
SETTINGS = get_method("ct-kv").settings(epochs=EPOCHS, lr=1e-2, drop_p=0.3, seed=3, max_tokens=30)


def run(folder=None, demonstrations=DEMONSTRATIONS, settings=SETTINGS, model=None, **arguments) -> TuneResult:
    model = model or make_model("llama", torch.float32)
    if folder is not None:
        arguments["checkpoint_dir"] = folder
    return tune(model, char_tokenizer(), demonstrations, "ct-kv", settings, checkpoint_every=2, **arguments)


@pytest.fixture(scope="module")
def uninterrupted() -> TuneResult:
    return run()


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != LOCK]


def assert_same_run(actual: TuneResult, expected: TuneResult) -> None:
    for a, b in zip(actual.prefix.parameters(), expected.prefix.parameters(), strict=True):
        assert torch.equal(a, b)
    what = [[(r.epoch, r.loss, r.lr, r.grad_norm) for r in result.history] for result in (actual, expected)]
    assert what[0] == what[1]


class Stopped(Exception):
    pass


def stop_at(epoch: int):
    def on_epoch(record, prefix):
        if record.epoch == epoch:
            raise Stopped

    return on_epoch


@pytest.mark.parametrize("epoch", [1, 2, 3, 6, 7])
def test_resumed_runs_end_with_the_same_bits(tmp_path, uninterrupted, epoch):
    with pytest.raises(Stopped):
        run(tmp_path, on_epoch=stop_at(epoch))
    epochs = []
    resumed = run(tmp_path, resume=True, on_epoch=lambda record, prefix: epochs.append(record.epoch))
    assert_same_run(resumed, uninterrupted)
    first = 2 * ((epoch - 1) // 2) + 1  # checkpoints are written after epochs 2, 4, 6, once the callback has returned
    assert epochs == list(range(first, EPOCHS + 1))


def test_stopped_again_and_again(tmp_path, uninterrupted):
    for epoch in (3, 4, 7):
        with pytest.raises(Stopped):
            run(tmp_path, resume=True, on_epoch=stop_at(epoch))
    assert_same_run(run(tmp_path, resume=True), uninterrupted)


def test_a_finished_run_resumes_to_its_result(tmp_path, uninterrupted):
    run(tmp_path)
    assert_same_run(run(tmp_path, resume=True, on_epoch=stop_at(1)), uninterrupted)


def test_a_checkpoint_without_settings_that_came_later(tmp_path, uninterrupted):
    """It goes on where they are what the earlier version did, and is refused by their names elsewhere."""
    with pytest.raises(Stopped):
        run(tmp_path, on_epoch=stop_at(3))
    _, description, tensors = read_file(tmp_path / FILE_NAME, "checkpoint")
    own = {name: description[name] for name in ("run", "history")}
    for name in ("objective", "mixed", "reduction", "score"):
        del own["run"][name]
    write_file(tmp_path / FILE_NAME, "checkpoint", own, tensors)
    with pytest.raises(CheckpointError, match="reduction was 'rows' and is now 'tokens'"):
        run(tmp_path, resume=True, settings=replace(SETTINGS, reduction="tokens"))
    assert_same_run(run(tmp_path, resume=True), uninterrupted)


KILLED = """
import sys, torch
from tests.tuning.train.test_resume import run
torch.set_num_threads(1)
run(sys.argv[1], on_epoch=lambda record, prefix: print(record.epoch, flush=True))
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    for line in process.stdout:
        if line.strip() == "5":
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same_run(run(tmp_path, resume=True), run())
    finally:
        torch.set_num_threads(threads)
    assert files(tmp_path) == [FILE_NAME]


def test_a_run_that_was_told_to_stop_stays_stopped(tmp_path, uninterrupted):
    """As early stopping does: the callback evaluates what is trained, and says when it is enough."""
    model, losses = make_model("llama", torch.float32), []

    def enough(record, prefix):
        losses.append(evaluate_prefix(model, char_tokenizer(), DEMONSTRATIONS[:2], prefix).gold_loss)
        return record.epoch == 3

    stopped = run(tmp_path, model=model, on_epoch=enough)
    assert [r.stopped for r in stopped.history] == [False, False, True] and len(set(losses)) == 3
    assert [r.loss for r in stopped.history] == [r.loss for r in uninterrupted.history[:3]]
    assert_same_run(run(tmp_path, resume=True), stopped)


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint_dir already holds .*; resume from it, or choose another folder"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": replace(SETTINGS, lr=0.02)}, "lr was 0.01 and is now 0.02"),
        ({"settings": replace(SETTINGS, epochs=9)}, "epochs was 7 and is now 9"),
        ({"demonstrations": DEMONSTRATIONS[::-1]}, "demonstrations was '[0-9a-f]{16}' and is now"),
        ({"model": make_model("llama", torch.float32, seed=1)}, "model was '[0-9a-f]{16}' and is now"),
    ],
    ids=["lr", "epochs", "demonstrations", "model"],
)
def test_resuming_another_run_is_refused_by_the_name_of_what_differs(tmp_path, change, message):
    with pytest.raises(Stopped):
        run(tmp_path, on_epoch=stop_at(3))
    with pytest.raises(CheckpointError, match=rf"cannot resume from .*: {message}"):
        run(tmp_path, resume=True, **change)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    run(tmp_path)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: damaged or cut off"):
        run(tmp_path, resume=True)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:])
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: damaged: .*\(checksum\)"):
        run(tmp_path, resume=True)
    save_file(load_file_bytes(whole, tmp_path), path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: not a checkpoint saved by ctkernels"):
        run(tmp_path, resume=True)
    path.write_bytes(whole)
    _, description, tensors = read_file(path, "checkpoint")
    write_file(path, "checkpoint", {**description, "run": None}, tensors)
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: damaged: TypeError"):
        run(tmp_path, resume=True)
    write_file(path, "checkpoint", description, {**tensors, "optimizer/x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: "):
        run(tmp_path, resume=True)


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    store = Checkpoint(tmp_path, {"lr": 0.1})
    store.save({"keys.0": parameter}, optimizer, [])
    with torch.no_grad():
        parameter[1] = torch.inf
    with pytest.raises(CheckpointError, match=r"not written: tensor parameter/keys\.0 holds values that are"):
        store.save({"keys.0": parameter}, optimizer, [{"epoch": 1}])
    assert store.load({"keys.0": parameter}, optimizer) == [] and torch.equal(parameter, torch.ones(3))


def load_file_bytes(data: bytes, folder) -> dict:
    """The tensors of a safetensors file without its metadata."""
    (folder / "copy").write_bytes(data)
    return load_file(folder / "copy")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, full_disk, uninterrupted):
    with pytest.raises(Stopped):
        run(tmp_path, on_epoch=stop_at(3))
    before = (tmp_path / FILE_NAME).read_bytes()
    with full_disk(len(before) // 2), pytest.raises(OSError, match="File too large"):
        run(tmp_path, resume=True)
    assert files(tmp_path) == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert_same_run(run(tmp_path, resume=True), uninterrupted)


def test_temporary_files_of_a_killed_writer_are_removed(tmp_path):
    leftover = tmp_path / f".{FILE_NAME}.0123456789abcdef.tmp"
    leftover.write_bytes(b"half a file")
    run(tmp_path)
    assert files(tmp_path) == [FILE_NAME]


def test_checkpoint_every_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        tune(make_model("llama"), char_tokenizer(), DEMONSTRATIONS, settings=SETTINGS, checkpoint_every=0)
