"""Loads the compiled extensions of this package."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[1]


def load(name: str, missing: str) -> str | None:
    """Load `ctkernels/NAME`, which registers its operators: None, or why not, `missing` where it is not built."""
    library = next((f for suffix in EXTENSION_SUFFIXES if (f := FOLDER / f"{name}{suffix}").exists()), None)
    if library is None:
        return missing
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the extension {library.name} does not load: {error}"
    return None
