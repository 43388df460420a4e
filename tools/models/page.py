#!/usr/bin/env python3
"""docs/models.md, of what the two sweeps found:  python -m tools.models.page"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ctkernels.tuning.hf.served import shipped
from ctkernels.tuning.storage import atomic_write_bytes

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
RESULTS = Path(__file__).parent / "results"
HEAD = """# Model classes

Every class to which transformers {version} maps causal language models, by model type, and every encoder-decoder.
`make test-models` writes this page; `ctkernels models` shows the column *prefix* with all reasons.

*Prefix*: tiny fp64 models with a prefix attached against the stock model behind the whole context
([`hf/proof.py`](../ctkernels/tuning/hf/proof.py)): contexts and rows of several lengths, padding on either side, packed
rows, cached steps, `generate`, the gradient of the prefix. The number is the largest difference, relative to the
largest result. *Another context*: how much other tokens in the context's place change; a mistake would, too. Each class
is tried with its default configuration, completed where it cannot be built, and with others that differ in windows,
heads and rotary embeddings; those that are refused are named. Another kind of configuration is proved when a prefix is
first attached to it, in seconds.

*Drop-in*: `attn_implementation="ctkernels"` without a prefix against what transformers runs by itself, in fp64
([`tools/models/drop_in.py`](../tools/models/drop_in.py)), every call large enough for the op, and what served them:
the op, or transformers' own `sdpa` or `eager` where the op does not compute exactly what a call asks for.

{served} of {all} model types of causal language models are served with a prefix. The drop-in is right on {right} of
{pairs} classes; the others cannot be built or run as tiny models at all, or are refused by transformers itself.

What it costs ([`overhead.py`](../tools/models/overhead.py), one thread of an {cpu}): attaching a prefix to
SmolLM2-135M and detaching it {attach:.1f} ms after the first time; a forward pass of a tiny Llama of three layers
{attached:.2f} ms attached and {stock:.2f} ms stock; a proof, in seconds: {proofs}.

| model type | class | prefix | another context | drop-in |
|---|---|---|---|---|
"""


def write_page() -> None:
    results = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("drop_in", "overhead"))
    atomic_write_bytes(PAGE, page(shipped(), *results).encode())


def page(prefix: Mapping[str, Any], drop_in: Mapping[str, Any], overhead: Mapping[str, Any]) -> str:
    models, classes = prefix["models"], drop_in["classes"]
    head = HEAD.format(
        version=prefix["transformers"],
        served=sum(entry["configurations"][0]["reason"] is None for entry in models.values()),
        all=len(models),
        right=sum(result["verdict"] == "right" for result in classes.values()),
        pairs=len(classes),
        cpu=overhead["cpu"],
        attach=1e3 * overhead["attach"],
        attached=1e3 * overhead["forward"]["attached"],
        stock=1e3 * overhead["forward"]["stock"],
        proofs=", ".join(f"{name} {seconds:.1f}" for name, seconds in overhead["proof"].items()),
    )
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in _rows(models, classes))


def _rows(models: Mapping[str, Any], classes: Mapping[str, Any]) -> Iterator[list[str]]:
    decoders = {f"{kind} (decoder)" if f"{kind} (decoder)" in classes else kind: x for kind, x in models.items()}
    for kind in sorted({*decoders, *classes}):
        entry, result = decoders.get(kind), classes.get(kind)
        name = entry["class"].rpartition(".")[2] if entry else result["class"]
        yield [kind, name, *(_prefix(entry) if entry else ("", "")), _drop_in(result) if result else ""]


def _prefix(entry: Mapping[str, Any]) -> tuple[str, str]:
    first, *others = entry["configurations"]
    if first["reason"] is not None:
        accepted = ", ".join(other["name"] for other in others if other["reason"] is None)
        return f"refused: {_plain(first['reason'])}{f'; served: {accepted}' if accepted else ''}", ""
    refused = [f"{other['name']}: {_plain(other['reason'])}" for other in others if other["reason"] is not None]
    return "; refused: ".join([f"{first['difference']:.0e}", *refused]), f"{first['effect']:.1g}"


def _drop_in(result: Mapping[str, Any]) -> str:
    if result["verdict"] != "right":
        return f"{result['verdict']}: {_plain(result['why'])}" if "why" in result else result["verdict"]
    return f"{result['largest']:.0e} ({', '.join(result['through'])})"


def _plain(reason: str) -> str:
    """A reason as a cell of a table."""
    short = reason if len(reason) < 200 else f"{reason[:197]}..."
    return re.sub(r"([|<>*_])", r"\\\1", short)


if __name__ == "__main__":
    write_page()
