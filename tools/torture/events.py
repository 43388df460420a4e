"""What goes wrong: each function is one event, or a row of them, and notes what is left afterwards."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ctkernels import cli
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning import Adapter, KVPrefix
from ctkernels.tuning.adapters.file import PrefixFileError, write_file
from ctkernels.tuning.evaluation.sweep.cells import SweepError
from ctkernels.tuning.storage import TEMPORARY, OutputError, atomic_write_bytes
from tools.torture.preload import READS, WRITES, Faults
from tools.torture.processes import FINE, OTHER, SENTENCE, Child, child, is_sentence
from tools.torture.targets import OtherValues, Target

ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE)
BAD = ("lost", "unreadable", "traceback", "leftover")
HOW_OFTEN_RUNS_SAVE = ["--epochs", "12", "--checkpoint-every", "2"]


@dataclass
class Campaign:
    """The events so far, by family and outcome, and the first ones of each kind that must not happen."""

    random: random.Random
    folder: Path
    faults: Faults
    model: Any
    prefix: KVPrefix
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    _folders: int = 0

    def total(self) -> int:
        return sum(count.total() for count in self.counts.values())

    def new(self) -> Path:
        """A folder of its own for an event."""
        self._folders += 1
        path = self.folder / str(self._folders)
        path.mkdir()
        return path

    def note(self, family: str, outcome: str, what: str = "") -> None:
        self.counts.setdefault(family, Counter())[outcome] += 1
        if outcome in BAD:
            print(f"{family}: {outcome}: {what}", file=sys.stderr, flush=True)
            if len(self.examples) < 20:
                self.examples.append(f"{family}: {outcome}: {what}")


def look(campaign: Campaign, family: str, target: Target, folder: Path, saved: int, what: str) -> None:
    """Note what lies in a folder in which `saved` was the last number that was said to be saved."""
    what = f"{target.name}, {what}"
    try:
        found = target.load(folder)
    except FileNotFoundError as error:
        return campaign.note(family, "lost", f"{what}: {error}")
    except (PrefixFileError, SweepError, OtherValues) as error:
        return campaign.note(family, "unreadable", f"{what}: {error}")
    except Exception as error:
        return campaign.note(family, "traceback", f"{what}: {type(error).__name__}: {error}")
    if found < saved:
        return campaign.note(family, "lost", f"{what}: {found} lies there, {saved} was saved")
    with child(lambda say: target.save(folder, found + 1), folder) as after:
        if after.status():
            return campaign.note(family, "traceback", f"{what}: the next save ended with {after.status()}")
    if any(TEMPORARY.fullmatch(path.name) for path in folder.rglob("*")):
        return campaign.note(family, "leftover", what)
    campaign.note(family, "the last saved" if found == saved else "the one being saved")


def kill(campaign: Campaign, target: Target) -> None:
    """A process that saves without end is killed at a random moment."""
    folder = campaign.new()
    target.save(folder, 1)

    def work(say: Callable[[int], object]) -> None:
        for number in range(2, 1 << 30):
            target.save(folder, number)
            say(number)

    with child(work, folder) as killed:
        time.sleep(campaign.random.uniform(0, 0.1))
        killed.stop()
        saved = killed.saved()
    look(campaign, "kill", target, folder, saved, "killed")


def calls(campaign: Campaign, target: Target, error: int) -> None:
    """A process saves, once for each system call that this makes: that call fails, or the process is killed (0)."""
    for number in range(1000):
        if not one_call(campaign, target, number, error):
            return


def one_call(campaign: Campaign, target: Target, number: int, error: int) -> bool:
    """Whether there is a call of this number."""
    folder, family = campaign.new(), "error" if error else "call"
    target.save(folder, 1)

    def work(say: Callable[[int], object]) -> None:
        campaign.faults.arm(WRITES, number, error)
        target.save(folder, 2)
        made = campaign.faults.disarm()
        say(2 if made > number else 0)

    with child(work, folder) as failing:
        saved, status = failing.saved(), failing.status()
    if saved == 0:
        return False
    what = f"call {number}: {os.strerror(error) if error else 'killed'}"
    if status == OTHER:
        campaign.note(family, "traceback", f"{target.name}, {what}")
    else:
        look(campaign, family, target, folder, saved, what)
    return True


def reads(campaign: Campaign, target: Target) -> None:
    """A process loads, once for each system call that this makes: that call fails with EIO."""
    folder = campaign.new()
    target.save(folder, 1)
    for number in range(1000):

        def work(say: Callable[[int], object], number: int = number) -> None:
            target.load(folder)  # what is imported for it
            campaign.faults.arm(READS, number, errno.EIO)
            found = target.load(folder)
            say(found if campaign.faults.disarm() > number else 0)

        with child(work, folder) as failing:
            saved, status = failing.saved(), failing.status()
        if saved == 0:
            return
        outcomes = {FINE: "read", SENTENCE: "refused in a sentence"}
        campaign.note("read error", outcomes.get(status, "traceback"), f"{target.name}, call {number}")


def writers(campaign: Campaign, target: Target, count: int) -> None:
    """Several processes save at once, and a reader finds a whole file each time."""
    folder = campaign.new()
    target.save(folder, 1)

    def work(first: int, say: Callable[[int], object]) -> None:
        for number in range(first, first + 5):
            target.save(folder, number)

    def read(say: Callable[[int], object]) -> None:
        for _ in range(10):
            target.load(folder)

    works = [*(partial(work, 2 + 5 * index) for index in range(count)), read]
    with ExitStack() as stack:
        statuses = [each.status() for each in [stack.enter_context(child(one, folder)) for one in works]]
    if any(statuses):
        outcome = "unreadable" if statuses[-1] else "traceback"
        campaign.note("writers", outcome, f"{target.name}, {count} writers and a reader: {statuses}")
    else:
        look(campaign, "writers", target, folder, 2, f"{count} writers")


def damage(campaign: Campaign, target: Target, places: int) -> None:
    """A byte of a file is changed, or the file is cut off there: at every 1000th place, at `places` ones at least."""
    folder = campaign.new()
    target.save(folder, 7)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, min(1000, len(whole) // places))):
            for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xA5]) + whole[place + 1 :]):
                path.unlink()
                path.write_bytes(content)
                what = f"{target.name}: {path.name} at {place}"
                attempt(campaign, "damage", what, folder, lambda: target.load(folder), target.checked)
        path.write_bytes(whole)


def attempt(
    campaign: Campaign, family: str, what: str, folder: Path, work: Callable[[], object], checked: bool = True
) -> None:
    """A read that may succeed, or fail in one sentence; where there is a checksum, not with other values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except (PrefixFileError, SweepError, OutputError) as error:
        campaign.note(
            family, "refused in a sentence" if is_sentence(error, folder) else "traceback", f"{what}: {error}"
        )
    except OtherValues as error:
        campaign.note(family, "unreadable" if checked else "read with other values", f"{what}: {error}")
    except Exception as error:
        campaign.note(family, "traceback", f"{what}: {type(error).__name__}: {error}")
    else:
        campaign.note(family, "read")


WRONG = (None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, "x", "../../x", [], [[]], [None], {}, {"x": 1}, [0] * 1000)
SHAPES = ([1 << 40], [1 << 62, 1 << 62], [-1], [10**30], "x", None, [], [0])


def header(campaign: Campaign) -> None:
    """A random hostile value in the description of an adapter, or in the header of its file."""
    chance, folder = campaign.random, campaign.new()
    path = folder / "adapter.safetensors"
    if chance.random() < 0.5:
        description, tensors = campaign.prefix.parts()
        own = json.loads(json.dumps(description))
        where = chance.choice([own, own["metadata"], own["metadata"]["settings"]])
        name = chance.choice([*where, "lora", "prompt", "offsets", "demonstrations", "new"])
        where[name] = wrong = chance.choice(WRONG)
        write_file(path, "adapter", own, tensors)
        what = f"{name} = {str(wrong)[:40]}"
    else:
        entry = {"dtype": chance.choice(["F32", "F64", "I8", "X", None]), "shape": chance.choice(SHAPES)}
        entry["data_offsets"] = chance.choice([[0, 8], [8, 0], [0, 1 << 60], [-8, 0], None, [0]])
        text = json.dumps({"keys.0": entry, "__metadata__": chance.choice(WRONG)}).encode()
        length = chance.choice([len(text), len(text) + 9, 1 << 62, 0])
        atomic_write_bytes(path, length.to_bytes(8, "little") + text + bytes(8))
        what = f"{length} {text[:200]!r}"
    attempt(campaign, "header", what, folder, lambda: Adapter.from_pretrained(folder, campaign.model))


@contextmanager
def small_disk(campaign: Campaign) -> Iterator[Path | None]:
    """A file system of 4 MB; None where mounting is not permitted."""
    folder = campaign.new()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def nearly_full(disk: Path, room: int) -> Iterator[None]:
    """A block in which a disk has so many bytes left."""
    ballast = disk / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - room))
    try:
        yield
    finally:
        ballast.unlink()


def full(campaign: Campaign, disk: Path, target: Target, room: int) -> None:
    """A save on a disk with so many bytes left."""
    folder = disk / target.name
    shutil.rmtree(folder, ignore_errors=True)
    target.save(folder, 1)

    def work(say: Callable[[int], object]) -> None:
        target.save(folder, 2)
        say(2)

    with nearly_full(disk, room), child(work, folder) as failing:
        saved, status = failing.saved(), failing.status()
    if status == OTHER:
        campaign.note("full", "traceback", target.name)
    else:
        look(campaign, "full", target, folder, saved, f"{room} bytes left")


def read_only(campaign: Campaign, disk: Path, target: Target) -> None:
    """A save on a file system that cannot be written to."""
    folder = disk / target.name
    shutil.rmtree(folder, ignore_errors=True)
    target.save(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        with child(lambda say: target.save(folder, 2), folder) as refused:
            status = refused.status()
        found = target.load(folder)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    if status != SENTENCE or found != 1:
        campaign.note("read-only", "traceback", f"{target.name}: status {status}, read {found}")
    else:
        look(campaign, "read-only", target, folder, 1, "read-only")


class Runs:
    """`ctkernels tune` of a tiny model, each time with the bits of a run that nothing happened to."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.files = campaign, campaign.new()
        make_model("llama", torch.float32).save_pretrained(self.files / "model")
        char_tokenizer().save_pretrained(self.files / "model")
        write_jsonl(self.files / "train.jsonl", DEMONSTRATIONS)
        whole = campaign.new() / "run"
        with self.tune(whole) as child_:
            if child_.status():
                raise RuntimeError("a run that nothing happens to must end with 0")
        self.whole = list(KVPrefix.from_pretrained(whole).parameters())

    @contextmanager
    def tune(self, out: Path, *more: str) -> Iterator[Child]:
        """A process that tunes into `out`; it ends with the status of the command."""
        own = ["--model", f"{self.files}/model", "--train", f"{self.files}/train.jsonl", "--out", str(out)]

        def work(say: Callable[[int], object]) -> None:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            sys.stderr = open(out.with_name(f"{out.name}.log"), "a")  # noqa: SIM115
            os._exit(cli.run(["tune", *own, *HOW_OFTEN_RUNS_SAVE, "--threads", "1", *more]))

        with child(work, out) as running:
            yield running

    def stopped(self, how: signal.Signals) -> None:
        """A run is killed or ended at a random moment, and resumed."""
        out = self.campaign.new() / "run"
        with self.tune(out) as running:
            time.sleep(self.campaign.random.uniform(0, 0.6))
            running.stop(how)
            status = running.status()
        self._compare(f"tune, {how.name}", out, status, (0, 143, -how))

    def two(self) -> None:
        """Two runs into one folder: one does it, the other one ends with a sentence."""
        out = self.campaign.new() / "run"
        with self.tune(out) as one, self.tune(out) as other:
            statuses = sorted((one.status(), other.status()))
        self._compare("tune, two runs", out, 0 if statuses == [0, 2] else 1, (0,))

    def full(self, disk: Path, room: int) -> None:
        """A run on a disk with so many bytes left, continued when there is room again."""
        out = disk / "run"
        shutil.rmtree(out, ignore_errors=True)
        with nearly_full(disk, room), self.tune(out) as running:
            status = running.status()
        self._compare("tune, full disk", out, status, (0, 1))

    def _compare(self, family: str, out: Path, status: int, allowed: tuple[int, ...]) -> None:
        log = out.with_name(f"{out.name}.log")
        said = log.read_text() if log.exists() else ""
        if status not in allowed or "Traceback" in said:
            return self.campaign.note(family, "traceback", f"status {status}: {said[-300:]}")
        with self.tune(out, "--resume") as resumed:
            if resumed.status():
                return self.campaign.note(family, "unreadable", f"resumed: {log.read_text()[-300:]}")
        if any(TEMPORARY.fullmatch(path.name) for path in out.rglob("*")):
            return self.campaign.note(family, "leftover")
        found = list(KVPrefix.from_pretrained(out).parameters())
        same = all(torch.equal(a, b) for a, b in zip(found, self.whole, strict=True))
        log.unlink()
        self.campaign.note(family, "the same bits" if same else "lost", "other bits than those of a run without a stop")
