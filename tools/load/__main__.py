#!/usr/bin/env python3
"""`ctkernels serve` under load: `make serve-load`, or  python -m tools.load --model FOLDER [--minutes 5] [--clients 64]

A server in a process of its own, started as a user starts it, with prefixes of several lengths. Clients ask at random,
with prefixes and without, and a part of them leaves in mid-stream. The report says:

    wrong         answers other than those of `generate` with the prefix alone (fp32; where two tokens are nearly as
                  probable, a request is not in the pool)
    unfinished    requests without an end, and rows or requests that remain when all clients have gone
    failed        errors other than status 429, which is counted as refused
    memory        resident memory of the server while it runs
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ctkernels.tuning import KVPrefix, PrefixStore, load_jsonl
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
from tools.load.clients import OUTCOMES, Found, Known, campaign

TASK = Path(__file__).parents[2] / "examples" / "tasks" / "support-routing"
CLEAR = 1e-2  # least difference between the two largest logits of every token of an answer
GROWTH = 0.03  # most growth of the memory, as a part of it
WARM = 0.25  # part of the time after which memory should not grow


def build_pool(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: PrefixStore, name: str, count: int
) -> tuple[list[Known], int]:
    """`count` requests with their answers, and how many were left out."""
    chance, texts = random.Random(0), [item.input for item in load_jsonl(TASK / "test.jsonl")]
    nothing = KVPrefix.from_tokens(model, torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    prefixes = {name: nothing, **{f"{name}:{prefix}": store.get(prefix) for prefix in store}}
    ends = tokenizer.eos_token_id
    pool: list[Known] = []
    left_out = 0
    while len(pool) < count:
        served, length = chance.choice(list(prefixes)), chance.randint(1, 24)
        ids = torch.tensor([tokenizer(f" {chance.choice(texts)} ", add_special_tokens=False).input_ids])
        with prefixes[served].attach(model):
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=length,
                pad_token_id=ends,
                output_logits=True,
                return_dict_in_generate=True,
            )
        best = torch.cat(output.logits).topk(2).values
        if float((best[:, 0] - best[:, 1]).min()) < CLEAR:
            left_out += 1
            continue
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        pool.append(Known(served, tuple(ids[0].tolist()), length, text, len(tokens)))
    return pool, left_out


@contextlib.contextmanager
def server(model: str, store: Path, rows: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """`ctkernels serve` and its address; at the end SIGTERM, on which it must end with status 0."""
    command = [sys.executable, "-m", "ctkernels", "serve", "--model", model, "--store", str(store), "--name", "model"]
    command += ["--port", "0", "--rows", str(rows), "--queue", "40", "--dtype", "float32", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
        if status != 0:
            raise SystemExit(f"the server ended with status {status}")
    finally:
        process.kill()
        process.wait()


class Memory(threading.Thread):
    """Resident memory of a process, bytes, every second. (Its time, too, belongs to the load.)"""

    def __init__(self, number: int) -> None:
        super().__init__(daemon=True)
        self.sizes: list[int] = []
        self._process, self._ended = psutil.Process(number), threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1):
            self.sizes.append(self._process.memory_info().rss)

    def end(self) -> dict[str, float]:
        """What was seen, in MB; growth is from the quarter after `WARM` to the last one, of their medians."""
        self._ended.set()
        self.join()
        warm = self.sizes[int(WARM * len(self.sizes)) :]
        part = max(1, len(warm) // 3)
        early, late = statistics.median(warm[:part]), statistics.median(warm[-part:])
        return {"early": early / 1e6, "late": late / 1e6, "most": max(self.sizes) / 1e6, "growth": late / early - 1}


def report(record: dict[str, Any], found: Found) -> str:
    """The report as Markdown."""
    memory, outcomes = record["memory"], record["outcomes"]
    rows = [f"| {outcome} | {outcomes[outcome]} |" for outcome in OUTCOMES]
    examples = "".join(f"\n- {example}" for example in found.examples)
    minutes = f"{record['minutes']:g}"
    about = f"Pool of {record['pool']} requests; {record['left_out']} more had two nearly equal logits"
    return (
        f"# Our own server under load\n\n`make serve-load MINUTES={minutes}`: {record['clients']} clients at once for "
        f"{minutes} min, {record['rows']} rows, {record['prefixes']} prefixes and the model "
        f"without one; {sum(outcomes.values())} requests, {record['tokens']} tokens in whole answers. "
        f"{'Passed' if record['passed'] else 'FAILED'}. What is counted: `tools/load/__main__.py`.\n\n"
        f"| outcome | requests |\n| --- | --- |\n" + "\n".join(rows) + "\n\n"
        f"Memory of the server: {memory['early']:.0f} MB early, {memory['late']:.0f} MB at the end "
        f"({memory['growth']:+.1%}), {memory['most']:.0f} MB at most. {about}. torch {record['torch']}, "
        f"{record['system']}.\n{examples}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--pool", type=int, default=100, help="different requests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    train = load_jsonl(TASK / "train.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder, model)
        for number, count in enumerate((2, 5, 9, 16)):
            store.put(f"task {number}", KVPrefix.from_demonstrations(model, tokenizer, train[:count]))
        pool, left_out = build_pool(model, tokenizer, store, "model", options.pool)
        prefixes = len(store)
        del model
        print(f"{len(pool)} requests in the pool", flush=True)
        with server(options.model, Path(folder), options.rows) as (process, address):
            memory = Memory(process.pid)
            memory.start()
            started = time.monotonic()
            found = asyncio.run(campaign(address, pool, options.clients, 60 * options.minutes))
            seconds, sizes = time.monotonic() - started, memory.end()
    record: dict[str, Any] = {
        "minutes": options.minutes,
        "seconds": round(seconds),
        "clients": options.clients,
        "rows": options.rows,
        "prefixes": prefixes,
        "pool": len(pool),
        "left_out": left_out,
        "memory": sizes,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "system": platform.system(),
        **found.record(),
    }
    record["passed"] = not found.bad and sizes["growth"] < GROWTH
    atomic_write_json(options.out / "serve_load.json", record)
    atomic_write_bytes(options.out / "serve_load.md", (text := report(record, found)).encode())
    print(text)
    return int(not record["passed"])


if __name__ == "__main__":
    sys.exit(main())
