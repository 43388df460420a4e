#!/usr/bin/env python3
"""Serving tasks from stored prefixes, against encoding their demonstrations again for every request.

    python benchmarks/bench_serving.py --model .models/smollm2-135m            under three minutes on two cores

Ways to answer requests whose demonstrations are known in advance:

    stored, in memory    PrefixStore.attach with the prefix kept in memory, then generate() on the requests alone
    stored, on disk      the same without memory: the file is mapped for every batch (the system may have it cached)
    cache copied         transformers' own: a DynamicCache of the demonstrations, copied for every batch and row
    encoded anew         the demonstrations in front of every request, through the stock model

First the first token's logits of all ways are compared; then they run in turn in this process.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks import harness
from benchmarks.bench_tuning import TASK, draw_out
from benchmarks.harness import Laps, Spread
from ctkernels.tuning import Demonstration, KVPrefix, PrefixSet, PrefixStore, encode_context, load_jsonl

AGREEMENT = 1e-3  # largest difference of a logit between two ways
IN_MEMORY, ON_DISK, COPIED, ANEW = "stored, in memory", "stored, on disk", "cache copied", "encoded anew"
SMALL_TOKENS = 8  # of each prefix in a store of many


class Requests:
    """A batch of requests and the ways to answer it.

    contexts: int `[P]` per task.  owner: task of each row.  rows: int `[S]` per request.
    """

    def __init__(
        self, model: PreTrainedModel, directory: Path, contexts: list[Tensor], owner: list[int], rows: list[Tensor]
    ) -> None:
        self.model, self.owner, self.rows = model, [str(task) for task in owner], rows
        self.contexts = [contexts[task] for task in owner]
        self.ids, self.mask = _left_padded(rows)
        self.kept, self.mapped = (
            PrefixStore(directory, model),
            PrefixStore(directory, model, memory_bytes=0, mapped=True),
        )
        self.ways: dict[str, Callable[[int], Any]] = {
            IN_MEMORY: lambda count: self._attached(self.kept, count),
            ON_DISK: lambda count: self._attached(self.mapped, count),
            ANEW: self._anew,
        }
        if len(set(owner)) == 1:  # one cache for all rows
            self._cache = DynamicCache()
            with torch.no_grad():
                model(self.contexts[0][None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self.ways[COPIED] = self._copied

    def _generate(self, ids: Tensor, mask: Tensor, count: int, **arguments: Any) -> Any:
        return self.model.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **arguments,
        )

    def _attached(self, store: PrefixStore, count: int) -> Any:
        with store.attach(self.owner):
            return self._generate(self.ids, self.mask, count)

    def _copied(self, count: int) -> Any:
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(self.rows))
        context = self.contexts[0].expand(len(self.rows), -1)
        ids, mask = torch.cat((context, self.ids), dim=1), torch.cat((torch.ones_like(context), self.mask), dim=1)
        return self._generate(ids, mask, count, past_key_values=cache)

    def _anew(self, count: int) -> Any:
        joined = [torch.cat(pair) for pair in zip(self.contexts, self.rows, strict=True)]
        return self._generate(*_left_padded(joined), count)


def _left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
    return ids, mask


def measure(requests: Requests, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token and to the whole answer of each way, in turn.

    Raises:
        ArithmeticError: two ways whose logits of the first token differ by more than `AGREEMENT`.
    """
    logits = {name: way(1).logits[0] for name, way in requests.ways.items()}  # warms up, too
    difference = max((logits[IN_MEMORY] - other).abs().max().item() for other in logits.values())
    if not difference <= AGREEMENT:
        raise ArithmeticError(f"the logits of the first token differ by {difference:.1e}, more than {AGREEMENT:.0e}")

    def laps(way: Callable[[int], Any]) -> Laps:
        return {
            "first": harness.timed(lambda: way(1), "cpu")[1],
            "answer": harness.timed(lambda: way(new_tokens), "cpu")[1],
        }

    works = {name: lambda way=way: laps(way) for name, way in requests.ways.items()}
    return {
        "rows": len(requests.rows),
        "tasks": len(set(requests.owner)),
        "P": statistics.median(len(context) for context in requests.contexts),
        "difference": difference,
        "ways": harness.in_turn(works, seconds=0, least=rounds),
    }


def measure_store(model: PreTrainedModel, directory: Path, contexts: list[Tensor], rounds: int) -> dict[str, Any]:
    """Seconds of what a store does with one prefix, and the size of its file."""
    prefix = KVPrefix.from_tokens(model, contexts[0], torch.tensor([len(contexts[0])]))
    mapped, kept = PrefixStore(directory, model, memory_bytes=0, mapped=True), PrefixStore(directory, model)
    prefixes = [kept.get(str(task)) for task in range(len(contexts))]

    def attach() -> None:
        with prefix.attach(model):
            pass

    works = {
        "encode the demonstrations": lambda: KVPrefix.from_tokens(model, contexts[0], prefix.segments),
        "put": lambda: kept.put("spare", prefix),
        "get from disk": lambda: mapped.get("0"),
        "get from memory": lambda: kept.get("0"),
        "attach and detach": attach,
        f"lay {len(prefixes)} prefixes side by side": lambda: PrefixSet(prefixes),
    }
    for work in works.values():
        work()
    timed = {name: lambda work=work: {"all": harness.timed(work, "cpu")[1]} for name, work in works.items()}
    times = harness.in_turn(timed, seconds=0, least=3 * rounds)
    file_bytes = {}
    for dtype in (torch.float32, torch.bfloat16):
        store = PrefixStore(directory / str(dtype), model, dtype=dtype)
        store.put("0", prefix)
        file_bytes[str(dtype).removeprefix("torch.")] = next(store.directory.iterdir()).stat().st_size
    return {"P": prefix.length, "times": {name: laps["all"] for name, laps in times.items()}, "file_bytes": file_bytes}


def measure_many(model: PreTrainedModel, directory: Path, context: Tensor, count: int) -> dict[str, Any]:
    """Random reads from a store of `count` short prefixes: memory holds a tenth of them, some are read more often."""
    prefix = KVPrefix.from_tokens(model, context[:SMALL_TOKENS], torch.tensor([SMALL_TOKENS]))
    size = sum(p.numel() * p.element_size() for p in prefix.parameters())
    store = PrefixStore(directory, model, memory_bytes=count * size // 10)
    for task in range(count):
        store.put(f"task {task}", prefix)
    drawn, seconds = random.Random(0), []
    for _ in range(2 * count):
        name = f"task {int(count * drawn.random() ** 3)}"  # half of the demand is for an eighth of the tasks
        started = time.perf_counter()
        store.get(name)
        seconds.append(time.perf_counter() - started)
    _, listing = harness.timed(lambda: len(store), "cpu")
    tail = statistics.quantiles(seconds, n=100)[98]
    return {"count": count, "P": SMALL_TOKENS, "get": Spread.of(seconds), "p99": tail, "list": listing}


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    rows, new_tokens = [], results["new_tokens"]
    for batch in results["batches"]:
        anew = batch["ways"][ANEW]
        for name in (IN_MEMORY, ON_DISK, COPIED, ANEW):
            if name not in batch["ways"]:
                continue
            times = batch["ways"][name]
            line = [f"{batch['rows']} of {_tasks(batch['tasks'])}", str(int(batch["P"])), name]
            for phase in ("first", "answer"):
                line += [harness.milliseconds(times[phase]), f"{anew[phase].median / times[phase].median:.1f}x"]
            rows.append([*line, f"{batch['rows'] / times['answer'].median:.2f}"])
    header = ["requests", "P", "way", "first token ms", "speed-up", f"{new_tokens} tokens ms", "speed-up", "requests/s"]
    stored, many = results["store"], results["many"]
    parts = [[name, f"{1e3 * spread.median:.2f}"] for name, spread in stored["times"].items()]
    sizes = ", ".join(f"{harness.megabytes(size)} MB in {name}" for name, size in stored["file_bytes"].items())
    return (
        f"Requests of about {results['row_tokens']} tokens behind the demonstrations of a task, P tokens; greedy "
        f"answers of {new_tokens} tokens. Medians and quartiles; speed-up over encoding the demonstrations anew.\n\n"
        f"{harness.table(header, rows)}\n\n**The store**, a prefix of {stored['P']} tokens: a file of {sizes}\n\n"
        f"{harness.table(['step', 'ms'], parts)}\n\n"
        f"{many['count']} prefixes of {many['P']} tokens, a tenth of them in memory, skewed demand: get in "
        f"{1e3 * many['get'].median:.2f} ms (median), {1e3 * many['p99']:.2f} ms (99th percentile); all names listed "
        f"in {1e3 * many['list']:.1f} ms."
    )


def _tasks(count: int) -> str:
    return "one task" if count == 1 else f"{count} tasks"


def task_contexts(tokenizer: PreTrainedTokenizerBase, train: list[Demonstration], count: int) -> list[Tensor]:
    """Demonstrations of `count` tasks: the same pairs in different orders, one fewer in every second task."""
    drawn, contexts = random.Random(0), []
    for task in range(count):
        pairs = drawn.sample(train, len(train) - task % 2)
        contexts.append(encode_context(tokenizer, pairs).input_ids)
    return contexts


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--task", type=Path, default=TASK)
    parser.add_argument("--demonstrations", type=int, default=16)
    parser.add_argument("--length", type=int, default=400, help="least tokens of a task's demonstrations")
    parser.add_argument("--rows", type=int, default=8, help="requests of a batch")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stored", type=int, default=500, help="prefixes in the store of many")
    args = parser.parse_args(argv)
    harness.prepare(args)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    train, test = load_jsonl(args.task / "train.jsonl"), load_jsonl(args.task / "test.jsonl")
    pairs = draw_out(tokenizer, train[: args.demonstrations], [item.input for item in test], args.length)
    contexts = task_contexts(tokenizer, pairs, args.rows)
    texts = [f" {item.input} " for item in test[: args.rows]]
    rows = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0] for text in texts]
    machine = {**harness.describe_machine("cpu"), "model": args.model, "dtype": "float32"}
    print(harness.machine_line(machine), flush=True)

    row_tokens = round(statistics.mean(len(row) for row in rows))
    results: dict[str, Any] = {"row_tokens": row_tokens, "new_tokens": args.new_tokens, "batches": []}
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(Path(folder, "tasks"), model)
        for task, context in enumerate(contexts):
            store.put(str(task), KVPrefix.from_tokens(model, context, torch.tensor([len(context)])))
        everyone = list(range(args.rows))
        for owner, count in (([0], 1), ([0] * args.rows, args.rows), (everyone, args.rows)):
            requests = Requests(model, store.directory, contexts, owner, rows[:count])
            results["batches"].append(measure(requests, args.new_tokens, args.rounds))
            print(f"{count} requests: logits agree to {results['batches'][-1]['difference']:.0e}", flush=True)
        results["store"] = measure_store(model, store.directory, contexts, args.rounds)
        results["many"] = measure_many(model, Path(folder, "many"), contexts[0], args.stored)
    harness.write_report("bench_serving", args, machine, results, markdown(results))


if __name__ == "__main__":
    main()
