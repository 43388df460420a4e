"""The suite table. A new suite is one file beside this one and one row here."""

from __future__ import annotations

import difflib

from ctkernels.tuning.data.suites.arc import ARC
from ctkernels.tuning.data.suites.base import Suite, SuiteOptions, Task, View
from ctkernels.tuning.data.suites.bbh import BBH
from ctkernels.tuning.data.suites.jsonl import GENERATION, JSONL
from ctkernels.tuning.data.suites.mmlu import MMLU
from ctkernels.tuning.data.suites.nlp_lr import NLP_LR

SUITES: dict[str, Suite] = {suite.name: suite for suite in (NLP_LR, BBH, MMLU, ARC, GENERATION, JSONL)}


def get_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: no such suite; the message lists them and suggests the nearest.
    """
    if name not in SUITES:
        close = difflib.get_close_matches(str(name), SUITES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}{hint}")
    return SUITES[name]


__all__ = ["SUITES", "Suite", "SuiteOptions", "Task", "View", "get_suite"]
