"""The campaign: every event in a row and at random, and its report."""

from __future__ import annotations

import argparse
import platform
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import KVPrefix
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
from tools.torture import events
from tools.torture.events import BAD, ERRORS, Campaign, Runs
from tools.torture.preload import Faults
from tools.torture.targets import Target, targets

MEMORY = Path("/dev/shm")  # flushing thousands of files to a disk takes minutes, and a kill loses no page of a file


def run(campaign: Campaign, kinds: list[Target], count: int) -> None:
    """Every system call and every place in a file once for each kind of file, then `count` events chosen at random."""
    for target in kinds:
        for error in (0, *ERRORS):
            events.calls(campaign, target, error)
        events.reads(campaign, target)
        events.damage(campaign, target, 25)
        print(f"{target.name}: {campaign.total()} events", flush=True)
    if not count:
        return
    chance, runs = campaign.random, Runs(campaign)
    with events.small_disk(campaign) as disk:
        on_disk: list[tuple[float, Callable[[], None]]] = []
        if disk is not None:
            on_disk = [
                (4, lambda: events.full(campaign, disk, chance.choice(kinds), 4096 * chance.choice([0, 0, 1, 2, 4]))),
                (1, lambda: events.read_only(campaign, disk, chance.choice(kinds))),
                (0.5, lambda: runs.full(disk, 4096 * chance.randrange(16))),
            ]
        at_random: list[tuple[float, Callable[[], None]]] = [
            (8, lambda: events.kill(campaign, chance.choice(kinds))),
            (1, lambda: events.writers(campaign, chance.choice(kinds), 2)),
            (1, lambda: events.writers(campaign, chance.choice(kinds), 6)),
            (4, lambda: events.header(campaign)),
            (0.5, lambda: runs.stopped(signal.SIGKILL)),
            (0.5, lambda: runs.stopped(signal.SIGTERM)),
            (0.5, lambda: runs.two()),
            *on_disk,
        ]
        weights, works = zip(*at_random, strict=True)
        for work in chance.choices(works, weights, k=count):
            work()


def report(campaign: Campaign, seed: int, count: int, seconds: float) -> tuple[dict[str, Any], str]:
    """The counts, as a record and as Markdown."""
    outcomes = sorted({outcome for found in campaign.counts.values() for outcome in found} - set(BAD)) + list(BAD)
    record = {
        "events": campaign.total(),
        "seed": seed,
        "seconds": round(seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "counts": {family: dict(found) for family, found in campaign.counts.items()},
        "examples": campaign.examples,
    }
    rows = [
        f"| {family} | {found.total()} | " + " | ".join(str(found[outcome]) for outcome in outcomes) + " |"
        for family, found in campaign.counts.items()
    ]
    bad = sum(found[outcome] for found in campaign.counts.values() for outcome in BAD)
    head = (
        f"# Files under attack\n\n`make torture EVENTS={count} SEED={seed}`: {campaign.total()} events, of which "
        f"{bad} lost a file, left an unreadable one or a temporary one, or ended with a traceback. What the families "
        "are: `tools/torture/__main__.py`. Cells of a sweep and files in peft's format have no checksum: a changed "
        "byte may be read with other values.\n\n"
    )
    table = f"| family | events | {' | '.join(outcomes)} |\n|{' --- |' * (2 + len(outcomes))}\n" + "\n".join(rows)
    return record, f"{head}{table}\n"


def main(faults: Faults) -> int:
    parser = argparse.ArgumentParser(description="Files under attack: `make torture`")
    parser.add_argument("--events", type=int, default=1000, help="how many at random, beside those in a row")
    parser.add_argument("--kinds", nargs="+", help="kinds of files (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    options = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    model = make_model("llama", torch.float32)
    prefix = KVPrefix.from_tokens(model, tokens(6), torch.tensor([0, 2, 6]))
    kinds = [kind for kind in targets(prefix, model) if options.kinds is None or kind.name in options.kinds]
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        campaign = Campaign(random.Random(options.seed), Path(folder), faults, model, prefix)
        run(campaign, kinds, options.events)
    record, text = report(campaign, options.seed, options.events, time.monotonic() - started)
    atomic_write_json(options.out / "torture.json", record)
    atomic_write_bytes(options.out / "torture.md", text.encode())
    print(text)
    return int(bool(campaign.examples))
