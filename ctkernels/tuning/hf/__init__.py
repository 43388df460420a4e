"""Prefixes in transformers models. The import registers `attn_implementation="ctkernels"` (see `attention.py`)."""

from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.attention import IMPLEMENTATION

__all__ = ["IMPLEMENTATION", "Attachment"]
