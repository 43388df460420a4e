#!/usr/bin/env python3
"""Instruction prompt tuning beside prompt tuning: variance over prompt lengths and seeds, and gain against similarity.

    python benchmarks/bench_ipt.py --model .models/smollm2-135m --e2e devset.csv testset_w_refs.csv --geoquery polog.txt

The two questions of "How Does In-Context Learning Help Prompt Tuning?" (Sun et al., arXiv 2302.11521), on a
data-to-text and a semantic parsing task in their public formats, which are not part of this repository:

    e2e        mr,ref as CSV: https://github.com/tuetschek/e2e-dataset
    geoquery   parse([words], answer(...)). : https://github.com/jkkummerfeld/text2sql-data, geography-polog.txt

Prompt tuning and instruction prompt tuning (the most similar demonstration by BM25 in words before each input) train
prompts of several lengths with several seeds, which also draw the demonstrations. Both generate; the score is BLEU.
Cells are kept in OUT, and the same command continues. RESULTS/ipt.md and .json hold the tables.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import sacrebleu
from transformers import PreTrainedTokenizerBase

from benchmarks import harness
from ctkernels.cli import load_model
from ctkernels.cli.options import ModelOptions
from ctkernels.cli.view import SweepView
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.retrieval import InWordsEncoder
from ctkernels.tuning.data.suites import SuiteOptions, Task, get_suite
from ctkernels.tuning.evaluation.sweep.cells import CellResult
from ctkernels.tuning.evaluation.sweep.run import Sweep, run_sweep
from ctkernels.tuning.evaluation.sweep.spec import MethodSpec
from ctkernels.tuning.evaluation.sweep.workers import Workers
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json
from ctkernels.tuning.train.distributed import local_device

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("prompt-tuning", "ipt")
POOL = 500  # pairs that seeds draw demonstrations from
PARSE = re.compile(r"parse\(\[(.+)\], *(answer\(.+\))\)\.$")
QUARTERS = 4


def read_e2e(train: Path, test: Path) -> tuple[list[Demonstration], list[Demonstration]]:
    """One pair for each meaning representation; the further texts of a test item are references."""

    def grouped(path: Path) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["mr"], []).append(row["ref"])
        return found

    pool = [Demonstration(mr, refs[0]) for mr, refs in grouped(train).items()]
    tested = [Demonstration(mr, refs[0], references=tuple(refs[1:])) for mr, refs in grouped(test).items()]
    return pool, tested


def read_geoquery(path: Path) -> tuple[list[Demonstration], list[Demonstration]]:
    """Questions and their logical forms, a third of them for the test."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := PARSE.match(line.strip()):
            words = match[1].replace("'", "").replace(",", " ")
            pairs.append(Demonstration(words, match[2]))
    pairs = list({pair.input: pair for pair in pairs}.values())
    random.Random(0).shuffle(pairs)
    third = len(pairs) // 3
    return pairs[third:], pairs[:third]


def write_task(folder: Path, pool: Sequence[Demonstration], test: Sequence[Demonstration]) -> None:
    """The task in the layout of the suite `generation`."""
    pool = random.Random(0).sample(list(pool), min(POOL, len(pool)))
    test = random.Random(1).sample(list(test), min(POOL, len(test)))
    for split, pairs in (("train", pool), ("test", test)):
        records = ({"input": p.input, "output": p.output, "references": list(p.references)} for p in pairs)
        text = "".join(json.dumps(record) + "\n" for record in records)
        atomic_write_bytes(folder / f"{split}.jsonl", text.encode())


def variance_table(results: Sequence[CellResult], lengths: Sequence[int], tasks: Sequence[str]) -> str:
    """BLEU by length: mean and standard deviation over seeds; then over all lengths and seeds together."""
    rows = []
    for task in tasks:
        for kind in (*KINDS, "icl-words"):
            mine = [r for r in results if r.task == task and r.method.split(":")[0] == kind and r.error is None]
            if not mine:
                continue
            of_length = [[100 * r.score for r in mine if f"prompt_tokens={n}:" in r.method] for n in lengths]
            everything = spread([100 * r.score for r in mine])
            exact = statistics.mean(100 * r.accuracy for r in mine)
            cells = (spread(scores) if scores else "" for scores in of_length)
            rows.append((task, kind, *cells, everything, f"{exact:.1f}", str(len(mine))))
    header = ("task", "method", *(f"{length} tokens" for length in lengths), "all", "exact match", "cells")
    return harness.table(header, rows)


def spread(scores: Sequence[float]) -> str:
    """`mean ± standard deviation`"""
    deviation = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{deviation}"


def similarity_table(
    results: Sequence[CellResult], tasks: dict[tuple[str, int], Task], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, dict[str, Any]]:
    """Gain of ipt over prompt tuning with the same length and seed, in sentence BLEU, by the similarity of the test
    input and the demonstration that it was shown."""
    by_key = {}
    for result in results:
        kind, _, rest = result.method.partition(":")
        by_key[result.task, result.seed, rest.replace(":shown=1", ""), kind] = result
    points: dict[str, list[tuple[float, float]]] = {}
    for task, seed, rest, kind in by_key:
        pair = [by_key.get((task, seed, rest, name)) for name in KINDS]
        if kind != "ipt" or any(one is None or one.error is not None for one in pair):
            continue
        plain, shown = pair
        loaded = tasks[task, seed]
        encoder = InWordsEncoder(tokenizer, loaded.text_format, loaded.train, 1, "similar", seed)
        for index, item in enumerate(loaded.test[: plain.items]):
            right = [item.output, *item.references]
            before, after = (sacrebleu.sentence_bleu(r.predictions[index], right).score for r in (plain, shown))
            (nearest,) = encoder.choose(item)
            points.setdefault(task, []).append((overlap(item.input, nearest.input), after - before))
    rows, record = [], {}
    for task, found in points.items():
        found.sort()
        cuts = [len(found) * i // QUARTERS for i in range(QUARTERS + 1)]
        parts = [found[a:b] for a, b in itertools.pairwise(cuts)]
        means = [(statistics.mean(s for s, _ in part), statistics.mean(g for _, g in part)) for part in parts]
        try:
            r = statistics.correlation([s for s, _ in found], [g for _, g in found])
        except statistics.StatisticsError:  # all alike
            r = None
        shown = (f"{similarity:.2f}: {gain:+.1f}" for similarity, gain in means)
        rows.append((task, *shown, "-" if r is None else f"{r:+.2f}", str(len(found))))
        record[task] = {"quarters": means, "correlation": r, "pairs": len(found)}
    names = ("least similar", "second", "third", "most similar")
    return harness.table(("task", *names, "correlation", "pairs"), rows), record


def overlap(a: str, b: str) -> float:
    """Jaccard index of the words of two texts."""
    first, second = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(first & second) / max(1, len(first | second))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--e2e", nargs=2, type=Path, metavar=("TRAIN", "TEST"), help="CSV files of mr,ref")
    parser.add_argument("--geoquery", type=Path, help="text file of parse([...], answer(...)).")
    parser.add_argument("--lengths", nargs="*", type=int, default=[5, 25, 50], help="tokens of the prompt")
    parser.add_argument("--seeds", nargs="*", type=int, default=[13, 21, 42])
    parser.add_argument("--shots", type=int, default=64, help="demonstrations")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--limit", type=int, default=50, help="test items")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ipt", help="folder of the cells")
    parser.add_argument("--results", type=Path, help="folder of the report (default: OUT)")
    args = parser.parse_args(argv)
    if args.e2e is None and args.geoquery is None:
        parser.error("give --e2e, --geoquery, or both")

    workers, machine = Workers(), harness.describe_machine(args.device)
    folder = args.out / "tasks"
    if workers.rank == 0 and args.e2e is not None:
        write_task(folder / "e2e", *read_e2e(*args.e2e))
    if workers.rank == 0 and args.geoquery is not None:
        write_task(folder / "geoquery", *read_geoquery(args.geoquery))
    workers.wait()
    model, tokenizer = load_model(ModelOptions(args.model, args.dtype, local_device(args.device)))
    trained = f"epochs={args.epochs}:lr={args.lr}"
    words = [f"prompt-tuning:prompt_tokens={n}:{trained}" for n in args.lengths]
    words += [f"ipt:prompt_tokens={n}:{trained}:shown=1" for n in args.lengths]
    suite = get_suite("generation")
    sweep = Sweep(
        suite=suite,
        folder=folder,
        tasks=suite.pick_tasks(folder, []),
        specs=[MethodSpec.parse(word) for word in ("icl-words:shown=1", *words)],
        seeds=args.seeds,
        out=args.out,
        limit=args.limit,
        options=SuiteOptions(args.shots),
    )
    with SweepView(sweep, workers) as view:
        results = run_sweep(model, tokenizer, sweep, workers, view)
    workers.close()
    if workers.rank > 0:
        return
    tasks = {(task, seed): sweep.load(task, seed) for task in sweep.tasks for seed in sweep.seeds}
    similar, record = similarity_table(results, tasks, tokenizer)
    text = "\n\n".join(
        [
            "# Instruction prompt tuning",
            f"{Path(args.model).name}, {args.dtype}, {args.shots} demonstrations, {args.epochs} epochs, lr {args.lr}, "
            f"{args.limit} test items, seeds {', '.join(map(str, args.seeds))}. {harness.machine_line(machine)}",
            "BLEU, mean ± standard deviation over seeds (which also draw the demonstrations):",
            variance_table(results, args.lengths, sweep.tasks),
            "Gain of ipt over prompt-tuning with the same length and seed in sentence BLEU, by quarters of similarity "
            "(Jaccard index of the words) between the test input and the demonstration that it is shown:",
            similar,
        ]
    )
    out = args.results or args.out
    atomic_write_bytes(out / "ipt.md", (text + "\n").encode())
    names = ("task", "method", "seed", "score", "accuracy", "seconds", "error")
    cells = [{name: getattr(result, name) for name in names} for result in results]
    atomic_write_json(out / "ipt.json", {"machine": machine, "cells": cells, "similarity": record})
    print(text)


if __name__ == "__main__":
    main()
