"""The model of a command, and its scores as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ctkernels.cli.parse import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctkernels.cli.options import ModelOptions


def load_model(options: ModelOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer.

    Raises:
        UsageError: no such model, or one that does not load.
    """
    if not options.model:
        raise UsageError("model is required: a directory or a hub id (--model)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.threads is not None:
        if options.threads < 1:
            raise UsageError(f"threads must be at least 1, got {options.threads}")
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the model {options.model!r}: {error}") from None
    return model.to(device).eval(), tokenizer


def print_scores(results: Sequence[dict[str, Any]]) -> None:
    """A table of evaluation results on stdout."""
    from rich.console import Console
    from rich.table import Table

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    names = ("score", "accuracy", "nll", "ece")  # each plain, then calibrated
    columns = ("score", "calib.", "accuracy", "calib.", "NLL", "calib.", "ECE", "calib.")
    table = Table(*("", "metric", *columns, "gold loss", "items", "start s", "eval s"))
    for r in results:
        both = [value for name in names for value in (r[name], (r["calibrated"] or {}).get(name))]
        times = f"{r['seconds_start']:.1f}", f"{r['seconds_eval']:.1f}"
        table.add_row(r["name"], r["metric"], *map(shown, both), f"{r['gold_loss']:.3f}", str(r["items"]), *times)
    always = results[0]["majority"] if results else None
    if always is not None:
        both = (always["score"], None, always["accuracy"], *[None] * 5)
        table.add_row(
            f"always {always['option']!r}", results[0]["metric"], *map(shown, both), "", str(results[0]["items"])
        )
    Console().print(table)
