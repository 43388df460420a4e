"""Tuned prefixes for llama-server: the keys and values in a slot file that the user's own server saved are replaced.

cells.py     how llama.cpp stores keys and values: types of numbers, order of dimensions
slot.py      where they are in a slot file
export.py    checks, and the patched file
"""

from ctkernels.serving.llama.export import Exported, export_llama
from ctkernels.serving.llama.slot import SlotError

__all__ = ["Exported", "SlotError", "export_llama"]
