#!/usr/bin/env python3
"""Files under attack: `make torture`, or  python -m tools.torture [--events 1000] [--seed 0] [--out FOLDER]

Each event saves, reads or tunes in processes of its own while something goes wrong, and then looks at what is left:

    kill         a process that saves without end is killed (SIGKILL) at a random moment
    call         ... or at each system call in turn that writes (`faults.c`)
    error        ... or such a call fails, with EIO, ENOSPC, EROFS, EACCES or EMFILE
    writers      two or six processes save into one folder, a reader beside them
    full         a real file system of 4 MB is full
    read-only    a real file system is read-only
    damage       a byte of a file is changed, or the file is cut off there: at every thousandth place
    header       a header with a hostile value
    tune         `ctkernels tune` is killed or ended by SIGTERM, and resumed

What may happen: the old file or the new one, whole; an error of one sentence. What may not: `lost` (neither is there,
or an older one than what had been saved), `unreadable`, `traceback` (any other exception), `leftover` (a temporary file
that stays when the next process has written).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
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
from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer, write_jsonl
from ctkernels.tuning import Adapter, KVPrefix, PrefixStore, export_peft, import_peft, storage
from ctkernels.tuning.adapters.file import PrefixFileError, Saved, write_file, write_folder
from ctkernels.tuning.evaluation.sweep.cells import CellResult, SweepError, read_cell
from ctkernels.tuning.storage import TEMPORARY, OutputError, atomic_write_bytes, atomic_write_json
from ctkernels.tuning.train.checkpoint import Checkpoint

HERE = Path(__file__).parent
ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE)
LOADED = "CTKERNELS_FAULTS"  # the library of faults.c
BAD = ("lost", "unreadable", "traceback", "leftover")


@dataclass
class Campaign:
    """The events so far, by family and outcome, and the first ones of each kind that must not happen."""

    random: random.Random
    folder: Path
    faults: ctypes.CDLL
    model: Any
    prefix: KVPrefix
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def total(self) -> int:
        return sum(count.total() for count in self.counts.values())

    def note(self, family: str, outcome: str, what: str = "") -> None:
        self.counts.setdefault(family, Counter())[outcome] += 1
        if outcome in BAD and len(self.examples) < 20:
            self.examples.append(f"{family}: {outcome}: {what}")
            print(self.examples[-1], file=sys.stderr)


class OtherValues(Exception):
    """A file was read whose values were never saved together."""


class Target:
    """A kind of file: how the version of a number is saved, and which number lies there.

    save(folder, number), load(folder) -> number; load raises what its kind raises for a file that cannot be used.
    """

    def __init__(self, name: str, save: Callable[[Path, int], None], load: Callable[[Path], int]) -> None:
        self.name, self.save, self.load = name, save, load


def targets(prefix: KVPrefix, model: Any) -> list[Target]:
    """Every kind of file that the package writes."""
    description, tensors = prefix.parts()
    parameter = torch.nn.Parameter(torch.zeros(3000))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)

    def filled(number: int) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(x, number) for name, x in tensors.items()}

    def of(adapter: KVPrefix) -> int:
        numbers = {float(x) for p in adapter.parameters() for x in (p.min(), p.max())}
        if len(numbers) > 1:
            raise OtherValues(f"{len(numbers)} numbers in one prefix")
        return int(numbers.pop())

    def save_adapter(folder: Path, number: int) -> None:
        write_folder(folder, description, filled(number), with_card=True)

    def save_checkpoint(folder: Path, number: int) -> None:
        with torch.no_grad():
            parameter.fill_(number)
        Checkpoint(folder, {"lr": 1}).save({"p": parameter}, optimizer, [{"epoch": number}])

    def load_checkpoint(folder: Path) -> int:
        (record,) = Checkpoint(folder, {"lr": 1}).load({"p": parameter}, optimizer)
        assert torch.equal(parameter, torch.full_like(parameter, record["epoch"]))
        return int(record["epoch"])

    def put(folder: Path, number: int) -> None:
        PrefixStore(folder, model).put("a/b", KVPrefix.from_parts(read_parts(number)))

    def read_parts(number: int) -> Saved:
        return Saved(Path("memory"), json.loads(json.dumps(description)), filled(number))

    def cell(folder: Path, number: int) -> None:
        CellResult("task", "icl", number, {}, predictions=["x" * 50] * 100).write(folder / "13.json")

    def load_cell(folder: Path) -> int:
        found = read_cell(folder / "13.json")
        if found is None:
            raise FileNotFoundError(folder / "13.json")
        return found.seed

    def peft(folder: Path, number: int) -> None:
        export_peft(KVPrefix.from_parts(read_parts(number)), folder)

    return [
        Target("adapter", save_adapter, lambda folder: of(Adapter.from_pretrained(folder).prefix)),
        Target("checkpoint", save_checkpoint, load_checkpoint),
        Target("store", put, lambda folder: of(PrefixStore(folder, model).get("a/b"))),
        Target("cell", cell, load_cell),
        Target("peft", peft, lambda folder: of(import_peft(folder, model).prefix)),
    ]


class Child:
    """A process at work, and the pipe from which what it says comes."""

    def __init__(self, process: int, pipe: int) -> None:
        self.process, self.pipe = process, pipe
        self._status: int | None = None

    def status(self) -> int:
        """Waits for its end: 0, 3 for an error of one sentence, 4 for any other exception, or minus a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self._status

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal, if it was not waited for."""
        if self._status is None:
            os.kill(self.process, how)

    def saved(self) -> int:
        """The last number that it said to be saved, when it is gone; 1 is what lay there before."""
        data = b""
        while part := os.read(self.pipe, 1 << 16):
            data += part
        data = data[: len(data) // 4 * 4]
        return int.from_bytes(data[-4:], "little") if data else 1


@contextmanager
def child(work: Callable[[], object]) -> Iterator[Child]:
    """A process at work, which is killed at the end of the block."""
    from_child, to_parent = os.pipe()
    process = os.fork()
    if process == 0:
        status = 4
        try:
            os.close(from_child)
            say.pipe = to_parent  # type: ignore[attr-defined]
            storage._looked.clear()  # as a process of its own
            work()
            status = 0
        except (OSError, PrefixFileError, SweepError, OutputError) as error:
            status = 4 if "\n" in str(error) or "Error(" in str(error) else 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(to_parent)
    found = Child(process, from_child)
    try:
        yield found
    finally:
        found.stop()
        found.status()
        os.close(from_child)


def say(number: int) -> None:
    """To the parent: this number is saved."""
    os.write(say.pipe, number.to_bytes(4, "little"))  # type: ignore[attr-defined]


def look(campaign: Campaign, family: str, target: Target, folder: Path, saved: int, what: str) -> None:
    """Note what lies in a folder in which `saved` was the last number that was said to be saved."""
    try:
        found = target.load(folder)
    except FileNotFoundError as error:
        return campaign.note(family, "lost", f"{what}: {error}")
    except (PrefixFileError, SweepError) as error:
        return campaign.note(family, "unreadable", f"{what}: {error}")
    except Exception as error:
        return campaign.note(family, "traceback", f"{what}: {type(error).__name__}: {error}")
    if found < saved:
        return campaign.note(family, "lost", f"{what}: {found} lies there, {saved} was saved")
    with child(lambda: target.save(folder, found + 1)) as after:
        if after.status():
            return campaign.note(family, "traceback", f"{what}: the next save ended with {after.status()}")
    if any(TEMPORARY.fullmatch(path.name) for path in folder.rglob("*")):
        return campaign.note(family, "leftover", what)
    campaign.note(family, "as before" if found == saved else "as meant")


def kill(campaign: Campaign, target: Target, folder: Path) -> None:
    """A process that saves without end is killed at a random moment."""
    target.save(folder, 1)

    def work() -> None:
        for number in range(2, 1 << 30):
            target.save(folder, number)
            say(number)

    with child(work) as killed:
        time.sleep(campaign.random.uniform(0, 0.03))
        killed.stop()
        saved = killed.saved()
    look(campaign, "kill", target, folder, saved, target.name)


def call(campaign: Campaign, target: Target, folder: Path, number: int, error: int | None) -> bool:
    """The call of this number fails, or the process is killed there (None); returns whether there are so many."""
    family = "call" if error is None else "error"
    target.save(folder, 1)

    def work() -> None:
        campaign.faults.torture_fail(number, error or 0)
        target.save(folder, 2)
        enough = campaign.faults.torture_calls()
        campaign.faults.torture_fail(-1, 0)
        say(2 if enough > number else 0)

    with child(work) as failing:
        saved, status = failing.saved(), failing.status()
    if saved == 0:
        return False
    if status == 4:
        campaign.note(family, "traceback", f"{target.name}, call {number}: {error}")
        return True
    look(campaign, family, target, folder, saved, f"{target.name}, call {number}, {error and os.strerror(error)}")
    return True


def writers(campaign: Campaign, target: Target, folder: Path, count: int) -> None:
    """Several processes save at once, and a reader finds a whole file each time."""
    target.save(folder, 1)

    def work(first: int) -> None:
        for number in range(first, first + 5):
            target.save(folder, number)

    def read() -> None:
        for _ in range(10):
            target.load(folder)

    works = [*(partial(work, 2 + 5 * index) for index in range(count)), read]
    with ExitStack() as stack:
        statuses = [each.status() for each in [stack.enter_context(child(one)) for one in works]]
    family = "writers"
    if any(statuses):
        campaign.note(family, "unreadable" if statuses[-1] else "traceback", f"{target.name}: {count}: {statuses}")
    else:
        look(campaign, family, target, folder, 2, f"{target.name}, {count} writers")


def damage(campaign: Campaign, target: Target, folder: Path, places: int) -> None:
    """Bytes of each file changed, and the file cut off; peft's have no checksum."""
    target.save(folder, 7)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        whole = path.read_bytes()
        step = max(1, min(1000, len(whole) // places))
        for place in range(0, len(whole), step):
            for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xA5]) + whole[place + 1 :]):
                path.unlink()
                path.write_bytes(content)
                what = f"{target.name}: {path.name} at {place}"
                attempt(campaign, "damage", what, lambda: target.load(folder), checked=target.name != "peft")
        path.write_bytes(whole)


def attempt(campaign: Campaign, family: str, what: str, work: Callable[[], object], checked: bool = True) -> None:
    """A read that may succeed, or fail in one sentence; where there is a checksum, not with other values."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except (PrefixFileError, SweepError, OutputError) as error:
        campaign.note(family, "traceback" if "\n" in str(error) else "refused in a sentence", f"{what}: {error}")
    except OtherValues as error:
        campaign.note(family, "unreadable" if checked else "read with other values", f"{what}: {error}")
    except Exception as error:
        campaign.note(family, "traceback", f"{what}: {type(error).__name__}: {error}")
    else:
        campaign.note(family, "read")


def headers(campaign: Campaign, folder: Path, count: int) -> None:
    """Random hostile values in the description and in the header of an adapter."""
    chance = campaign.random
    description, tensors = campaign.prefix.parts()
    wrong = (None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, "x", "../../x", [], [[]], [None], {}, {"x": 1}, [0] * 1000)
    shapes = ([1 << 40], [1 << 62, 1 << 62], [-1], [10**30], "x", None, [], [0])
    for _ in range(count):
        if chance.random() < 0.5:
            own = json.loads(json.dumps(description))
            where = chance.choice([own, own["metadata"], own["metadata"]["settings"]])
            where[chance.choice([*where, "lora", "prompt", "offsets", "demonstrations", "new"])] = chance.choice(wrong)
            write_file(folder / "adapter.safetensors", "adapter", own, tensors)
        else:
            entry = {"dtype": chance.choice(["F32", "F64", "I8", "X", None]), "shape": chance.choice(shapes)}
            entry["data_offsets"] = chance.choice([[0, 8], [8, 0], [0, 1 << 60], [-8, 0], None, [0]])
            text = json.dumps({"keys.0": entry, **({"__metadata__": chance.choice(wrong)})}).encode()
            length = chance.choice([len(text), len(text) + 9, 1 << 62, 0])
            atomic_write_bytes(folder / "adapter.safetensors", length.to_bytes(8, "little") + text + bytes(8))
        attempt(campaign, "header", "adapter", lambda: Adapter.from_pretrained(folder, campaign.model))


@contextmanager
def mounted(folder: Path) -> Iterator[Path | None]:
    """A file system of 4 MB; None where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full(campaign: Campaign, disk: Path, target: Target, room: int) -> None:
    """A save on a full disk, with so many bytes left."""
    folder = disk / target.name
    shutil.rmtree(folder, ignore_errors=True)
    target.save(folder, 1)
    ballast = disk / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    with open(ballast, "r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - room))

    def work() -> None:
        target.save(folder, 2)
        say(2)

    with child(work) as failing:
        saved, status = failing.saved(), failing.status()
    ballast.unlink()
    if status == 4:
        campaign.note("full", "traceback", target.name)
    else:
        look(campaign, "full", target, folder, saved, f"{target.name}, {room} bytes left")


def read_only(campaign: Campaign, disk: Path, target: Target) -> None:
    """A save on a file system that cannot be written to."""
    folder = disk / target.name
    shutil.rmtree(folder, ignore_errors=True)
    target.save(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        with child(lambda: target.save(folder, 2)) as refused:
            status = refused.status()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    if status != 3:
        campaign.note("read-only", "traceback", f"{target.name}: status {status}")
    else:
        look(campaign, "read-only", target, folder, 1, target.name)


def tune(campaign: Campaign, files: Path, folder: Path, whole: list[torch.Tensor], how: signal.Signals) -> None:
    """A run is stopped at a random moment, and resumed: the bits of one that was not."""
    arguments = tune_arguments(files, folder)

    def work(more: list[str]) -> None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os._exit(cli.run([*arguments, *more]))

    with child(partial(work, [])) as stopped:
        time.sleep(campaign.random.uniform(0, 0.5))
        stopped.stop(how)
        status = stopped.status()
    if status not in (0, 143, -how):
        return campaign.note("tune", "traceback", f"{how.name}: status {status}")
    with child(partial(work, ["--resume"])) as resumed:
        status = resumed.status()
    if status:
        return campaign.note("tune", "unreadable", f"{how.name}: resumed with status {status}")
    found = list(KVPrefix.from_pretrained(folder / "prefix").parameters())
    same = all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    campaign.note("tune", "as meant" if same else "lost", how.name)


def tune_arguments(files: Path, out: Path) -> list[str]:
    own = ["--model", f"{files}/model", "--train", f"{files}/train.jsonl", "--out", str(out)]
    return ["tune", *own, "--epochs", "12", "--checkpoint-every", "2", "--threads", "1"]


def run(campaign: Campaign, events: int) -> None:
    """The families in turn; about half of the events are kills and errors."""
    folder, chance = campaign.folder, campaign.random
    kinds = targets(campaign.prefix, campaign.model)
    fresh = iter(range(1 << 30))

    def new() -> Path:
        path = folder / str(next(fresh))
        path.mkdir()
        return path

    for target in kinds:
        for number in range(1000):
            if not call(campaign, target, new(), number, None):
                break
        for error in ERRORS:
            for number in range(1000):
                if not call(campaign, target, new(), number, error):
                    break
        damage(campaign, target, new(), 25)
        print(target.name, {name: dict(count) for name, count in campaign.counts.items()}, flush=True)
    for count in [2, 6] * (events // 50):
        writers(campaign, chance.choice(kinds), new(), count)
    with mounted(folder / "disk") as disk:
        for target in kinds * (events // 100) if disk else ():
            full(campaign, disk, target, chance.choice([0, 0, 4096, 8192, 16384]))
        for target in kinds * 2 if disk else ():
            read_only(campaign, disk, target)
    headers(campaign, new(), events // 10)
    files = new()
    make_model("llama", torch.float32).save_pretrained(files / "model")
    char_tokenizer().save_pretrained(files / "model")
    write_jsonl(files / "train.jsonl", DEMONSTRATIONS)
    run_whole = new() / "run"
    assert cli.run(tune_arguments(files, run_whole)) == 0
    whole = list(KVPrefix.from_pretrained(run_whole / "prefix").parameters())
    for how in [signal.SIGKILL, signal.SIGTERM] * (events // 100):
        tune(campaign, files, new() / "run", whole, how)
    for _ in range(events // 4):
        kill(campaign, chance.choice(kinds), new())
    while campaign.total() < events:
        kill(campaign, chance.choice(kinds), new())


def report(campaign: Campaign, seed: int, seconds: float) -> tuple[dict[str, Any], str]:
    """The counts, as a record and as Markdown."""
    outcomes = sorted({outcome for count in campaign.counts.values() for outcome in count} | set(BAD))
    record = {
        "events": campaign.total(),
        "seed": seed,
        "seconds": round(seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "counts": {family: dict(count) for family, count in campaign.counts.items()},
        "examples": campaign.examples,
    }
    rows = [
        f"| {family} | {count.total()} | " + " | ".join(str(count[outcome] or "") for outcome in outcomes) + " |"
        for family, count in campaign.counts.items()
    ]
    bad = sum(count[outcome] for count in campaign.counts.values() for outcome in BAD)
    head = (
        f"# Files under attack\n\n`make torture SEED={seed}`: {campaign.total()} events; lost, unreadable, with a "
        f"traceback or a leftover: {bad}. What the families are: `tools/torture/__main__.py`.\n\n"
    )
    table = f"| family | events | {' | '.join(outcomes)} |\n|{' --- |' * (2 + len(outcomes))}\n" + "\n".join(rows)
    return record, f"{head}{table}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--events", type=int, default=1000, help="how many at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the report")
    options = parser.parse_args()
    library = loaded_first()
    torch.set_num_threads(1)
    model, started = make_model("llama", torch.float32), time.monotonic()
    prefix = KVPrefix.from_tokens(model, tokens(6), torch.tensor([0, 2, 6]))
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(random.Random(options.seed), Path(folder), library, model, prefix)
        run(campaign, options.events)
    record, text = report(campaign, options.seed, time.monotonic() - started)
    atomic_write_json(options.out / "torture.json", record)
    atomic_write_bytes(options.out / "torture.md", text.encode())
    print(text)
    return int(bool(campaign.examples))


def loaded_first() -> ctypes.CDLL:
    """`faults.c`, loaded before the C library; starts this program anew if it is not."""
    library = Path(tempfile.gettempdir()) / f"ctkernels-faults-{os.getuid()}-{os.getpid()}.so"
    if LOADED not in os.environ:
        compile_it = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "faults.c"), "-ldl"]
        subprocess.run(compile_it, check=True)
        os.environ.update({"LD_PRELOAD": str(library), LOADED: str(library)})
        os.execv(sys.executable, [sys.executable, "-m", "tools.torture", *sys.argv[1:]])
    found = ctypes.CDLL(os.environ.pop(LOADED))
    Path(os.environ.pop("LD_PRELOAD")).unlink()
    return found


if __name__ == "__main__":
    sys.exit(main())
