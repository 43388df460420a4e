"""What training minimises on a batch of rows: the answers' loss, that of the choice among options, or both."""

from ctkernels.tuning.objectives.base import Forward, Objective, Weights
from ctkernels.tuning.objectives.table import OBJECTIVES, ObjectiveName

__all__ = ["OBJECTIVES", "Forward", "Objective", "ObjectiveName", "Weights"]
