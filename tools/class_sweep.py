#!/usr/bin/env python3
"""Every causal language model class of the installed transformers, with a prefix and with the drop-in attention.

    python tools/class_sweep.py [MODEL_TYPE ...] [--no-drop-in]

Writes what this package knows of each class (ctkernels/tuning/hf/served.json) and the table of it (docs/models.md);
with model types, of those alone. Each case runs in a process of its own and may take two minutes.

With a prefix: the proof of `ctkernels/tuning/hf/proof.py`, on the default configuration of each class and others
(`ctkernels/testing/classes.py`). Drop-in: logits, generated logits and gradients of a tiny fp64 model under
attn_implementation="ctkernels" against eager attention.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no class needs a file from the hub
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ctkernels.testing.classes import Case, build, cases
from ctkernels.tuning.hf import plain, prove
from ctkernels.tuning.hf.discover import class_name, find_layout
from ctkernels.tuning.hf.exact import full_precision
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.served import TABLE, in_a_line, kind_digest, shipped, trusting
from ctkernels.tuning.hf.tiny import VOCABULARY, make_tiny, shrink
from ctkernels.tuning.storage import atomic_write_bytes, atomic_write_json

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
SECONDS = 120  # most that a case may take
TOO_LARGE = 30e6  # parameters of a tiny model whose sizes are not known to be sizes
NOT_BUILT = "it cannot be built"
LENGTHS = (24, 180)  # the op serves long calls alone
STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--no-drop-in", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: dict[str, dict[str, Any]] = {}
    for case, result in sweep(cases(), set(options.model_types), not options.no_drop_in):
        print(f"{case.model_type:24} {case.name:16} {brief(result)}", flush=True)
        entry = results.setdefault(case.model_type, {"class": result.pop("class"), "configurations": []})
        if "drop_in" in result:
            entry["drop_in"] = result.pop("drop_in")
        if case.name == "default" or not (result["reason"] or "").startswith(NOT_BUILT):
            entry["configurations"].append({"name": case.name, **result})
    known = shipped()
    if options.model_types and known["transformers"] != transformers.__version__:
        parser.error(f"the table is of transformers {known['transformers']}: run all model types")
    models = {**(known["models"] if options.model_types else {}), **results}
    content = {"transformers": transformers.__version__, "models": dict(sorted(models.items()))}
    atomic_write_json(TABLE, content)
    atomic_write_bytes(PAGE, page(content).encode())


def sweep(all_cases: Iterable[Case], only: set[str], drop_in: bool) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with its result, from a forked process."""
    context = multiprocessing.get_context("fork")
    for case in all_cases:
        if only and case.model_type not in only:
            continue
        answers = context.Queue()
        process = context.Process(target=_answer, args=(answers, case, drop_in and case.name == "default"))
        process.start()
        try:
            result = answers.get(timeout=SECONDS)
        except queue.Empty:
            result = {"class": case.model_class, "kind": None, "reason": f"took more than {SECONDS} s or crashed"}
        process.join(1)
        if process.is_alive():
            process.kill()
        yield case, result


def _answer(answers: Any, case: Case, drop_in: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = run_case(case)
    if drop_in:
        result["drop_in"] = run_drop_in(case)
    answers.put(result)


def run_case(case: Case) -> dict[str, Any]:
    """The verdict on a case: class, kind, reason, difference, effect."""
    row: dict[str, Any] = {"class": case.model_class, "kind": None, "reason": None}
    try:
        model_class, config = build(case)
        row["class"] = class_name(model_class)
        with torch.device("meta"):
            model = model_class._from_config(config if case.name == "default" else shrink(config))
    except Exception as error:  # of any class
        return {**row, "reason": f"{NOT_BUILT}: {in_a_line(error)}"}
    try:
        with trusting():
            find_decoder(model)
    except (TypeError, ValueError) as error:
        return {**row, "reason": str(error).partition("is not supported: ")[2] or str(error)}
    layout = find_layout(model)
    verdict = prove(model_class, config, layout)
    row |= {"kind": kind_digest(model_class, config, layout), "reason": verdict.reason}
    if verdict.reason is None:
        row |= {"difference": float(f"{verdict.difference:.1e}"), "effect": float(f"{verdict.effect:.1e}")}
    return row


def run_drop_in(case: Case) -> dict[str, Any]:
    """What `attn_implementation="ctkernels"` does to a class without a prefix: the largest difference to eager
    attention, relative to the largest result; how often the op was called; and what failed, but does not under eager.
    """
    with full_precision():
        try:
            model_class, config = build(case)
            model = make_tiny(model_class, shrink(config))
        except Exception as error:  # of any class
            return {"failed": f"{NOT_BUILT}: {in_a_line(error)}"}
        expected = _results(model)
        try:
            model.set_attn_implementation("ctkernels")
        except Exception as error:
            return {"failed": in_a_line(error)}
        with mock.patch.object(plain, "prefix_attention", wraps=plain.prefix_attention) as op:
            actual = _results(model)
    worst, failed = 0.0, []
    for name, wanted in expected.items():
        own = actual[name]
        if isinstance(wanted, str):
            continue
        if isinstance(own, str) or own.shape != wanted.shape:
            failed.append(f"{name}: {own if isinstance(own, str) else list(own.shape)}")
        else:
            worst = max(worst, float((own - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)))
    return {"difference": float(f"{worst:.1e}"), "calls": op.call_count, "failed": "; ".join(failed)}


def _results(model: PreTrainedModel) -> dict[str, Tensor | str]:
    """Logits of several kinds of batches, and a gradient; or what went wrong."""
    found: dict[str, Tensor | str] = {}
    for S in LENGTHS:
        for name, run in _runs(model, S).items():
            try:
                found[f"{S} tokens, {name}"] = run().detach()
            except Exception as error:  # of any class
                found[f"{S} tokens, {name}"] = in_a_line(error)
    return found


def _runs(model: PreTrainedModel, S: int) -> dict[str, Callable[[], Tensor]]:
    ids = torch.randint(3, VOCABULARY, (2, S), generator=torch.Generator().manual_seed(S))
    left, right = torch.ones(2, 2, S, dtype=torch.int64)
    left[1, :5] = right[1, -5:] = 0
    halves = torch.cat((torch.arange(S // 2), torch.arange(S - S // 2))).expand(2, S)
    settings = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )

    @torch.no_grad()
    def logits(**inputs: Any) -> Tensor:
        return model(input_ids=ids, **inputs).logits

    def generated() -> Tensor:
        return torch.stack(model.generate(ids, attention_mask=left, generation_config=settings).logits)

    def gradient() -> Tensor:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings.clone(), use_cache=False).logits.square().mean()
        return torch.autograd.grad(loss, embeddings)[0]

    return {
        "whole rows": logits,
        "padding on the right": lambda: logits(attention_mask=right) * right[..., None],
        "padding on the left": lambda: logits(attention_mask=left) * left[..., None],
        "packed": lambda: logits(position_ids=halves, use_cache=False),
        "generated": generated,
        "gradient": gradient,
    }


def page(content: Mapping[str, Any]) -> str:
    """docs/models.md."""
    models = content["models"]
    served = {name: entry for name, entry in models.items() if entry["configurations"][0]["reason"] is None}
    lines = [
        "# Model classes",
        "",
        f"Every class that transformers {content['transformers']} maps causal language models to, by model type. This "
        "page and `ctkernels/tuning/hf/served.json` are written by `make test-models`; `ctkernels models` shows the "
        "same.",
        "",
        "*Prefix*: the largest difference between a tiny fp64 model with a prefix attached and the stock model behind "
        "the whole context, relative to the largest result, over contexts and rows of several lengths, padding on "
        "either side, packed rows, cached steps, `generate` and the gradient of the prefix (`hf/proof.py`). A mistake "
        "would change results by 1e-3 and more: *another context* says by how much other tokens in its place do. Each "
        "class is tried with its default configuration, completed where it cannot be built, and with others, which "
        "differ in windows, heads and rotary embeddings; those that are refused are named. A configuration of a kind "
        "that was not tried is proved when a prefix is first attached, in seconds.",
        "",
        '*Drop-in*: `attn_implementation="ctkernels"` without a prefix against eager attention, in the same way. '
        '"stock" says that the calls were given to the attention of transformers.',
        "",
        f"{len(served)} of {len(models)} model types are served.",
        "",
        "| model type | class | prefix | another context | drop-in |",
        "|---|---|---|---|---|",
    ]
    for name, entry in models.items():
        first, *others = entry["configurations"]
        refused = [f"{other['name']}: {_plain(other['reason'])}" for other in others if other["reason"] is not None]
        if first["reason"] is not None:
            prefix, effect = f"refused: {_plain(first['reason'])}", ""
            accepted = [other["name"] for other in others if other["reason"] is None]
            prefix += f"; served: {', '.join(accepted)}" if accepted else ""
        else:
            prefix, effect = f"{first['difference']:.0e}", f"{first['effect']:.1g}"
            prefix += f"; refused: {'; '.join(refused)}" if refused else ""
        kind = entry["class"].rpartition(".")[2]
        lines.append(f"| {name} | {kind} | {prefix} | {effect} | {_drop_in(entry.get('drop_in'))} |")
    return "\n".join(lines) + "\n"


def _drop_in(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if result["failed"]:
        return f"refused: {_plain(result['failed'])}"
    return f"{result['difference']:.0e}{'' if result['calls'] else ' (stock)'}"


def _plain(reason: str) -> str:
    """A reason as a cell of a table."""
    short = reason if len(reason) < 200 else f"{reason[:197]}..."
    return re.sub(r"([|<>*_])", r"\\\1", short)


def brief(result: Mapping[str, Any]) -> str:
    """A line of the terminal."""
    if result["reason"] is not None:
        return f"refused: {result['reason'][:120]}"
    return f"served: {result['difference']:.0e}, another context {result['effect']:.0e}"


if __name__ == "__main__":
    main()
