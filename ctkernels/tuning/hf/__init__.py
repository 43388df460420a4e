"""Prefixes in transformers models. The import registers `attn_implementation="ctkernels"` (see `plain.py`)."""

from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.plain import IMPLEMENTATION

__all__ = ["IMPLEMENTATION", "Attachment"]
