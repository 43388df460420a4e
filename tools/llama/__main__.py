"""Prefixes in a real llama-server: greedy tokens beside those of `generate`, and how many tokens the server evaluates.

    python -m tools.llama [--models NAME ...] [--python .venv-llama/bin/python] [--out tools/llama/results]

The newer xllamacpp writes state version 4, an older one 3. Rows of models that are not named stay in the report.

For each model and kind of cache: a server of xllamacpp processes a context, its slot is saved and patched with three
prefixes: the context itself, a tuned one, and the tuned one with noise, which no context gives. Every request restores
the slot and sends context and input. The model of `generate` has the dequantised weights of the server's GGUF file of 4
bits (q4); `f32` is a server with the dequantised weights, too.

Near ties. With weights of 4 bits the server has activations of 8, so that its log-probabilities differ from those of
fp32 also on its own context, before anything is patched. `noise` is the largest such difference among the five
likeliest first tokens of all inputs. Where the server's token is another one, it is a near tie if `generate` prefers
its own by at most twice the noise, as each of the two may be off by so much; else the check fails. Cells of q8_0 round
the prefix, which changes much where it is noise: there `generate` has the prefix as the cells hold it, and `rounding`,
the largest change that this alone makes to its own log-probabilities, is added to the noise, since the server rounds
what it multiplies with them, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ctkernels import cli
from ctkernels.serving.llama import export_llama
from ctkernels.serving.llama.cells import Q8_0, TYPES, CellType, decode, encode, hadamard
from ctkernels.serving.llama.export import Order
from ctkernels.tuning import Adapter, KVPrefix, encode_prompt, load_jsonl, tune
from ctkernels.tuning.data.formats import encode_context
from tools.llama.models import SOURCES, dequantised, fetch

TASK = Path("examples/tasks/support-routing")
NEW_TOKENS = 4
LIKELIEST = 5
INTERLEAVED = ("smollm2-135m",)  # models whose keys llama.cpp has in another order
NOISE = 0.5  # of a layer's root mean square


class Cells(NamedTuple):
    """What a server is started with: weights (q4 or f32), types of keys and values, and flash attention, without which
    values are transposed; which version of the state its slot files have."""

    weights: str
    keys: str
    values: str
    flash: bool
    version: int = 4


class Run(NamedTuple):
    """Servers for a model: so many demonstrations, epochs and learning rate of the tuned prefix, requests."""

    demonstrations: int
    epochs: int
    lr: float
    requests: int
    cells: tuple[Cells, ...]


MAIN = (
    Cells("f32", "f32", "f32", True),
    Cells("f32", "f32", "f32", False),
    Cells("f32", "f16", "f16", True),
    Cells("f32", "q8_0", "q8_0", True),
    Cells("q4", "f16", "f16", True),
    Cells("q4", "f16", "f16", False),
)
RUNS = {
    "smollm2-135m": [
        Run(16, 6, 3e-3, 16, MAIN),
        Run(4, 6, 3e-3, 8, (Cells("f32", "bf16", "bf16", True), Cells("f32", "q8_0", "f16", False))),
        Run(4, 0, 3e-3, 6, (Cells("f32", "q8_0", "q8_0", True, 3), Cells("f32", "f16", "f16", False, 3))),
    ],
    "gemma3-270m": [
        Run(8, 4, 3e-3, 8, MAIN[1:5]),
        Run(40, 0, 3e-3, 4, (Cells("f32", "f16", "f16", True),)),  # longer than the window
    ],
    "qwen2.5-coder-0.5b": [Run(4, 2, 1e-2, 4, MAIN[1:4])],
}


class Answer(NamedTuple):
    """Greedy tokens, and the log-probabilities of all tokens at each of them, `[NEW_TOKENS, V]`."""

    tokens: list[int]
    logprobs: torch.Tensor


@dataclass
class Row:
    """Requests with one prefix. equal: all tokens are those of `generate`.  near_ties, different: the others.
    furthest: by how much `generate` prefers its token, at most.  evaluated: tokens that the server evaluated beyond the
    input's.  as_plain: requests whose tokens are those of the plain context, too."""

    model: str
    weights: str
    length: int
    keys: str
    values: str
    transposed: bool
    prefix: str
    noise: float
    requests: int
    equal: int = 0
    near_ties: int = 0
    different: int = 0
    furthest: float = 0.0
    evaluated: int = 0
    as_plain: int = 0
    version: int = 4
    rounding: float = 0.0

    @property
    def passed(self) -> bool:
        return self.different == 0 and self.evaluated == 0


class Server:
    """A running server; `post` sends JSON and returns JSON."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, **data: Any) -> dict[str, Any]:
        body = json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def complete(self, ids: Sequence[int], count: int = NEW_TOKENS) -> dict[str, Any]:
        return self.post(
            "/completion",
            prompt=list(ids),
            n_predict=count,
            temperature=0,
            samplers=["top_k"],
            top_k=1,
            cache_prompt=True,
            id_slot=0,
            return_tokens=True,
            n_probs=LIKELIEST,
        )

    def all_of(self, inputs: Sequence[Sequence[int]], context: Sequence[int], slot: str) -> list[dict[str, Any]]:
        """The reply to each input behind a context, whose slot is restored before."""
        replies = []
        for ids in inputs:
            self.post("/slots/0?action=restore", filename=slot)
            replies.append(self.complete([*context, *ids]))
        return replies


@contextlib.contextmanager
def server(python: str, gguf: Path, slots: Path, cells: Cells, context: int) -> Iterator[Server]:
    """A server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, str(Path(__file__).with_name("server.py")), "--gguf", str(gguf), "--slots", f"{slots}/"]
    command += ["--port", str(port), "--context", str(context), "--flash", str(int(cells.flash))]
    command += ["--keys", cells.keys, "--values", cells.values]
    with (
        (slots / "server.log").open("w") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            address = next((line.split()[1] for line in process.stdout if line.startswith("address ")), None)
            if address is None:
                sys.exit((slots / "server.log").read_text()[-2000:])
            yield Server(address)
        finally:
            process.stdin.close()
            process.wait(60)


@torch.no_grad()
def answers(model: PreTrainedModel, prefix: KVPrefix, inputs: Sequence[Sequence[int]]) -> list[Answer]:
    """What `generate` gives with a prefix attached."""
    found = []
    with prefix.attach(model):
        for ids in inputs:
            row = torch.tensor([list(ids)])
            settings = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
            out = model.generate(row, **settings, output_logits=True, return_dict_in_generate=True)
            logprobs = torch.cat(out.logits).float().log_softmax(-1)
            found.append(Answer(logprobs.argmax(-1).tolist(), logprobs))
    return found


def noisy(prefix: KVPrefix, model: PreTrainedModel) -> KVPrefix:
    """A copy with noise on every number."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        [
            x.detach() + NOISE * x.detach().square().mean().sqrt() * torch.randn(x.shape, generator=generator)
            for x in kind
        ]
        for kind in (prefix.keys, prefix.values)
    ]
    return KVPrefix(*layers, prefix.segments, prefix.first_position, prefix.metadata)


def held(prefix: KVPrefix, cells: Cells, interleaved: bool) -> KVPrefix:
    """A prefix as the cells of a cache hold it: rounded to their types, in the order in which they have it."""

    def rounded(x: torch.Tensor, name: str, kind: CellType) -> torch.Tensor:
        heads, length, dimension = x.shape
        sizes = (dimension & -dimension, 64) if kind is Q8_0 and dimension % 64 == 0 else (0, 0)
        order = Order(interleaved, sizes)
        stored = decode(encode(order.put(x.detach(), name), kind), kind).view(length, heads, dimension).transpose(0, 1)
        own = hadamard(stored, sizes[name == "values"])
        if name == "keys" and interleaved:
            own = own.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return own.contiguous()

    kinds = {kind.name: kind for kind in TYPES.values()}
    keys = [rounded(x, "keys", kinds[cells.keys]) for x in prefix.keys]
    values = [rounded(x, "values", kinds[cells.values]) for x in prefix.values]
    return KVPrefix(keys, values, prefix.segments, prefix.first_position, prefix.metadata)


def noise_of(replies: Sequence[dict[str, Any]], expected: Sequence[Answer]) -> float:
    """The largest difference of a log-probability among the server's likeliest first tokens."""
    return max(
        abs(entry["logprob"] - answer.logprobs[0, entry["id"]].item())
        for reply, answer in zip(replies, expected, strict=True)
        for entry in reply["completion_probabilities"][0]["top_logprobs"]
    )


def change(replies: Sequence[dict[str, Any]], before: Sequence[Answer], after: Sequence[Answer]) -> float:
    """The largest difference between two answers among the server's likeliest first tokens."""
    return max(
        abs(a.logprobs[0, entry["id"]] - b.logprobs[0, entry["id"]]).item()
        for reply, a, b in zip(replies, before, after, strict=True)
        for entry in reply["completion_probabilities"][0]["top_logprobs"]
    )


def compare(
    row: Row, replies: list[dict], expected: list[Answer], plain: list[Answer], inputs: list[list[int]]
) -> None:
    """Count the requests of a row."""
    for reply, answer, other, ids in zip(replies, expected, plain, inputs, strict=True):
        row.evaluated = max(row.evaluated, reply["timings"]["prompt_n"] - len(ids))
        got = reply["tokens"][:NEW_TOKENS]
        row.as_plain += got == other.tokens[: len(got)]
        step = next((i for i, pair in enumerate(zip(got, answer.tokens, strict=False)) if pair[0] != pair[1]), None)
        if step is None:
            row.equal += 1
            continue
        margin = (answer.logprobs[step].max() - answer.logprobs[step, got[step]]).item()
        row.furthest = max(row.furthest, margin)
        if margin <= 2 * (row.noise + row.rounding):
            row.near_ties += 1
        else:
            row.different += 1


def check(name: str, run: Run, pythons: dict[int, str], models: Path, scratch: Path) -> Iterator[Row]:
    """One row for each kind of cache and prefix."""
    gguf, checkpoint = fetch(name, models)
    files = {"q4": gguf, "f32": dequantised(gguf)}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pairs = load_jsonl(TASK / "train.jsonl") + load_jsonl(TASK / "dev.jsonl") + load_jsonl(TASK / "test.jsonl")[50:]
    pairs = pairs[: run.demonstrations]
    context = encode_context(tokenizer, tuple(pairs)).input_ids.tolist()
    inputs = [
        [int(i) for i in encode_prompt(tokenizer, x.input)] for x in load_jsonl(TASK / "test.jsonl")[: run.requests]
    ]
    plain = KVPrefix.from_demonstrations(model, tokenizer, pairs)
    prefixes = {"plain": plain}
    if run.epochs:
        settings = {"epochs": run.epochs, "lr": run.lr, "objective": "answers"}
        prefixes["tuned"] = tune(model, tokenizer, pairs, "ct-kv", settings).prefix
    prefixes["noise"] = noisy(list(prefixes.values())[-1], model)
    expected = {kind: answers(model, prefix, inputs) for kind, prefix in prefixes.items()}
    for kind, prefix in prefixes.items():
        Adapter(prefix).save_pretrained(scratch / kind)
    for number, cells in enumerate(run.cells):
        with server(pythons[cells.version], files[cells.weights], scratch, cells, len(context) + 256) as running:
            first = running.complete(context, 0)
            if first["timings"]["prompt_n"] != len(context):
                sys.exit(f"the server has evaluated {first['timings']['prompt_n']} of {len(context)} tokens")
            running.post("/slots/0?action=save", filename="template.bin")
            version = int.from_bytes((scratch / "template.bin").read_bytes()[4:8], "little")
            if version != cells.version:
                sys.exit(f"the server wrote version {version} of the state, not {cells.version}")
            noise = noise_of(running.all_of(inputs, context, "template.bin"), expected["plain"])
            for kind, prefix in prefixes.items():
                export(scratch / kind, prefix, checkpoint, model, scratch, as_command=number == 0)
                replies = running.all_of(inputs, context, "tuned.bin")
                settings = (cells.weights, len(context), cells.keys, cells.values, not cells.flash)
                row = Row(name, *settings, kind, noise, len(inputs), version=cells.version)
                wanted = expected[kind]
                if "q8_0" in cells[1:3]:
                    wanted = answers(model, held(prefix, cells, name in INTERLEAVED), inputs)
                    row.rounding = change(replies, expected[kind], wanted)
                compare(row, replies, wanted, expected["plain"], inputs)
                yield row


def export(
    folder: Path, prefix: KVPrefix, checkpoint: Path, model: PreTrainedModel, scratch: Path, as_command: bool
) -> None:
    """tuned.bin from template.bin, by the command or, where the model need not be read again, by its function."""
    template, out = scratch / "template.bin", scratch / "tuned.bin"
    if not as_command:
        export_llama(prefix, template, out, model, overwrite=True)
        return
    words = ["export", "--to=llama-server", f"--model={checkpoint}", f"--adapter={folder}"]
    words += [f"--template={template}", f"--out={out}", "--overwrite"]
    if cli.run(words):
        sys.exit("the command failed")


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = "model | state | weights | P | keys, values | prefix | requests | equal | near ties | different"
    head += " | furthest | noise | rounding | evaluated beyond the input | as the plain context"
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for r in rows:
        kind = f"{r.keys}, {r.values}{' transposed' if r.transposed else ''}"
        cells = [r.model, r.version, r.weights, r.length, kind, r.prefix, r.requests, r.equal, r.near_ties, r.different]
        cells += [f"{r.furthest:.3f}", f"{r.noise:.3f}", f"{r.rounding:.3f}", r.evaluated, r.as_plain]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def version_of(python: str) -> str:
    """Of xllamacpp in an environment."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('xllamacpp'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(out: Path, version: str, rows: list[Row]) -> None:
    """The report, as Markdown and JSON."""
    about = {"xllamacpp": version, "torch": torch.__version__, "machine": platform.machine()}
    described = {**about, "rows": [asdict(row) for row in rows]}
    (out / "llama.json").write_text(json.dumps(described, indent=1) + "\n")
    text = f"# Prefixes in llama-server (xllamacpp {version})\n\n{table(rows)}\n"
    (out / "llama.md").write_text(f"{text}```\n{(__doc__ or '').strip()}\n```\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(RUNS), choices=SOURCES)
    parser.add_argument("--folder", type=Path, default=Path(".models/llama"), help="of GGUF files and checkpoints")
    parser.add_argument("--python", default=".venv-llama/bin/python", help="of the environment with xllamacpp")
    parser.add_argument("--python-3", default=".venv-llama-3/bin/python", help="with one that writes version 3")
    parser.add_argument("--out", type=Path, default=Path("tools/llama/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pythons = {4: options.python, 3: options.python_3}
    version = ", ".join(map(version_of, pythons.values()))
    options.out.mkdir(parents=True, exist_ok=True)
    known = options.out / "llama.json"
    found = json.loads(known.read_text())["rows"] if known.exists() else []
    kept = [row for row in (Row(**entry) for entry in found) if row.model not in options.models]
    rows: list[Row] = []
    for name in options.models:
        for run in RUNS[name]:
            with tempfile.TemporaryDirectory() as scratch:
                for row in check(name, run, pythons, options.folder, Path(scratch)):
                    rows.append(row)
                    print(row, flush=True)
                    write(options.out, version, sorted((*kept, *rows), key=lambda row: list(RUNS).index(row.model)))
    failed = [row for row in rows if not row.passed]
    print(f"{sum(row.requests for row in rows)} requests in {len(rows)} rows, {len(failed)} rows failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
