"""The model card of a saved adapter: README.md, which hubs show and which says how to load what lies beside it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctkernels.tuning.storage import atomic_write_bytes

FILE_NAME = "README.md"
MARK = "<!-- Written by ctkernels and replaced when the adapter is. Remove this line to keep your own changes. -->"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

TEXT = """---
{header}
---
{mark}

# {method} for {model_id}

{parts} for `{model_class}`, in `{file}`, made by ctkernels {version}. The model's weights are not part of it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from ctkernels.tuning import Adapter

name = {model_id!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
adapter = Adapter.from_pretrained("FOLDER", model, tokenizer)
with adapter.weights(model), adapter.prefix.attach(model):
    ...
```
{without_lora}

| made for | |
| --- | --- |
| model | `{model_id}`, configuration `{config_hash}`, weights `{weights}` |
| tokenizer | `{tokenizer_id}`, vocabulary `{tokenizer_hash}` |
"""

WITHOUT_LORA = """
Or as a module, from a folder or a repository of the hub, also to train it further with `transformers.Trainer`:

```python
from ctkernels.tuning import PrefixModel

model = PrefixModel.from_pretrained(model, "FOLDER")
```
"""


def write(directory: Path, description: Mapping[str, Any], file: str, version: str, wanted: bool) -> None:
    """Write the card of the adapter in `file`, if it is wanted or one of ours is there. A user's README.md stays."""
    path = directory / FILE_NAME
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if there is not None and MARK not in there:
        if wanted:
            warnings.warn(f"{path} is not a card that ctkernels wrote and stays as it is", stacklevel=4)
        return
    if wanted or there is not None:
        atomic_write_bytes(path, text(description, file, version).encode())


def text(description: Mapping[str, Any], file: str, version: str) -> str:
    """The card of an adapter with this description, as `file.py` has it."""
    from huggingface_hub import ModelCardData

    metadata = description["metadata"]
    base = metadata["model_id"] if HUB_ID.fullmatch(metadata["model_id"]) else None
    header = ModelCardData(base_model=base, library_name="ctkernels", tags=["context-tuning", metadata["method"]])
    parts = ["A key/value prefix"]
    parts += ["a soft prompt"] if "prompt" in description else []
    parts += [f"a LoRA update of rank {description['lora']['rank']}"] if "lora" in description else []
    parts += [f"{len(description['demonstrations'])} demonstrations"] if "demonstrations" in description else []
    without_lora = "" if "lora" in description else WITHOUT_LORA
    return TEXT.format(
        without_lora=without_lora,
        header=header.to_yaml(),
        mark=MARK,
        file=file,
        version=version,
        parts=", ".join(parts),
        **metadata,
    )
