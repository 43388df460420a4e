#!/usr/bin/env python3
"""vLLM's server with stored prefixes against `generate()`: `make serve-check`

    tokens   64 requests behind two prefixes, 8 at a time
    many     100 prefixes, one request each, in one continuous batch; memory for a fifth of them
    salts    300 requests at random: four prefixes over the same token ids, plain prompts of these ids, clients' salts,
             vLLM's prefix cache on, 8 at a time
    kill     the server is killed while it answers, and started again; prefixes are replaced and removed under it
    preempt  48 blocks of cache for 10 long answers that need 80: vLLM preempts requests and schedules them anew

Models, prefixes and the engine are in fp32. The report goes to serve_check.json and serve_check.md; cases that are not
asked for stay as they are there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_tuning import draw_out
from benchmarks.engine import Engine, EngineError
from ctkernels.tuning import KVPrefix, encode_prompt, get_method, load_jsonl, tune
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
from tools.serving.reference import MARGIN, Reference, Request, Verdict

TASK = Path(__file__).parents[2] / "examples/tasks/support-routing"
MODELS = (
    ".models/smollm2-135m",
    ".models/qwen2.5-coder-0.5b/qwen2.5-coder-0.5b",
    ".models/gemma3-270m/gemma3-270m",
)
CASES = ("tokens", "many", "salts", "kill", "preempt")
ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32")
NEW_TOKENS = 8


@dataclass
class Bench:
    """What the cases of one model share.

    rows: tokens of inputs.  base: the prefix that all others are made of.
    """

    reference: Reference
    engine: Callable[..., Engine]
    rows: list[tuple[int, ...]]
    base: KVPrefix

    def asked(self, engine: Engine, requests: Sequence[Request], at_once: int, **fields: Any) -> list[tuple[int, ...]]:
        """The engine's tokens, `at_once` requests at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda request: ask(engine, request, **fields), requests))


def ask(engine: Engine, request: Request, **fields: Any) -> tuple[int, ...]:
    """The engine's tokens for one request."""
    model = "base" if request.prefix is None else f"base:{request.prefix}"
    answer = engine.complete(model, prompt=list(request.row), max_tokens=request.new_tokens, **fields)
    return tuple(answer["choices"][0]["token_ids"])


def tokens(bench: Bench, engine: Engine) -> dict[str, Any]:
    """64 requests behind two prefixes."""
    requests = [Request(f"noise/{n % 2}", row, NEW_TOKENS) for n, row in enumerate(bench.rows[:64])]
    expected = bench.reference.generate(requests)
    some = [Request(None, (*bench.base.context, *request.row), NEW_TOKENS) for request in requests[:8]]
    plain = bench.reference.generate(some)  # the context in words: a prefix that was not loaded would answer this
    verdict = bench.reference.judge(requests, expected, bench.asked(engine, requests, 8))
    differ = sum(a != b for a, b in zip(expected, plain, strict=False))
    return {**asdict(verdict), "of_8_unlike_plain": differ, "ok": not verdict.wrong and differ > 0}


def many(bench: Bench, engine: Engine) -> dict[str, Any]:
    """100 prefixes in one continuous batch."""
    requests = [Request(f"noise/{n}", bench.rows[n % 50], 24) for n in range(100)]
    expected = bench.reference.generate(requests)
    most = 0.0
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(bench.asked, engine, requests, 100)
        while not answers.done():
            most = max(most, engine.metric("vllm:num_requests_running"))
            time.sleep(0.2)
    verdict = bench.reference.judge(requests, expected, answers.result())
    counts = {"running_at_once": int(most), "different": len(set(expected))}
    return {**asdict(verdict), **counts, "ok": not verdict.wrong and most >= 64}


def salts(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Prefixes, plain prompts and clients' salts at random over the same token ids."""
    chance = random.Random(0)
    rows, sources = bench.rows[:12], [None, *(f"noise/{n}" for n in range(4))]
    kinds = [Request(s, row if s else (*bench.base.context, *row), NEW_TOKENS) for s in sources for row in rows]
    expected = dict(zip(kinds, bench.reference.generate(kinds), strict=True))
    drawn = [(chance.choice(kinds), chance.choice((None, None, "x", "a:b"))) for _ in range(300)]

    def one(choice: tuple[Request, str | None]) -> tuple[int, ...]:
        request, salt = choice
        return ask(engine, request, **({} if salt is None else {"cache_salt": salt}))

    before = engine.metric("vllm:prefix_cache_hits_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, drawn))
    hits = engine.metric("vllm:prefix_cache_hits_total") - before
    requests = [request for request, _ in drawn]
    verdict = bench.reference.judge(requests, [expected[request] for request in requests], answers)
    per_row = [len({expected[kind] for kind in kinds if kind.row[-len(row) :] == row}) for row in rows]
    return {
        **asdict(verdict),
        "cached_tokens_hit": int(hits),
        "answers_per_row": sum(per_row) / len(per_row),
        "ok": not verdict.wrong and hits > 0 and max(per_row) > 2,
    }


def kill(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Killed while it answers; a prefix replaced, one removed, one removed behind a request that waits."""
    requests = [Request(f"noise/{n % 3}", row, NEW_TOKENS) for n, row in enumerate(bench.rows[:16])]
    expected = bench.reference.generate(requests)
    lost = 0

    def without_answer(request: Request) -> bool:
        with contextlib.suppress(EngineError, OSError):
            ask(engine, request)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(without_answer, Request(r.prefix, r.row, 200)) for r in requests]
        while engine.metric("vllm:num_requests_running") < 4:
            time.sleep(0.05)
        engine.kill()
        lost = sum(one.result() for one in running)
    # few places, so that a request can wait; no memory, so that each load reads the file
    with bench.engine(["--memory-gib", "0"], ["--max-num-seqs", "8"]) as again:
        verdict = bench.reference.judge(requests, expected, bench.asked(again, requests, 8))
        bench.reference.noised("noise/0", bench.base, seed=1000)
        after = bench.reference.generate(requests)
        replaced = bench.reference.judge(requests, after, bench.asked(again, requests, 8))
        bench.reference.store.put("gone", bench.reference.store.get("noise/1"))
        missing, waiting = _gone(bench, again)
        alive = bench.reference.judge(requests, after, bench.asked(again, requests, 8))
    wrong = [*verdict.wrong, *replaced.wrong, *alive.wrong]
    ok = not wrong and lost > 0 and missing[0] == 404 and waiting[0] == 500 and "could not be loaded" in waiting[1]
    total = Verdict(
        3 * len(requests),
        verdict.equal + replaced.equal + alive.equal,
        verdict.ties + replaced.ties + alive.ties,
        wrong,
        max(verdict.margin, replaced.margin, alive.margin),
    )
    return {**asdict(total), "lost_by_the_kill": lost, "missing": missing, "removed_while_waiting": waiting, "ok": ok}


def _gone(bench: Bench, engine: Engine) -> tuple[list[Any], list[Any]]:
    """The errors of a request for a prefix that is not there, and of one whose prefix goes while the request waits."""

    def error_of(model: str) -> list[Any]:
        try:
            engine.complete(model, prompt=list(bench.rows[0]), max_tokens=2)
        except EngineError as error:
            return [error.status, json.loads(str(error))["error"]["message"]]
        return [200, "answered"]

    with ThreadPoolExecutor(9) as pool:
        long = {"prompt": [*bench.base.context, *bench.rows[0]], "max_tokens": 100, "ignore_eos": True}
        busy = [pool.submit(engine.complete, "base", **long) for _ in range(8)]
        while engine.metric("vllm:num_requests_running") < 8:
            time.sleep(0.05)
        waiting = pool.submit(error_of, "base:gone")
        while engine.metric("vllm:num_requests_waiting") < 1:
            time.sleep(0.05)
        bench.reference.store.remove("gone")
        found = waiting.result()
        for one in busy:
            one.result()
    return error_of("base:gone"), found


def preempt(bench: Bench, engine: Engine | None = None) -> dict[str, Any]:
    """More requests than the cache has room for when their answers grow."""
    requests = [Request(f"noise/{n % 5}", row, 120) for n, row in enumerate(bench.rows[:10])]
    expected = bench.reference.generate(requests)
    with bench.engine([], ["--max-num-seqs", "16", "--num-gpu-blocks-override", "48"]) as small:
        verdict = bench.reference.judge(requests, expected, bench.asked(small, requests, 10))
        count = int(small.metric("vllm:num_preemptions_total"))
    return {**asdict(verdict), "preemptions": count, "ok": not verdict.wrong and count > 0}


def run(
    model: str, python: Path, cases: Sequence[str], shown: int, keep: Callable[[dict[str, Any], str, dict], None]
) -> None:
    """The cases of one model. keep: is told what the model is, and the result of each case."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(model, folder)
        train, test = load_jsonl(TASK / "train.jsonl")[:shown], load_jsonl(TASK / "test.jsonl")
        if window := getattr(reference.model.config, "sliding_window", None):  # long enough for it to hide tokens
            train = draw_out(reference.tokenizer, train, [item.input for item in test], window + 64)
        if "smollm2" in model:  # a prefix that was really tuned; others are as good for comparing engines
            settings = get_method("ct-kv").settings(epochs=3, lr=1e-2)
            base = tune(reference.model, reference.tokenizer, train, "ct-kv", settings).prefix
        else:
            base = KVPrefix.from_demonstrations(reference.model, reference.tokenizer, train)
        for seed in range(100 if "many" in cases else 5):
            reference.noised(f"noise/{seed}", base, seed)
        rows = [tuple(encode_prompt(reference.tokenizer, item.input)) for item in test]
        name = reference.model.config.architectures[0]

        def engine(own: Sequence[str], options: Sequence[str]) -> Engine:
            log = Path("runs/serve-check") / f"{Path(model).name}.log"
            return Engine(python, model, Path(folder), log, own, [*ENGINE, *options])

        bench = Bench(reference, engine, rows, base)
        about = {"class": name, "P": base.length}
        first = [case for case in ("tokens", "many", "salts", "kill") if case in cases]
        if first:
            size = sum(x.numel() * 4 for x in base.parameters())
            memory = ["--memory-gib", f"{20.5 * size / (1 << 30):.6f}"]
            with bench.engine(memory, ["--max-num-seqs", "128"]) as running:
                for case in first:
                    keep(about, case, globals()[case](bench, running))
        if "preempt" in cases:
            keep(about, "preempt", preempt(bench))
        del bench, reference
        gc.collect()


def markdown(results: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# vLLM with stored prefixes, against generate()",
        "",
        f"`make serve-check`, {results['versions']}, fp32. equal: the tokens of `generate()`. tie: others, each of "
        f"whose tokens has a logit within {MARGIN:g} of the greatest, given all before it.",
        "",
        "| model | P | case | requests | equal | tie | wrong | besides |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    known = {*Verdict.__dataclass_fields__, "ok"}
    for model, found in results["models"].items():
        for case, one in found["cases"].items():
            besides = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in one.items() if key not in known)
            numbers = (one["requests"], one["equal"], one["ties"], len(one["wrong"]))
            cells = [f"{model} ({found['class']})", found["P"], case, *numbers, besides]
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment that has vLLM")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all for the first model, tokens for others")
    parser.add_argument("--shown", type=int, default=8, help="demonstrations of the prefixes")
    parser.add_argument("--out", type=Path, default=Path("tools/serving/results"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = args.out / "serve_check.json"
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    failed: list[str] = []
    results["versions"] = versions(args.python)
    for model in args.models:
        name = Path(model).name

        def keep(about: dict[str, Any], case: str, result: dict[str, Any], name: str = name) -> None:
            print(name, case, result, flush=True)
            failed.extend([f"{name} {case}"] * (not result["ok"]))
            merged = {**results["models"].get(name, {}).get("cases", {}), case: result}
            results["models"][name] = {**about, "cases": {case: merged[case] for case in CASES if case in merged}}
            args.out.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, results)
            atomic_write_bytes(args.out / "serve_check.md", markdown(results).encode())

        cases = args.cases or (CASES if model == MODELS[0] else ("tokens",))
        run(model, args.python, cases, args.shown, keep)
    print(f"failed: {', '.join(failed)}" if failed else "all as generate() has it")
    return 1 if failed else 0


def versions(python: Path) -> str:
    """The engine's version and those of what it runs on."""
    names = ("vllm", "torch", "transformers")
    code = f"import {', '.join(names)}; print(*(f'{{m.__name__}} {{m.__version__}}' for m in ({', '.join(names)})))"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return told.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
