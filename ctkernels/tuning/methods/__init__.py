"""Methods: what each one trains, from where, and which settings it reads. Begin with `table.py` and `ct_kv.py`."""

from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.methods.presets import PRESETS
from ctkernels.tuning.methods.table import METHODS, get_method

__all__ = ["METHODS", "PRESETS", "Method", "Run", "get_method"]
