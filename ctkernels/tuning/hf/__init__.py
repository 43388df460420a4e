"""Prefixes in transformers models. The import registers `attn_implementation="ctkernels"` (see `plain.py`)."""

from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.plain import IMPLEMENTATION
from ctkernels.tuning.hf.proof import prove

__all__ = ["IMPLEMENTATION", "Attachment", "prove"]
