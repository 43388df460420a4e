#!/usr/bin/env python3
"""Serving engines: demonstrations in the prompt, an engine's own prefix cache, our prefix through its connector.

    python benchmarks/bench_engines.py --python .venv-vllm/bin/python --model .models/smollm2-135m

One way for each cell of P (tokens of demonstrations) and the number of requests at once:

    in the prompt          vLLM, the demonstrations in front of every request, its prefix cache off
    engine's own cache     the same with its prefix cache on, which has seen the demonstrations before
    connector              our prefix, vLLM's prefix cache on: it keeps the prefix's whole blocks, the rest is loaded
    connector, each time   our prefix, vLLM's prefix cache off: every request loads all of it
    our server             `PrefixStore` in a server of this package, where `--own-server` names its command

Requests have rows of their own, so that no cache knows them. Time to the first token of a request, and tokens per
second of all. A cell that is in the results file is not measured again. Accuracy of demonstrations in the prompt and of
a prefix tuned from them stands beside (`--accuracy`), through the same engine.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks import harness
from benchmarks.bench_tuning import TASK, draw_out
from benchmarks.engine import Engine
from benchmarks.harness import Spread
from ctkernels.tuning import KVPrefix, PrefixStore, encode_context, encode_prompt, get_method, load_jsonl, tune
from ctkernels.tuning.storage import atomic_write_bytes

ROW = 16  # tokens of a request behind the demonstrations
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Way:
    """How requests are answered. caching: vLLM's prefix cache.  stored: behind a stored prefix.  own: our server."""

    name: str
    caching: bool
    stored: bool
    own: bool = False


WAYS = (
    Way("in the prompt", caching=False, stored=False),
    Way("connector, each time", caching=False, stored=True),
    Way("engine's own cache", caching=True, stored=False),
    Way("connector", caching=True, stored=True),
    Way("our server", caching=False, stored=True, own=True),
)


class Cells:
    """What was measured, by way, P and number of requests at once; kept in a file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._record = path, {"settings": settings, "cells": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if before["settings"] != settings:
                raise SystemExit(f"{path} holds cells of other settings, {before['settings']}: choose another --out")
            self._record = before

    @property
    def found(self) -> dict[str, Any]:
        """The cells, by name."""
        return self._record["cells"]

    def add(self, name: str, cell: dict[str, Any]) -> None:
        """Keep a cell."""
        self.found[name] = cell
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self._path, (json.dumps(self._record, indent=1) + "\n").encode())
        print(name, cell, flush=True)


def name_of(way: Way, length: int, at_once: int) -> str:
    """A cell's name."""
    return f"{way.name} | {length} | {at_once}"


def measure(
    engine: Engine, way: Way, context: Sequence[int], at_once: int, requests: int, new_tokens: int, vocabulary: int
) -> dict[str, Any]:
    """One cell."""
    drawn = random.Random(f"{way.name} {len(context)} {at_once}")
    model = f"base:{len(context)}" if way.stored else "base"
    front = [] if way.stored else list(context)

    def one(_: int) -> tuple[float, float]:
        row = [drawn.randrange(vocabulary // 2, vocabulary) for _ in range(ROW)]
        fields = {"prompt": [*front, *row], "max_tokens": new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        moments = list(engine.stream(model, **fields))
        return moments[0] - started, moments[-1] - started

    one(0)  # warms up, and puts the demonstrations into the engine's cache where it has one
    with ThreadPoolExecutor(at_once) as pool:
        started = time.perf_counter()
        times = list(pool.map(one, range(requests)))
        seconds = time.perf_counter() - started
    return {
        "requests": requests,
        "first": vars(Spread.of([first for first, _ in times])),
        "answer": vars(Spread.of([answer for _, answer in times])),
        "tokens_per_second": requests * new_tokens / seconds,
    }


def accuracy(
    engine: Engine, way: Way, context: Sequence[int], rows: Sequence[Sequence[int]], outputs: Sequence[str]
) -> float:
    """The share of answers that begin with the output, greedy."""

    def right(pair: tuple[Sequence[int], str]) -> bool:
        row, output = pair
        model = f"base:{ACCURACY}" if way.stored else "base"
        prompt = [*([] if way.stored else context), *row]
        answer = engine.complete(model, prompt=prompt, max_tokens=6)["choices"][0]["text"]
        return answer.strip().startswith(output.strip())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(right, zip(rows, outputs, strict=True)))
    return sum(found) / len(found)


def markdown(cells: dict[str, Any], lengths: Sequence[int], at_once: Sequence[int], new_tokens: int) -> str:
    """The tables."""
    rows = []
    for length in lengths:
        for count in at_once:
            for way in WAYS:
                cell = cells.get(name_of(way, length, count))
                if cell is not None:
                    first, answer = (harness.milliseconds(Spread(**cell[key])) for key in ("first", "answer"))
                    rows.append([str(length), str(count), way.name, first, answer, f"{cell['tokens_per_second']:.1f}"])
    header = ["P", "at once", "way", "first token ms", f"{new_tokens} tokens ms", "tokens/s"]
    text = f"Rows of {ROW} tokens, greedy answers of {new_tokens}. Medians and quartiles over requests.\n\n"
    text += harness.table(header, rows)
    scores = {way.name: cells[f"{ACCURACY} | {way.name}"] for way in WAYS if f"{ACCURACY} | {way.name}" in cells}
    if scores:
        lines = [[name, str(cell["P"]), f"{cell['accuracy']:.3f}", str(cell["items"])] for name, cell in scores.items()]
        text += "\n\nAccuracy on the shipped task, first word of greedy answers: demonstrations in the prompt, and the "
        text += f"prefix that ct-kv tuned from them.\n\n{harness.table(['way', 'P', 'accuracy', 'items'], lines)}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment that has vLLM")
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--lengths", type=int, nargs="+", default=[400, 1000, 4000], help="P")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--rounds", type=int, default=4, help="requests of a cell, as a multiple of those at once")
    parser.add_argument("--least", type=int, default=12, help="least requests of a cell")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv-space", default="4", help="GiB of the engine's cache")
    parser.add_argument("--accuracy", action="store_true", help="also tune a prefix and score it; minutes")
    parser.add_argument("--own-server", help="command of our server, with {model}, {store} and {port}")
    args = parser.parse_args(argv)
    harness.prepare(args)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    machine = {**harness.describe_machine("cpu"), "model": args.model, "dtype": args.dtype}
    print(harness.machine_line(machine), flush=True)

    train, test = load_jsonl(TASK / "train.jsonl"), load_jsonl(TASK / "test.jsonl")
    cells = Cells(
        args.out / "bench_engines.json", {"model": args.model, "dtype": args.dtype, "new_tokens": args.new_tokens}
    )
    with tempfile.TemporaryDirectory() as folder:
        store, contexts = PrefixStore(folder, model), {}
        for length in args.lengths:
            pairs = draw_out(tokenizer, train, [item.input for item in test], length)
            contexts[length] = encode_context(tokenizer, pairs).input_ids[:length]
            store.put(str(length), KVPrefix.from_tokens(model, contexts[length], torch.tensor([length])))
        shots = encode_context(tokenizer, train).input_ids.tolist()
        if args.accuracy and any(f"{ACCURACY} | {way.name}" not in cells.found for way in WAYS if not way.own):
            store.put(ACCURACY, tune(model, tokenizer, train, "ct-kv", get_method("ct-kv").settings()).prefix)
        rows, outputs = [encode_prompt(tokenizer, item.input) for item in test], [item.output for item in test]
        vocabulary = min(len(tokenizer), model.config.vocab_size)
        del model
        for caching, own in ((False, False), (True, False), (False, True)):
            ways = [way for way in WAYS if (way.caching, way.own) == (caching, own)]
            wanted = [
                (way, length, count)
                for length in args.lengths
                for count in args.at_once
                for way in ways
                if name_of(way, length, count) not in cells.found
            ]
            scored = [way for way in ways if args.accuracy and f"{ACCURACY} | {way.name}" not in cells.found]
            if (own and args.own_server is None) or not (wanted or scored):
                continue
            with start(args, Path(folder), caching, own) as engine:
                for way, length, count in wanted:
                    requests = max(args.least, args.rounds * count)
                    context = contexts[length].tolist()
                    cell = measure(engine, way, context, count, requests, args.new_tokens, vocabulary)
                    cells.add(name_of(way, length, count), cell)
                for way in scored:
                    share = accuracy(engine, way, shots, rows, outputs)
                    cells.add(f"{ACCURACY} | {way.name}", {"accuracy": share, "items": len(rows), "P": len(shots)})
    text = harness.report_text(machine, markdown(cells.found, args.lengths, args.at_once, args.new_tokens))
    atomic_write_bytes(args.out / "bench_engines.md", f"{text}\n".encode())
    print(f"\n{text}\n\nwrote {args.out}/bench_engines.json and bench_engines.md")


def start(args: Any, store: Path, caching: bool, own: bool) -> Engine:
    """An engine that is not running yet, with the prefixes of a store."""
    log, threads = Path("runs/bench-engines/engine.log"), torch.get_num_threads()
    if own:
        return Engine(args.python, args.model, store, log, command=shlex.split(args.own_server))
    most = str(max(args.lengths) + ROW + args.new_tokens + 64)
    options = ["--dtype", args.dtype, "--max-model-len", most, "--max-num-seqs", str(max(args.at_once))]
    options += ["--enable-prefix-caching" if caching else "--no-enable-prefix-caching"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": args.kv_space, "OMP_NUM_THREADS": str(threads)}
    return Engine(args.python, args.model, store, log, options=options, environment=environment)


if __name__ == "__main__":
    main()
