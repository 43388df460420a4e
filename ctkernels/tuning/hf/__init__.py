"""Prefixes in transformers models. Importing it registers `attn_implementation="ctkernels"` (see `attention.py`)."""

from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.attention import IMPLEMENTATION
from ctkernels.tuning.hf.proof import prove

__all__ = ["IMPLEMENTATION", "Attachment", "prove"]
