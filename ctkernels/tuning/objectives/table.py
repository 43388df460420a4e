"""The objective table. A new objective is one file beside this one and one row here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ctkernels.tuning.objectives.answers import ANSWERS
from ctkernels.tuning.objectives.base import Objective
from ctkernels.tuning.objectives.mixed import MIXED
from ctkernels.tuning.objectives.options import OPTIONS

TABLE = (ANSWERS, OPTIONS, MIXED)
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in TABLE}

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
