"""The model of a command, and its scores as a table."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctkernels.cli.parse import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.cli.options import ModelOptions


THREADS_PER_CPU = 16  # more only wait for one another, and at some number the system gives none


def load_model(options: ModelOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer.

    Raises:
        UsageError: no such model, one that does not load, or a checkpoint that lacks weights or has others, unless
            these are allowed.
    """
    if not options.model:
        raise UsageError("model is required: a directory or a hub id (--model)")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads is not None:
        most = THREADS_PER_CPU * (os.cpu_count() or 1)
        if not 1 <= options.threads <= most:
            raise UsageError(
                f"threads must be at least 1 and at most {most}, {THREADS_PER_CPU} for each CPU of this machine, got "
                f"{options.threads}"
            )
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise UsageError(f"device must be a torch device such as cpu or cuda:0, got {options.device!r}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch that was built without it asserts
        raise UsageError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current device
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    offline_if_unreachable(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        loaded: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"cannot load the model {options.model!r}: {error}") from None
    model, found = loaded
    if not options.allow_other_weights:
        _require_all_weights(options.model, type(model).__name__, found)
    return model.to(device).eval(), tokenizer


def _require_all_weights(name: str, kind: str, found: Mapping[str, Collection[str]]) -> None:
    """found: what transformers says of the names in a checkpoint."""
    faults = {
        "lacks weights, which would be random": found["missing_keys"],
        "has weights of other shapes": [str(key) for key in found["mismatched_keys"]],
        "has weights that the class does not know": found["unexpected_keys"],
    }
    for what, names in faults.items():
        if names:
            first, more = sorted(names)[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"the checkpoint of {name!r} is not one of {kind}: it {what} ({first}{more}); --allow-other-weights "
                "loads it nonetheless"
            )


def offline_if_unreachable(model: str) -> None:
    """Where the hub cannot be reached, look for a hub id among the files that were fetched before, and nowhere else:
    each request would be tried again and again, for a minute."""
    from huggingface_hub import constants

    from ctkernels.tuning.adapters.sources import unreachable_hub

    away = None if Path(model).exists() else unreachable_hub()
    if away is not None:
        constants.HF_HUB_OFFLINE = True
        print(
            f"ctkernels: warning: {away}; --model {model} is looked for among what was fetched before", file=sys.stderr
        )


def print_scores(results: Sequence[dict[str, Any]]) -> None:
    """Tables of evaluation results on stdout: the scores, and for items with options plain and calibrated numbers."""
    from rich.table import Table

    from ctkernels.cli.console import console

    table = Table(*("", "metric", "score", "accuracy", "gold loss", "items", "start s", "eval s"))
    for r in results:
        numbers = (f"{r['score']:.3f}", f"{r['accuracy']:.3f}", f"{r['gold_loss']:.3f}", str(r["items"]))
        table.add_row(r["name"], r["metric"], *numbers, f"{r['seconds_start']:.1f}", f"{r['seconds_eval']:.1f}")
    always = results[0]["majority"]
    if always is not None:
        name, numbers = f"always {always['option']!r}", (f"{always['score']:.3f}", f"{always['accuracy']:.3f}")
        table.add_row(name, results[0]["metric"], *numbers)
    screen = console()
    screen.print(table)
    if all(r["nll"] is None for r in results):
        return

    def both(r: dict[str, Any], name: str) -> str:
        after = "-" if r["calibrated"] is None else f"{r['calibrated'][name]:.3f}"
        return f"{r[name]:.3f} / {after}"

    table = Table("", "by", title="Options, plain / calibrated")
    for name in ("score", "accuracy", "NLL", "ECE"):
        table.add_column(name, no_wrap=True)
    for r in results:
        how = "-" if r["calibrated"] is None else r["calibrated"]["offsets"]["calibrate"]
        table.add_row(r["name"], how, *(both(r, name) for name in ("score", "accuracy", "nll", "ece")))
    screen.print(table)
