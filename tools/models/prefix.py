#!/usr/bin/env python3
"""A prefix on every causal language model class of the installed transformers.

    python -m tools.models.prefix                      all of them, ten minutes; writes ctkernels/tuning/hf/served.json
    python -m tools.models.prefix llama gemma4_text    these, in place of what the table says of them

Each case is the proof of `ctkernels/tuning/hf/proof.py` in a process of its own: the default configuration of each
class, and others (`ctkernels/testing/classes.py`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no class needs a file from the hub
import torch
import transformers

from ctkernels.testing.classes import Case, build, cases
from ctkernels.tuning.hf import prove
from ctkernels.tuning.hf.discover import find_layout
from ctkernels.tuning.hf.kinds import class_name
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.served import TABLE, in_a_line, kind_digest, shipped, trusting
from ctkernels.tuning.hf.tiny import shrink
from tools.models.page import write_page
from tools.models.sweeps import each_in_a_process, write_table

SECONDS = 120  # most that a case may take
NOT_BUILT = "it cannot be built"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="default: all")
    only = set(parser.parse_args().model_types)
    known = shipped()
    if only and known["transformers"] != transformers.__version__:
        parser.error(f"the table is of transformers {known['transformers']}: run all model types")
    chosen = [case for case in cases() if not only or case.model_type in only]
    results: dict[str, dict[str, Any]] = {}
    for case, answer in each_in_a_process(run_case, chosen, SECONDS):
        result = answer or {"class": case.model_class, "kind": None, "reason": f"no answer in {SECONDS} s"}
        print(f"{case.model_type:24} {case.name:16} {brief(result)}", flush=True)
        entry = results.setdefault(case.model_type, {"class": result.pop("class"), "configurations": []})
        if case.name == "default" or not (result["reason"] or "").startswith(NOT_BUILT):
            entry["configurations"].append({"name": case.name, **result})
    models = {**(known["models"] if only else {}), **results}
    write_table(TABLE, {"transformers": transformers.__version__}, "models", dict(sorted(models.items())))
    write_page()


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


def brief(result: Mapping[str, Any]) -> str:
    """A line of the terminal."""
    if result["reason"] is not None:
        return f"refused: {result['reason'][:120]}"
    return f"served: {result['difference']:.0e}, another context {result['effect']:.0e}"


if __name__ == "__main__":
    main()
