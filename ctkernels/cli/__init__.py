"""The command line: the only place that knows argv and terminals. Begin with `main.py`."""

from ctkernels.cli.main import run
from ctkernels.cli.model import load_model

__all__ = ["load_model", "run"]
